"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts in some layers, and a shared expert with a sigmoid gate."""

from tpserve.models import experts, transformer
from tpserve.models.config_fields import ConfigFields
from tpserve.models.family import Family
from tpserve.types.model_spec import ModelSpec


def _spec(fields: ConfigFields) -> ModelSpec:
    fields = fields.over({"sliding_window": 4096})
    return transformer.spec(
        fields,
        "qwen2_moe",
        num_kv_heads=fields.size("num_key_value_heads"),
        head_dim=transformer.head_dim_of(fields),
        qkv_bias=fields.flag("qkv_bias", True),
        windows=transformer.switched_windows(fields, lambda i: i % 2 == 0 and i < fields.count("max_window_layers", 28)),
        honoured=(*experts.COUNTS, *transformer.SWITCH),
        experts=experts.qwen(fields, shared_size=fields.size("shared_expert_intermediate_size")),
    )


FAMILY = Family("qwen2_moe", ("Qwen2MoeForCausalLM",), _spec, parallel=experts.PARALLEL)
