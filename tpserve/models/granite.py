"""Granite 3: Llama's shape with multipliers on embedding, attention scores, residual branches and logits."""

from tpserve.models import transformer
from tpserve.models.config_fields import ConfigFields
from tpserve.models.family import Family
from tpserve.types.model_spec import ModelSpec

MULTIPLIERS = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")


def _spec(fields: ConfigFields) -> ModelSpec:
    bias = fields.flag("attention_bias")
    return transformer.spec(
        fields,
        "granite",
        honoured=MULTIPLIERS,
        num_kv_heads=fields.size("num_key_value_heads", fields.size("num_attention_heads")),
        head_dim=transformer.head_dim_of(fields),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
        attention_scale=fields.number("attention_multiplier", 1.0),
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        logits_scale=1 / fields.number("logits_scaling", 1.0),
    )


FAMILY = Family("granite", ("GraniteForCausalLM",), _spec)
