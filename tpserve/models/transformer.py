"""The fields that all Llama-shaped configs share; a family passes what is its own."""

from tpserve.models.fields import Fields
from tpserve.types.model_spec import CacheGroup, ModelSpec


def spec(
    fields: Fields,
    family: str,
    *,
    num_kv_heads: int,
    head_dim: int,
    qkv_bias: bool,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> ModelSpec:
    """Read the common fields, refuse what does not fit together and what asks for other mathematics."""
    fields.refuse_other_mathematics()
    num_heads, num_layers = fields.size("num_attention_heads"), fields.size("num_hidden_layers")
    if num_heads % num_kv_heads:
        raise fields.refuse(f"{num_heads} attention heads are no multiple of {num_kv_heads} key/value heads")
    if head_dim % 2:
        raise fields.refuse(f"a head dimension of {head_dim} is odd: rotary embedding turns pairs of channels")
    bos = fields.ids("bos_token_id")
    return ModelSpec(
        family=family,
        vocab_size=fields.size("vocab_size"),
        hidden_size=fields.size("hidden_size"),
        intermediate_size=fields.size("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=fields.number("rms_norm_eps"),
        rope=fields.rope(),
        max_position=fields.size("max_position_embeddings"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        activation="silu",
        dtype=fields.dtype(),
        bos_id=bos[0] if bos else None,
        eos_ids=fields.ids("eos_token_id"),
        cache=(CacheGroup(kind="full", layers=tuple(range(num_layers))),),
    )


def head_dim_of(fields: Fields) -> int:
    """`head_dim` where the config names it, else the hidden size over the heads."""
    if fields.get("head_dim") is not None:
        return fields.size("head_dim")
    hidden_size, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if hidden_size % num_heads:
        raise fields.refuse(f"hidden_size {hidden_size} is no multiple of {num_heads} attention heads")
    return hidden_size // num_heads
