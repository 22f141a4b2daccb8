"""The fields that many configs share: of Llama's shape (`spec`) and of GPT-2's (`plain`); a family passes what is its own."""

from typing import Any

from tpserve.models.fields import Fields
from tpserve.models.rope_fields import longest, rope_of
from tpserve.types.model_spec import CacheGroup, ModelSpec


def spec(
    fields: Fields,
    family: str,
    *,
    num_kv_heads: int,
    head_dim: int,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    honoured: tuple[str, ...] = (),
    **more: Any,
) -> ModelSpec:
    """RMS norms, rope, a gated MLP. Refuses what does not fit together and what asks for other mathematics.

    `honoured`: fields that the family reads itself though others must not have them; `more`: fields of ModelSpec.
    """
    fields.refuse_other_mathematics(honoured)
    num_heads = fields.size("num_attention_heads")
    if num_heads % num_kv_heads:
        raise fields.refuse(f"{num_heads} attention heads are no multiple of {num_kv_heads} key/value heads")
    rope = rope_of(fields, head_dim)
    return ModelSpec(
        **_vocabulary(fields, tied=False),
        **_layers(fields.size("num_hidden_layers")),
        family=family,
        hidden_size=fields.size("hidden_size"),
        intermediate_size=fields.size("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=fields.number("rms_norm_eps"),
        rope=rope,
        max_position=longest(fields, rope),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=mlp_bias,
        activation="silu",
        **more,
    )


def plain(
    fields: Fields, family: str, *, hidden_size: int, num_layers: int, num_heads: int, bias: bool, **more: Any
) -> ModelSpec:
    """Layer norms, learned positions, an MLP without a gate, as many key/value heads as heads, mostly a tied LM head."""
    fields.refuse_other_mathematics()
    if hidden_size % num_heads:
        raise fields.refuse(f"a hidden size of {hidden_size} is no multiple of {num_heads} attention heads")
    return ModelSpec(
        **_vocabulary(fields, tied=True),
        **_layers(num_layers),
        family=family,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        norm="layer",
        rope=None,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        gated=False,
        **more,
    )


def _vocabulary(fields: Fields, *, tied: bool) -> dict[str, Any]:
    bos = fields.ids("bos_token_id")
    return {
        "vocab_size": fields.size("vocab_size"),
        "tie_embeddings": fields.flag("tie_word_embeddings", tied),
        "bos_id": bos[0] if bos else None,
        "eos_ids": fields.ids("eos_token_id"),
        "dtype": fields.dtype(),
    }


def _layers(num_layers: int) -> dict[str, Any]:
    return {"num_layers": num_layers, "cache": (CacheGroup(kind="full", layers=tuple(range(num_layers))),)}


def head_dim_of(fields: Fields) -> int:
    """`head_dim` where the config names it, else the hidden size over the heads."""
    if fields.get("head_dim") is not None:
        return fields.size("head_dim")
    hidden_size, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if hidden_size % num_heads:
        raise fields.refuse(f"hidden_size {hidden_size} is no multiple of {num_heads} attention heads")
    return hidden_size // num_heads


def sliding_window_of(fields: Fields) -> int | None:
    """`sliding_window` of families in which it holds for every layer."""
    return None if fields.get("sliding_window") is None else fields.size("sliding_window")
