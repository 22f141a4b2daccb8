"""What a rank of a layout must hold, from the model's configuration alone: which layout fits is known before it is tried.

Mirrors `shard` and `decoder` in numbers, without allocating; a test holds it to what they allocate.
"""

from dataclasses import dataclass

from tpserve.models.units import MLP_UNIT, VOCAB_UNIT
from tpserve.parallel.split import HeadShare, split, split_heads
from tpserve.types.layout import ParallelLayout
from tpserve.types.model_spec import ModelSpec


@dataclass(frozen=True)
class ParamCount:
    """Elements, not bytes. `cached`: what one position of a KV block holds in all cache arrays of the rank."""

    weights: int
    cached: int


def count_params(spec: ModelSpec, layout: ParallelLayout, rank: int) -> ParamCount:
    """Of one rank. UserError when the model cannot be split so far."""
    stage, place = layout.stage_of(rank), layout.tp_rank_of(rank)
    vocab = len(split(spec.vocab_size, layout.tp, VOCAB_UNIT, what="vocabulary entries")[place])
    hidden = spec.hidden_size
    norm = hidden * spec.norm_affine * (2 if spec.norm == "layer" else 1)
    attention, cached = _attention(spec, split_heads(spec.num_heads, spec.num_kv_heads, layout.tp)[place])
    first, last = stage == 0, stage == layout.pp - 1
    width, ends = spec.embedding_size or hidden, first + last
    outside = (ends - (first and last and spec.tie_embeddings)) * vocab * width
    outside += ends * width * hidden * (spec.embedding_size is not None) + last * spec.final_norm * norm
    outside += first * (spec.rope is None) * spec.max_position * hidden
    norms = 4 if spec.norm_place == "around" else 2
    inside = sum(attention + norms * norm + _feed_forward(spec, layout, place, layer) for layer in layout.layers_of(stage))
    return ParamCount(inside + outside, num_arrays(spec, layout.layers_of(stage)) * cached)


def cache_arrays_of(spec: ModelSpec, layers: range) -> list[int]:
    """The cache array of each layer of a stage: its number among the layers of its group there.

    All groups' blocks are of one kind: a block of a group holds positions of its first layer here in array 0, and so on.
    """
    of_group = [[layer for layer in layers if layer in group.layers] for group in spec.cache]
    place = {layer: number for here in of_group for number, layer in enumerate(here)}
    return [place[layer] for layer in layers]


def num_arrays(spec: ModelSpec, layers: range) -> int:
    """As many as the group with most layers here has."""
    return max(cache_arrays_of(spec, layers)) + 1


def _attention(spec: ModelSpec, heads: HeadShare) -> tuple[int, int]:
    """Of a layer with these heads: weights, and what is cached of a position."""
    hidden, num_q, num_kv = spec.hidden_size, len(heads.q), len(heads.kv)
    q, kv, latent = num_q * spec.head_dim, num_kv * spec.head_dim, spec.latent
    if latent is None:
        few = {None: 0, "head": 2 * spec.head_dim, "all": q + kv}[spec.qk_norm] + num_q * spec.sinks
        return hidden * (2 * q + 2 * kv) + (q + 2 * kv) * spec.qkv_bias + hidden * spec.out_bias + few, 2 * kv
    cached = latent.kv_rank + latent.rope_dim
    query = hidden * q if latent.q_rank is None else latent.q_rank * (hidden + 1 + q)
    up = latent.kv_rank * (1 + num_q * (latent.nope_dim + latent.v_dim))
    return query + hidden * (cached + num_q * latent.v_dim) + up, cached


def _feed_forward(spec: ModelSpec, layout: ParallelLayout, place: int, layer: int) -> int:
    """The MLP of a layer, or its experts (whose router is few numbers, if wider ones)."""

    def channels(size: int) -> int:
        return len(split(size, layout.tp, MLP_UNIT, what="MLP channels")[place])

    hidden, experts, num_up = spec.hidden_size, spec.experts, 2 if spec.gated else 1
    if experts is None or layer not in experts.layers:
        mine = channels(spec.intermediate_size)
        return hidden * (1 + num_up) * mine + (num_up * mine + hidden) * spec.mlp_bias
    if layout.expert_parallel:
        num_outputs = len(split(experts.count, layout.tp, what="experts")[place])
        all_mine = experts.size * num_outputs
    else:
        all_mine, num_outputs = experts.count * channels(experts.size), experts.count * (place == 0)
    shared = 3 * channels(experts.shared_size) if experts.shared_size else 0
    router = hidden * (experts.count + experts.shared_gate) + experts.count * (experts.routing.bias is not None)
    return hidden * (3 * all_mine + shared) + router + (2 * all_mine + num_outputs * hidden) * experts.bias


def largest_count(spec: ModelSpec, layout: ParallelLayout) -> ParamCount:
    """The most of each that any rank holds."""
    needs = [count_params(spec, layout, rank) for rank in range(layout.world_size)]
    return ParamCount(max(n.weights for n in needs), max(n.cached for n in needs))
