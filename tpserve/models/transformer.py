"""Reads the config fields that many families share: Llama's shape (`spec`) and GPT-2's (`plain`). Families pass the rest."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from tpserve.models.config_fields import ConfigFields
from tpserve.models.rope_config import longest, rope_of
from tpserve.types.model_spec import CacheGroup, LatentSpec, ModelSpec, RopeSpec

SLIDING, FULL = "sliding_attention", "full_attention"
SWITCH = ("use_sliding_window",)
"""The field that switches windows on, in families that have it."""


def spec(
    fields: ConfigFields,
    family: str,
    *,
    num_kv_heads: int,
    head_dim: int,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    windows: Sequence[int | None] = (),
    rope: RopeSpec | None = None,
    window_rope: RopeSpec | None = None,
    activation: Literal["silu", "gelu_tanh"] = "silu",
    latent: LatentSpec | None = None,
    honoured: tuple[str, ...] = (),
    **more: Any,
) -> ModelSpec:
    """A model with RMS norms, rope and a gated MLP. UserError for inconsistent fields and for other mathematics.

    `windows`: the window of each layer in positions, or None; empty when no layer has one. `rope`: given by families that
    read it themselves. `honoured`: fields of `NEUTRAL` that the family reads itself. `more`: fields of ModelSpec.
    """
    fields.refuse_other_mathematics(honoured)
    num_heads = fields.size("num_attention_heads")
    if num_heads % num_kv_heads:
        raise fields.refuse(f"{num_heads} attention heads are no multiple of {num_kv_heads} key/value heads")
    rope = rope or rope_of(fields, head_dim if latent is None else latent.rope_dim)
    num_layers, max_position = fields.size("num_hidden_layers"), longest(fields, rope)
    windows = windows or [None] * num_layers
    refuse_other_layers(fields, windows, max_position)
    if window_rope is None:  # with two ropes, a window also selects the layer's rope
        windows = [None if window is None or window >= max_position else window for window in windows]
    return ModelSpec(
        **_vocabulary(fields, tied=False),
        num_layers=num_layers,
        cache=cache_groups(windows),
        family=family,
        hidden_size=fields.size("hidden_size"),
        intermediate_size=fields.size("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=fields.number("rms_norm_eps"),
        rope=rope,
        window_rope=window_rope,
        max_position=max_position,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=mlp_bias,
        activation=activation,
        latent=latent,
        **more,
    )


def plain(
    fields: ConfigFields, family: str, *, hidden_size: int, num_layers: int, num_heads: int, bias: bool, **more: Any
) -> ModelSpec:
    """A model with layer norms, learned positions, a plain MLP and multi-head attention; by default with a tied LM head."""
    fields.refuse_other_mathematics()
    refuse_other_layers(fields, [None] * num_layers)
    if hidden_size % num_heads:
        raise fields.refuse(f"a hidden size of {hidden_size} is no multiple of {num_heads} attention heads")
    return ModelSpec(
        **_vocabulary(fields, tied=True),
        num_layers=num_layers,
        cache=cache_groups([None] * num_layers),
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


def _vocabulary(fields: ConfigFields, *, tied: bool) -> dict[str, Any]:
    bos = fields.ids("bos_token_id")
    return {
        "vocab_size": fields.size("vocab_size"),
        "tie_embeddings": fields.flag("tie_word_embeddings", tied),
        "bos_id": bos[0] if bos else None,
        "eos_ids": fields.ids("eos_token_id"),
        "dtype": fields.dtype(),
    }


def cache_groups(windows: Sequence[int | None]) -> tuple[CacheGroup, ...]:
    """Group the layers by window, in groups of about equal size, also on every pipeline stage. `windows`: one a layer.

    All groups share one pool of blocks, so a small group would waste most of each block. The layers of a window are dealt in
    turn to n groups; n is their number divided by the number of layers of the rarest window, rounded half up.
    """
    kinds = {window: [i for i, other in enumerate(windows) if other == window] for window in windows}
    fewest = min(map(len, kinds.values()))
    groups = []
    for window, layers in kinds.items():
        count = (2 * len(layers) + fewest) // (2 * fewest)
        groups += [CacheGroup(tuple(layers[first::count]), window) for first in range(count)]
    return tuple(groups)


def head_dim_of(fields: ConfigFields) -> int:
    """`head_dim` where the config names it, else the hidden size over the heads."""
    if fields.get("head_dim") is not None:
        return fields.size("head_dim")
    hidden_size, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if hidden_size % num_heads:
        raise fields.refuse(f"hidden_size {hidden_size} is no multiple of {num_heads} attention heads")
    return hidden_size // num_heads


def window_of(fields: ConfigFields) -> int | None:
    """`sliding_window`, in positions; None where it is absent or null."""
    return None if fields.get("sliding_window") is None else fields.size("sliding_window")


def sliding_windows(fields: ConfigFields) -> tuple[int | None, ...]:
    """The windows of families whose `sliding_window` applies to every layer."""
    return (window_of(fields),) * fields.size("num_hidden_layers")


def layer_windows(fields: ConfigFields, has_window: Callable[[int], bool]) -> tuple[int | None, ...]:
    """The windows of the layers that `layer_types` marks as sliding or, without that field, `has_window`.

    UserError when a layer is sliding and `sliding_window` is absent.
    """
    num_layers = fields.size("num_hidden_layers")
    kinds = layer_kinds(fields, num_layers) or [SLIDING if has_window(layer) else FULL for layer in range(num_layers)]
    window = fields.size("sliding_window") if SLIDING in kinds else None
    return tuple(window if kind == SLIDING else None for kind in kinds)


def switched_windows(fields: ConfigFields, has_window: Callable[[int], bool]) -> tuple[int | None, ...]:
    """As `layer_windows`, for families in which `use_sliding_window` switches windows on; empty when it is off."""
    if fields.flag("use_sliding_window"):
        return layer_windows(fields, has_window)
    if SLIDING in (layer_kinds(fields, fields.size("num_hidden_layers")) or []):
        raise fields.refuse(f"field 'layer_types' names {SLIDING!r}, which 'use_sliding_window' switches off")
    return ()


def from_layer(fields: ConfigFields) -> Callable[[int], bool]:
    """The rule that the first `max_window_layers` layers have no window."""
    first, window = fields.count("max_window_layers", 28), window_of(fields)
    return lambda layer: window is not None and layer >= first


def layer_kinds(fields: ConfigFields, num_layers: int) -> list[str] | None:
    """`layer_types`, None where it is absent or null. UserError unless it names a supported kind for each layer."""
    kinds = fields.get("layer_types")
    if kinds is None:
        return None
    odd = [kind for kind in kinds if kind not in (SLIDING, FULL)] if isinstance(kinds, list) else [kinds]
    if odd or len(kinds) != num_layers:
        what = f"{odd[0]!r:.80}" if odd else f"{len(kinds)}"
        raise fields.refuse(f"field 'layer_types' must name {num_layers} layers {SLIDING!r} or {FULL!r}, not {what}")
    return list(kinds)


def refuse_other_layers(fields: ConfigFields, windows: Sequence[int | None], max_position: int | None = None) -> None:
    """Raise UserError for `layer_types` that contradict `windows`, in families that do not read the field.

    Windows of `max_position` or more positions never limit a sequence, so either kind is accepted for them.
    """
    for layer, kind in enumerate(layer_kinds(fields, len(windows)) or []):
        window = windows[layer]
        if kind == SLIDING and window is None:
            raise fields.refuse(f"field 'layer_types' names {SLIDING!r} for layer {layer}, which has no window in this family")
        if kind == FULL and window is not None and (max_position is None or window < max_position):
            raise fields.refuse(
                f"field 'layer_types' names {FULL!r} for layer {layer}, but in this family 'sliding_window' ({window}) holds for "
                "every layer: set the one or the other to null"
            )
