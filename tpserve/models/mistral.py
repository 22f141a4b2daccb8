"""Mistral: Llama's shape, and in its first release a sliding window; Ministral has it in some layers."""

from tpserve.models import transformer
from tpserve.models.config_fields import ConfigFields
from tpserve.models.family import Family
from tpserve.types.model_spec import ModelSpec


def _spec(fields: ConfigFields) -> ModelSpec:
    fields = fields.over({"sliding_window": 4096})
    return transformer.spec(
        fields,
        "mistral",
        num_kv_heads=fields.size("num_key_value_heads", fields.size("num_attention_heads")),
        head_dim=transformer.head_dim_of(fields),
        windows=transformer.layer_windows(fields, lambda _: transformer.window_of(fields) is not None),
    )


FAMILY = Family("mistral", ("MistralForCausalLM",), _spec)
