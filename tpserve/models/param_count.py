"""Counts what each rank of a layout holds, from the model's configuration alone and without allocating anything.

Imports no torch. `rank_weights` declares the weights; this module only adds them up.
"""

from dataclasses import dataclass
from functools import lru_cache

from tpserve.models.rank_weights import RankWeights, sources_in
from tpserve.types.layout import ParallelLayout
from tpserve.types.model_spec import ModelSpec


@dataclass(frozen=True)
class ParamCount:
    """Elements, not bytes. `cached`: those of one position of a KV block, in all cache arrays of the rank; `cached_heads`: the
    heads that they belong to, of keys and of values."""

    weights: int
    cached: int
    cached_heads: int


def count_params(spec: ModelSpec, layout: ParallelLayout, rank: int) -> ParamCount:
    """The elements that `rank` holds. UserError when the model cannot be split into so many parts."""
    stage, tp_rank = layout.stage_of(rank), layout.tp_rank_of(rank)
    layers = layout.layers_of(stage)
    count = _outside_layers(spec, layout.tp, tp_rank, stage == 0, stage == layout.pp - 1)
    for layer in layers:
        # layers differ in whether they have experts; one of each kind is counted
        has_experts = spec.experts is not None and layer in spec.experts.layers
        count += _of_layer(spec, layout.tp, tp_rank, layout.expert_parallel, has_experts)
    kv = RankWeights(spec, layout.tp, tp_rank).kv_shape()
    sides, arrays = (kv.k_dim,) if kv.v_in_k else (kv.k_dim, kv.v_dim), num_arrays(spec, layers)
    return ParamCount(count, arrays * kv.num_heads * sum(sides), arrays * kv.num_heads * len(sides))


def largest_count(spec: ModelSpec, layout: ParallelLayout) -> ParamCount:
    """The largest of each number over all ranks."""
    counts = [count_params(spec, layout, rank) for rank in range(layout.world_size)]
    return ParamCount(
        max(count.weights for count in counts),
        max(count.cached for count in counts),
        max(count.cached_heads for count in counts),
    )


def cache_arrays_of(spec: ModelSpec, layers: range) -> list[int]:
    """The cache array of each layer of a stage: the layer's index among the layers of its cache group on that stage.

    Blocks of all groups have one shape: a block of a group holds positions of the group's first layer in array 0, and so on.
    """
    of_group = [[layer for layer in layers if layer in group.layers] for group in spec.cache]
    array = {layer: index for group_layers in of_group for index, layer in enumerate(group_layers)}
    return [array[layer] for layer in layers]


def num_arrays(spec: ModelSpec, layers: range) -> int:
    """Cache arrays of a stage: as many as its largest cache group has layers."""
    return max(cache_arrays_of(spec, layers)) + 1


@lru_cache(maxsize=4096)
def _outside_layers(spec: ModelSpec, tp: int, tp_rank: int, first: bool, last: bool) -> int:
    return sum(source.num_elements for source in sources_in(RankWeights(spec, tp, tp_rank).outer(first, last)))


@lru_cache(maxsize=4096)
def _of_layer(spec: ModelSpec, tp: int, tp_rank: int, expert_parallel: bool, has_experts: bool) -> int:
    with_experts = () if spec.experts is None else spec.experts.layers
    layer = next(layer for layer in range(spec.num_layers) if (layer in with_experts) == has_experts)
    return sum(source.num_elements for source in sources_in(RankWeights(spec, tp, tp_rank, expert_parallel).layer(layer)))
