"""The config fields that Gemma 2 and 3 share."""

from typing import Any

from tpserve.models import transformer
from tpserve.models.config_fields import ConfigFields
from tpserve.types.model_spec import ModelSpec
from tpserve.weights.names import WeightNames

DEFAULTS: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
"""Defaults for absent fields; published configs omit some."""
NAMES = WeightNames(
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)


def spec(fields: ConfigFields, family: str, *, honoured: tuple[str, ...], **more: Any) -> ModelSpec:
    """Norms around attention and MLP, their weights around 0; the embedding scaled; windows in some layers."""
    fields.refuse_unless("hidden_activation", "gelu_pytorch_tanh")
    fields.refuse_unless("use_bidirectional_attention", False)
    bias = fields.flag("attention_bias")
    return transformer.spec(
        fields,
        family,
        num_kv_heads=fields.size("num_key_value_heads"),
        head_dim=fields.size("head_dim"),
        qkv_bias=bias,
        out_bias=bias,
        activation="gelu_tanh",
        norm_offset=1.0,
        norm_place="around",
        embedding_scale=fields.size("hidden_size") ** 0.5,
        embedding_scale_rounded=True,
        attention_scale=fields.number("query_pre_attn_scalar") ** -0.5,
        honoured=(*transformer.SWITCH, "hidden_act", "query_pre_attn_scalar", *honoured),
        **more,
    )
