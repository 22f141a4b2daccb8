"""What a family of models is to tpserve: the architectures it serves, how to read its config, what its weights are called."""

from collections.abc import Callable
from dataclasses import dataclass

from tpserve.models.fields import Fields
from tpserve.types.model_spec import ModelSpec


@dataclass(frozen=True)
class WeightNames:
    """Checkpoint names. Names of a layer follow `layer`, with the layer's number in it; a projection's bias ends in .bias."""

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layer: str = "model.layers.{layer}."
    attention_norm: str = "input_layernorm.weight"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm.weight"
    k_norm: str = "self_attn.k_norm.weight"
    mlp_norm: str = "post_attention_layernorm.weight"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"


@dataclass(frozen=True)
class Family:
    """`architectures`: values of config.json's field of that name; `spec` reads the other fields."""

    name: str
    architectures: tuple[str, ...]
    spec: Callable[[Fields], ModelSpec]
    names: WeightNames = WeightNames()
