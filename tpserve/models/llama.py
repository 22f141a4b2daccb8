"""Llama 2 and 3.x: grouped-query attention, rotary embedding with the scaling of 3.1, optional biases."""

from tpserve.models import transformer
from tpserve.models.config_fields import ConfigFields
from tpserve.models.family import Family
from tpserve.types.model_spec import ModelSpec


def _spec(fields: ConfigFields) -> ModelSpec:
    bias = fields.flag("attention_bias")
    return transformer.spec(
        fields,
        "llama",
        num_kv_heads=fields.size("num_key_value_heads", fields.size("num_attention_heads")),
        head_dim=transformer.head_dim_of(fields),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
    )


FAMILY = Family("llama", ("LlamaForCausalLM",), _spec)
