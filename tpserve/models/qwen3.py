"""Qwen3 (dense): head dimension of its own, RMS norm over each head of query and key before rope."""

from tpserve.models import transformer
from tpserve.models.config_fields import ConfigFields
from tpserve.models.family import Family
from tpserve.types.model_spec import ModelSpec


def _spec(fields: ConfigFields) -> ModelSpec:
    fields = fields.over({"sliding_window": 4096})
    bias = fields.flag("attention_bias")
    return transformer.spec(
        fields,
        "qwen3",
        num_kv_heads=fields.size("num_key_value_heads"),
        head_dim=fields.size("head_dim"),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
        windows=transformer.switched_windows(fields, transformer.from_layer(fields)),
        honoured=transformer.SWITCH,
    )


FAMILY = Family("qwen3", ("Qwen3ForCausalLM",), _spec)
