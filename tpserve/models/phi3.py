"""Phi-3, Phi-3.5 and Phi-4 (text): fused projections, rope over a part of each head, longrope."""

from tpserve.models import transformer
from tpserve.models.config_fields import ConfigFields
from tpserve.models.family import Family
from tpserve.models.rope_config import rope_of
from tpserve.types.model_spec import ModelSpec
from tpserve.weights.names import WeightNames

FUSED_QKV, FUSED_GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"


def _spec(fields: ConfigFields) -> ModelSpec:
    fields.refuse_unless("attention_bias", False)
    fields.refuse_unless("mlp_bias", False)
    head_dim = transformer.head_dim_of(fields)
    return transformer.spec(
        fields,
        "phi3",
        num_kv_heads=fields.size("num_key_value_heads", fields.size("num_attention_heads")),
        head_dim=head_dim,
        windows=transformer.sliding_windows(fields),
        rope=rope_of(fields, head_dim, partial=True),
    )


FAMILY = Family(
    "phi3",
    ("Phi3ForCausalLM",),
    _spec,
    WeightNames(q=FUSED_QKV, k=FUSED_QKV, v=FUSED_QKV, gate=FUSED_GATE_UP, up=FUSED_GATE_UP),
)
