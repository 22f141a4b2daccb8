"""The bytes that a rank's weights take after loading, counted from the declarations of `rank_weights`. Imports no torch.

`held_bytes` adds up the same from the tensors themselves.

    GPU, float16, or a CPU without the library    plain tensors
    CPU kernels, float32 and bfloat16             matrices of products in their packed form
    --quantization int8                           those of the layers in int8, with int8-head the LM head, too
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from math import prod
from typing import Any, Literal

from msgspec.structs import replace

from tpserve.models.rank_weights import HEAD, PLAIN, Form, OuterWeights, RankWeights, Sources, form_of
from tpserve.types.layout import ParallelLayout
from tpserve.types.model_spec import LatentSpec, ModelSpec
from tpserve.weights.source import Source
from tpserve_kernels.cpu.packed_size import packed_bytes, packed_int8_bytes

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1}
FLOAT_BYTES = 4


@dataclass(frozen=True)
class HeldFormat:
    """How a server holds weights. `dtype`: the model's; `packed`: whether the library of CPU kernels serves."""

    dtype: Literal["bfloat16", "float16", "float32"]
    packed: bool = False
    quantization: Literal["int8", "int8-head"] | None = None

    def num_bytes(self, form: Form, count: int, outputs: int, inner: int) -> int:
        """Bytes of `count` matrices [outputs, inner] of one parameter."""
        item = FLOAT_BYTES if form.float32 else ITEM_BYTES[self.dtype]
        if not self.packed or not form.packed or (self.dtype == "float16" and not form.float32):
            return item * count * outputs * inner
        if self.quantization is not None and self.quantization in form.int8:
            return count * packed_int8_bytes(outputs, inner)
        return count * packed_bytes(item, outputs, inner)


def weight_bytes(spec: ModelSpec, layout: ParallelLayout, rank: int, held_format: HeldFormat) -> int:
    """Bytes of all weights of `rank`. UserError when the model cannot be split into so many parts."""
    stage, tp_rank = layout.stage_of(rank), layout.tp_rank_of(rank)
    total = _outside_layers(spec, layout.tp, tp_rank, stage == 0, stage == layout.pp - 1, held_format)
    for layer in layout.layers_of(stage):
        has_experts = spec.experts is not None and layer in spec.experts.layers
        total += _of_layer(spec, layout.tp, tp_rank, layout.expert_parallel, has_experts, held_format)
    return total


def largest_weight_bytes(spec: ModelSpec, layout: ParallelLayout, held_format: HeldFormat) -> int:
    """Bytes of the weights of the rank that has most."""
    return max(weight_bytes(spec, layout, rank, held_format) for rank in range(layout.world_size))


def weight_bytes_read(spec: ModelSpec, layout: ParallelLayout, rank: int, held_format: HeldFormat) -> int:
    """Bytes of the weights of a rank that one token reads: its active experts only, and almost nothing of embedding tables."""
    experts = spec.experts
    if experts is not None:
        active = experts.routing.num_active  # with expert parallelism the busiest rank has at least its share of them
        count = -(-active // layout.tp) * layout.tp if layout.expert_parallel else active
        spec = replace(spec, experts=replace(experts, count=min(count, experts.count)))
    return weight_bytes(spec, layout, rank, held_format) - _table_bytes(spec, layout, rank, held_format)


def _table_bytes(spec: ModelSpec, layout: ParallelLayout, rank: int, held_format: HeldFormat) -> int:
    """Bytes of the tables of embeddings and positions that are no part of the LM head: a step reads single rows of them."""
    stage = layout.stage_of(rank)
    weights = RankWeights(spec, layout.tp, layout.tp_rank_of(rank))
    outer = weights.outer(stage == 0, stage == layout.pp - 1)
    tables = [outer.positions]
    if not _is_head(outer, last=stage == layout.pp - 1):
        tables.append(outer.embedding)
    return sum(_bytes_of(held_format, PLAIN, sources) for sources in tables if sources is not None)


def _is_head(outer: OuterWeights, *, last: bool) -> bool:
    """Whether the stage's embedding is its LM head."""
    return last and outer.head is None


@lru_cache(maxsize=4096)
def _outside_layers(spec: ModelSpec, tp: int, tp_rank: int, first: bool, last: bool, held_format: HeldFormat) -> int:
    outer = RankWeights(spec, tp, tp_rank).outer(first, last)
    total = sum(_declared_bytes(held_format, outer))
    if outer.embedding is not None and _is_head(outer, last=last):
        total += _bytes_of(held_format, HEAD, outer.embedding) - _bytes_of(held_format, PLAIN, outer.embedding)
    return total


@lru_cache(maxsize=4096)
def _of_layer(spec: ModelSpec, tp: int, tp_rank: int, expert_parallel: bool, has_experts: bool, held_format: HeldFormat) -> int:
    # layers differ in whether they have experts; one of each kind is counted
    with_experts = () if spec.experts is None else spec.experts.layers
    layer = next(layer for layer in range(spec.num_layers) if (layer in with_experts) == has_experts)
    declared = RankWeights(spec, tp, tp_rank, expert_parallel).layer(layer)
    return sum(_declared_bytes(held_format, declared, spec.latent))


def _declared_bytes(held_format: HeldFormat, declared: Any, latent: LatentSpec | None = None) -> Iterator[int]:
    """Bytes of each parameter of a declaration, nested ones included."""
    for field in fields(declared):
        value, form = getattr(declared, field.name), form_of(field)
        if is_dataclass(value):
            yield from _declared_bytes(held_format, value, latent)
        elif isinstance(value, tuple) and form.stacked == "heads":
            assert latent is not None, "latents have matrices of heads"
            num_heads = _rows(value) // (latent.nope_dim + latent.v_dim)
            yield held_format.num_bytes(form, num_heads, latent.kv_rank, latent.nope_dim)
            yield held_format.num_bytes(form, num_heads, latent.v_dim, latent.kv_rank)
        elif isinstance(value, tuple):
            yield _bytes_of(held_format, form, value, len(declared.local_experts) if form.stacked == "experts" else 1)


def _bytes_of(held_format: HeldFormat, form: Form, sources: Sources, count: int = 1) -> int:
    inner = prod(_as_parameter(sources[0])[1:])
    return held_format.num_bytes(form, count, _rows(sources) // count, inner)


def _rows(sources: Sources) -> int:
    return sum(_as_parameter(source)[0] for source in sources)


def _as_parameter(source: Source) -> tuple[int, ...]:
    """The shape of a source's part of its parameter."""
    return source.shard[::-1] if source.transposed else source.shard
