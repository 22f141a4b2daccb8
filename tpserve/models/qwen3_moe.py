"""Qwen3-MoE: Qwen3 with experts in some layers or all."""

from tpserve.models import experts, transformer
from tpserve.models.config_fields import ConfigFields
from tpserve.models.family import Family
from tpserve.types.model_spec import ModelSpec


def _spec(fields: ConfigFields) -> ModelSpec:
    fields = fields.over({"sliding_window": 4096})
    bias = fields.flag("attention_bias")
    return transformer.spec(
        fields,
        "qwen3_moe",
        num_kv_heads=fields.size("num_key_value_heads"),
        head_dim=transformer.head_dim_of(fields),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
        windows=transformer.sliding_windows(fields) if fields.flag("use_sliding_window") else (),
        honoured=(*experts.COUNTS, *transformer.SWITCH),
        experts=experts.qwen(fields),
    )


FAMILY = Family("qwen3_moe", ("Qwen3MoeForCausalLM",), _spec, parallel=experts.PARALLEL)
