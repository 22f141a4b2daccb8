"""Reads rope from config.json: `rope_parameters`, or the older `rope_theta` and `rope_scaling`. Ignores no field silently.

Reads the fields that transformers reads. If a config has both spellings, the older one counts, as there.
"""

import math

from msgspec.structs import replace

from tpserve.models.config_fields import ConfigFields
from tpserve.types.model_spec import RopeSpec

COMMON = {"rope_theta", "rope_type", "type", "factor", "partial_rotary_factor", "original_max_position_embeddings", "finetuned"}
"""Fields of any type. `finetuned` has no effect on inference."""
OF_TYPE: dict[str, set[str]] = {
    "default": set(),
    "linear": set(),
    "dynamic": set(),
    "llama3": {"low_freq_factor", "high_freq_factor"},
    "yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "attn_factor"},
    "longrope": {"attention_factor", "short_factor", "long_factor"},
}
"""The further fields of each type. transformers ignores YaRN's `attn_factor`."""


def rope_of(fields: ConfigFields, head_dim: int, *, partial: bool = False) -> RopeSpec:
    """The model's rope. UserError for a kind, a field or sizes that the decoder cannot honour.

    `partial`: whether the family may rotate only a part of a head's channels; in other families transformers rotates all of
    them, or fails.
    """
    table = _table(fields)
    kind = _kind(table)
    if unknown := sorted(table.names() - COMMON - OF_TYPE[kind]):
        raise table.refuse(f"field {unknown[0]!r} of a rope of type {kind!r} is not supported")
    part = fields.number("partial_rotary_factor", 1.0) if table.get("partial_rotary_factor") is None else None
    part = part or table.number("partial_rotary_factor")
    num_channels = int(head_dim * part)
    if num_channels != head_dim and not partial:
        raise table.refuse(f"field 'partial_rotary_factor' is {part:g}, but in this family all channels of a head turn")
    if num_channels % 2 or not 0 < num_channels <= head_dim:
        raise table.refuse(f"{num_channels} rotary channels of {head_dim}: rotary embedding turns pairs of a head's channels")
    theta = table.number("rope_theta", fields.number("rope_theta", 10000.0))
    plain = RopeSpec(theta=theta, num_channels=None if num_channels == head_dim else num_channels)
    return _scaled(kind, plain, table, fields, num_channels)


def score_factor(fields: ConfigFields, rope: RopeSpec) -> float:
    """The factor by which DeepSeek's YaRN multiplies attention scores, in addition to the rotary magnitude."""
    table = _table(fields)
    if rope.scaling != "yarn" or not table.get("mscale_all_dim"):
        return 1.0
    return _magnitude(rope.factor, table.number("mscale_all_dim")) ** 2


def longest(fields: ConfigFields, rope: RopeSpec) -> int:
    """The largest number of positions that can be served: YaRN extends the original length."""
    length = fields.size("max_position_embeddings")
    return max(length, int(rope.factor * rope.original_max_position)) if rope.scaling == "yarn" else length


def _table(fields: ConfigFields) -> ConfigFields:
    return fields.table("rope_parameters" if fields.get("rope_parameters") and not fields.get("rope_scaling") else "rope_scaling")


def _kind(table: ConfigFields) -> str:
    kind = table.get("rope_type") or table.get("type") or "default"
    if kind == "su" or (kind == "yarn" and table.get("short_factor") is not None):
        return "longrope"  # Phi-3's earlier names
    if kind not in OF_TYPE:
        raise table.refuse(f"rope type {kind!r} is not supported: supported are {', '.join(OF_TYPE)}")
    return str(kind)


def _scaled(kind: str, plain: RopeSpec, table: ConfigFields, fields: ConfigFields, num_channels: int) -> RopeSpec:
    if kind == "dynamic":
        table.number("factor")  # dynamic scaling has no effect up to max_position_embeddings, the longest that is served
        return plain
    if kind == "linear":
        return replace(plain, scaling="linear", factor=table.number("factor"))
    if kind == "default":
        return plain
    longest = fields.size("max_position_embeddings")
    original = fields.size("original_max_position_embeddings", table.size("original_max_position_embeddings", longest))
    factor = table.number("factor", longest / original)
    scaled = replace(plain, scaling=kind, factor=factor, original_max_position=original)
    if kind == "llama3":
        low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
        return replace(scaled, low_freq_factor=low, high_freq_factor=high)
    if kind == "yarn":
        return replace(
            scaled,
            beta_fast=table.number("beta_fast", 32.0),
            beta_slow=table.number("beta_slow", 1.0),
            truncate=table.over({"truncate": True}).flag("truncate"),
            magnitude=table.number("attention_factor", _yarn_magnitude(table, factor)),
        )
    if factor > 1 and original == 1:
        raise table.refuse("an original length of 1 cannot be stretched: field 'original_max_position_embeddings' must be larger")
    stretch = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return replace(
        scaled,
        short_factors=table.numbers("short_factor", num_channels // 2),
        long_factors=table.numbers("long_factor", num_channels // 2),
        magnitude=table.number("attention_factor", stretch),
    )


def _yarn_magnitude(table: ConfigFields, factor: float) -> float:
    if table.get("mscale") and table.get("mscale_all_dim"):
        return _magnitude(factor, table.number("mscale")) / _magnitude(factor, table.number("mscale_all_dim"))
    return _magnitude(factor, 1.0)


def _magnitude(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
