"""gpt-oss: experts in every layer with biases and a clamped SwiGLU, attention sinks, windows in every other layer."""

from tpserve.models import experts, transformer
from tpserve.models.config_fields import ConfigFields
from tpserve.models.family import Family
from tpserve.types.model_spec import ClampedSwiglu, ExpertsSpec, ModelSpec, RoutingSpec
from tpserve.weights.names import ExpertNames, WeightNames

ROUTER = "mlp.router"


def _spec(fields: ConfigFields) -> ModelSpec:
    # The dtype of the tensors that are not MXFP4; published configs omit it.
    fields = fields.over({"torch_dtype": "bfloat16", "rope_theta": 150_000.0, "sliding_window": 128})
    if not fields.get("rope_parameters") and not fields.get("rope_scaling"):
        raise fields.refuse("field 'rope_scaling' is missing")
    fields.refuse_quantization_but("mxfp4")
    bias = fields.flag("attention_bias", True)
    mixture = ExpertsSpec(
        count=fields.size("num_local_experts"),
        size=fields.size("intermediate_size"),
        routing=RoutingSpec(fields.size("num_experts_per_tok"), bias="logits", renormalise=True),
        layers=tuple(range(fields.size("num_hidden_layers"))),
        bias=True,
        clamped=ClampedSwiglu(alpha=fields.number("swiglu_alpha", 1.702), limit=fields.number("swiglu_limit", 7.0)),
    )
    return transformer.spec(
        fields,
        "gpt_oss",
        num_kv_heads=fields.size("num_key_value_heads"),
        head_dim=fields.size("head_dim"),
        qkv_bias=bias,
        out_bias=bias,
        sinks=True,
        windows=transformer.layer_windows(fields, lambda layer: layer % 2 == 0),
        honoured=(*experts.COUNTS, *transformer.SWITCH, "quantization_config"),
        experts=experts.checked(fields, mixture),
    )


FAMILY = Family(
    "gpt_oss",
    ("GptOssForCausalLM",),
    _spec,
    WeightNames(
        experts=ExpertNames(router=ROUTER, stacked_router=ROUTER, router_bias=f"{ROUTER}.bias", transposed=True),
    ),
    parallel=experts.PARALLEL,
)
