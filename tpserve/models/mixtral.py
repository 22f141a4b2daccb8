"""Mixtral: Llama's shape with experts in every layer, their probabilities renormalised."""

from tpserve.models import experts, transformer
from tpserve.models.config_fields import ConfigFields
from tpserve.models.family import Family
from tpserve.types.model_spec import ExpertsSpec, ModelSpec, RoutingSpec
from tpserve.weights.names import ExpertNames, WeightNames

EXPERTS = ExpertNames(
    router="block_sparse_moe.gate",
    gate="block_sparse_moe.experts.{expert}.w1",
    up="block_sparse_moe.experts.{expert}.w3",
    down="block_sparse_moe.experts.{expert}.w2",
)


def _spec(fields: ConfigFields) -> ModelSpec:
    fields = fields.over({"rope_theta": 1e6})
    mixture = ExpertsSpec(
        count=fields.size("num_local_experts"),
        size=fields.size("intermediate_size"),
        routing=RoutingSpec(fields.size("num_experts_per_tok"), renormalise=True),
        layers=tuple(range(fields.size("num_hidden_layers"))),
    )
    return transformer.spec(
        fields,
        "mixtral",
        num_kv_heads=fields.size("num_key_value_heads", fields.size("num_attention_heads")),
        head_dim=transformer.head_dim_of(fields),
        windows=transformer.sliding_windows(fields),
        honoured=experts.COUNTS,
        experts=experts.checked(fields, mixture),
    )


FAMILY = Family(
    "mixtral",
    ("MixtralForCausalLM",),
    _spec,
    WeightNames(experts=EXPERTS),
    parallel=experts.PARALLEL,
)
