"""What a rank of a layout must hold, from the model's configuration alone: which layout fits is known before it is tried.

Mirrors `shard` and `decoder` in numbers, without allocating; a test holds it to what they allocate.
"""

from dataclasses import dataclass

from tpserve.models.units import MLP_UNIT, VOCAB_UNIT
from tpserve.parallel.split import split, split_heads
from tpserve.types.layout import ParallelLayout
from tpserve.types.model_spec import ModelSpec


@dataclass(frozen=True)
class Need:
    """Elements, not bytes. `cached`: keys and values of one token in all layers of the rank."""

    weights: int
    cached: int


def need(spec: ModelSpec, layout: ParallelLayout, rank: int) -> Need:
    """Of one rank. UserError when the model cannot be split so far."""
    stage, place = layout.stage_of(rank), layout.tp_rank_of(rank)
    heads = split_heads(spec.num_heads, spec.num_kv_heads, layout.tp)[place]
    vocab = len(split(spec.vocab_size, layout.tp, VOCAB_UNIT, what="vocabulary entries")[place])
    hidden, num_layers = spec.hidden_size, layout.layers[stage]
    q, kv = len(heads.q) * spec.head_dim, len(heads.kv) * spec.head_dim
    norm = hidden * spec.norm_affine * (2 if spec.norm == "layer" else 1)
    layer = hidden * (2 * q + 2 * kv) + 2 * norm + (q + 2 * kv) * spec.qkv_bias + hidden * spec.out_bias
    layer += {None: 0, "head": 2 * spec.head_dim, "all": q + kv}[spec.qk_norm]
    first, last = stage == 0, stage == layout.pp - 1
    width, ends = spec.embedding_size or hidden, first + last
    outside = (ends - (first and last and spec.tie_embeddings)) * vocab * width
    outside += ends * width * hidden * (spec.embedding_size is not None) + last * spec.final_norm * norm
    outside += first * (spec.rope is None) * spec.max_position * hidden
    inside = num_layers * layer + sum(_feed_forward(spec, layout, place, number) for number in layout.layers_of(stage))
    return Need(inside + outside, num_layers * 2 * kv)


def _feed_forward(spec: ModelSpec, layout: ParallelLayout, place: int, layer: int) -> int:
    """The MLP of a layer, or its experts (whose router is few numbers, if wider ones)."""

    def channels(size: int) -> int:
        return len(split(size, layout.tp, MLP_UNIT, what="MLP channels")[place])

    hidden, experts, num_up = spec.hidden_size, spec.experts, 2 if spec.gated else 1
    if experts is None or layer not in experts.layers:
        mine = channels(spec.intermediate_size)
        return hidden * (1 + num_up) * mine + (num_up * mine + hidden) * spec.mlp_bias
    if layout.expert_parallel:
        all_mine = experts.size * len(split(experts.count, layout.tp, what="experts")[place])
    else:
        all_mine = experts.count * channels(experts.size)
    shared = 3 * channels(experts.shared_size) + 1 if experts.shared_size else 0
    return hidden * (3 * all_mine + experts.count + shared)


def largest(spec: ModelSpec, layout: ParallelLayout) -> Need:
    """The most of each that any rank holds."""
    needs = [need(spec, layout, rank) for rank in range(layout.world_size)]
    return Need(max(n.weights for n in needs), max(n.cached for n in needs))
