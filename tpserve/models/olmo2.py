"""OLMo 2: RMS norms on the outputs of attention and MLP, and over all heads of query and of key together."""

from tpserve.models import transformer
from tpserve.models.config_fields import ConfigFields
from tpserve.models.family import Family
from tpserve.types.model_spec import ModelSpec
from tpserve.weights.names import WeightNames


def _spec(fields: ConfigFields) -> ModelSpec:
    bias = fields.flag("attention_bias")
    return transformer.spec(
        fields,
        "olmo2",
        num_kv_heads=fields.size("num_key_value_heads", fields.size("num_attention_heads")),
        head_dim=transformer.head_dim_of(fields),
        norm_place="output",
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="all",
    )


FAMILY = Family(
    "olmo2",
    ("Olmo2ForCausalLM",),
    _spec,
    WeightNames(attention_norm="post_attention_layernorm", mlp_norm="post_feedforward_layernorm"),
    without="`clip_qkv`",
)
