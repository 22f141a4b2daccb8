"""DeepSeek V2 and V3 (R1): latent attention, grouped and shared experts, YaRN that also scales attention scores.

V3's checkpoints have layers for multi-token prediction after the last one; they are not read.
V2's `norm_topk_prob` is refused: the published code then renormalises in place of scaling, while transformers ignores it.
"""

from msgspec.structs import replace

from tpserve.models import experts, transformer
from tpserve.models.config_fields import ConfigFields
from tpserve.models.family import Family
from tpserve.models.rope_config import score_factor
from tpserve.types.model_spec import ExpertsSpec, LatentSpec, ModelSpec, RoutingSpec
from tpserve.weights.names import ExpertNames, WeightNames

SHARED = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj")
NAMES = WeightNames(experts=ExpertNames(router_bias="mlp.gate.e_score_correction_bias", shared=SHARED))
HONOURED = (*experts.COUNTS, "kv_lora_rank", "n_routed_experts")


def _v2(fields: ConfigFields) -> ModelSpec:
    fields = fields.over({"n_shared_experts": 2})
    fields.refuse_unless("scoring_func", "softmax")
    fields.refuse_unless("norm_topk_prob", False)
    method = fields.get("topk_method") or "greedy"
    if method not in ("greedy", "group_limited_greedy"):
        raise fields.refuse(f"field 'topk_method' is {method!r}: supported are greedy, group_limited_greedy")
    limited = method == "group_limited_greedy"
    routing = RoutingSpec(
        num_active=fields.size("num_experts_per_tok"),
        num_groups=fields.size("n_group") if limited else 1,
        num_top_groups=fields.size("topk_group") if limited else 1,
        scale=fields.number("routed_scaling_factor", 1.0),
    )
    return _spec(fields, "deepseek_v2", routing, interleaved=True)


def _v3(fields: ConfigFields) -> ModelSpec:
    fields = fields.over({"n_shared_experts": 1, "norm_topk_prob": True, "rope_interleave": True})
    fields.refuse_unless("scoring_func", "sigmoid")
    fields.refuse_unless("topk_method", "noaux_tc")
    routing = RoutingSpec(
        num_active=fields.size("num_experts_per_tok"),
        scores="sigmoid",
        bias="choice",
        num_groups=fields.size("n_group"),
        num_top_groups=fields.size("topk_group"),
        group_best=2,
        renormalise=fields.flag("norm_topk_prob"),
        scale=fields.number("routed_scaling_factor"),
    )
    return _spec(fields, "deepseek_v3", routing, interleaved=fields.flag("rope_interleave"))


def _spec(fields: ConfigFields, family: str, routing: RoutingSpec, interleaved: bool) -> ModelSpec:
    num_heads = fields.size("num_attention_heads")
    fields.refuse_unless("num_key_value_heads", num_heads)
    fields.refuse_unless("attention_bias", False)
    fields.refuse_unless("mlp_bias", False)
    latent = LatentSpec(
        kv_rank=fields.size("kv_lora_rank"),
        rope_dim=fields.size("qk_rope_head_dim"),
        nope_dim=fields.size("qk_nope_head_dim"),
        v_dim=fields.size("v_head_dim"),
        q_rank=None if fields.get("q_lora_rank") is None else fields.size("q_lora_rank"),
    )
    head_dim = latent.nope_dim + latent.rope_dim
    spec = transformer.spec(
        fields,
        family,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        latent=latent,
        experts=_experts(fields, routing),
        honoured=HONOURED,
    )
    assert spec.rope is not None, "the shape of Llama"
    scale = head_dim**-0.5 * score_factor(fields, spec.rope)
    return replace(spec, rope=replace(spec.rope, interleaved=interleaved), attention_scale=scale)


def _experts(fields: ConfigFields, routing: RoutingSpec) -> ExpertsSpec:
    first, step = fields.count("first_k_dense_replace"), fields.size("moe_layer_freq", 1)
    size = fields.size("moe_intermediate_size")
    spec = ExpertsSpec(
        count=fields.size("n_routed_experts"),
        size=size,
        routing=routing,
        layers=tuple(layer for layer in range(first, fields.size("num_hidden_layers")) if layer % step == 0),
        shared_size=fields.count("n_shared_experts", 0) * size,
    )
    return experts.checked(fields, spec)


V2 = Family(
    "deepseek_v2",
    ("DeepseekV2ForCausalLM",),
    _v2,
    NAMES,
    without="`norm_topk_prob`, `attention_bias`, `mlp_bias`",
    parallel=experts.PARALLEL,
)
V3 = Family("deepseek_v3", ("DeepseekV3ForCausalLM",), _v3, NAMES, without="`attention_bias`", parallel=experts.PARALLEL)
