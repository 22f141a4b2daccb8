"""Qwen2 and Qwen2.5: Llama's shape with biases on query, key and value."""

from tpserve.models import transformer
from tpserve.models.config_fields import ConfigFields
from tpserve.models.family import Family
from tpserve.types.model_spec import ModelSpec


def _spec(fields: ConfigFields) -> ModelSpec:
    fields = fields.over({"sliding_window": 4096})
    return transformer.spec(
        fields,
        "qwen2",
        num_kv_heads=fields.size("num_key_value_heads"),
        head_dim=transformer.head_dim_of(fields),
        qkv_bias=True,
        windows=transformer.switched_windows(fields, transformer.from_layer(fields)),
        honoured=transformer.SWITCH,
    )


FAMILY = Family("qwen2", ("Qwen2ForCausalLM",), _spec)
