"""The memory of a step on a GPU, derived from the tensors that `models/decoder` and its layers keep alive; of graphs and NCCL.

An upper bound, close for models with RMS norms and gated MLPs; tests compare it with the allocations of a layer. The server
itself measures instead. Pure.

T rows, H hidden channels, N query and K key/value channels, I MLP channels and E experts of this rank, A experts a token.
"""

from tpserve.models.units import MLP_UNIT, VOCAB_UNIT
from tpserve.parallel.split import HeadShare, split, split_heads
from tpserve.types.layout import ParallelLayout
from tpserve.types.model_spec import ModelSpec

WORKSPACE_BYTES = 32 << 20
"""cuBLAS's, on Hopper."""
STATE_BYTES = 64 << 20
"""The most that a cache group's plan keeps of contexts that several programs walk: `MAX_STATE_BYTES` of the kernels."""
NCCL_CHANNELS, NCCL_BUFFER_BYTES = 32, 4 << 20
"""The most channels of a communicator, and NCCL_BUFFSIZE, a channel's buffer for a peer: defaults in NCCL's documentation."""
FLOAT_BYTES = 4
INDEX_BYTES = 8
ROUTER_SEGMENT = 512
"""Channels of a term of the router's logits (`tpserve_kernels.router.SEGMENT`)."""


def activation_bytes(spec: ModelSpec, layout: ParallelLayout, rank: int, rows: int, item: int) -> int:
    """An upper bound in bytes for a step of `rows` tokens on `rank`. `item`: bytes of an element of the model's dtype."""
    tp_rank = layout.tp_rank_of(rank)
    heads = split_heads(spec.num_heads, spec.num_kv_heads, layout.tp)[tp_rank]
    stream = spec.hidden_size * item
    widest = max(5 * stream + _attention(spec, heads, item), 7 * stream + _feed_forward(spec, layout, tp_rank, item))
    return rows * (widest + 4 * INDEX_BYTES) + len(spec.cache) * STATE_BYTES + WORKSPACE_BYTES


def graph_bytes(spec: ModelSpec, layout: ParallelLayout, rank: int, rows: int, item: int) -> int:
    """An upper bound of the buffers that the graphs of decode steps of up to `rows` rows keep; they share one pool.

    What the driver keeps for each launch of a graph is not in it: NVIDIA does not document it.
    """
    vocab = 0
    if layout.stage_of(rank) == layout.pp - 1:
        vocab = len(split(spec.vocab_size, layout.tp, VOCAB_UNIT, what="vocabulary entries")[layout.tp_rank_of(rank)])
    logits = 2 * vocab * item  # what the head gives, and what the graphs leave
    return activation_bytes(spec, layout, rank, rows, item) + rows * logits


def nccl_bytes(layout: ParallelLayout, rank: int) -> int:
    """An estimate of NCCL's buffers: those of each communicator, and those for each neighbour of a pipeline."""
    communicators = (layout.world_size > 1) + (layout.tp > 1 and layout.pp > 1)
    stage = layout.stage_of(rank)
    neighbours = (stage > 0) + (stage < layout.pp - 1)
    return (communicators + neighbours) * NCCL_CHANNELS * NCCL_BUFFER_BYTES


def rotary_bytes(spec: ModelSpec, max_model_len: int) -> int:
    """Bytes of the tables of cosines and sines for all positions."""
    rope_dim = spec.head_dim if spec.latent is None else spec.latent.rope_dim
    channels = (rope.num_channels or rope_dim for rope in (spec.rope, spec.window_rope) if rope is not None)
    return max_model_len * sum(channels) * FLOAT_BYTES


def _attention(spec: ModelSpec, heads: HeadShare, item: int) -> int:
    """Bytes of one row in attention."""
    num_heads, latent = len(heads.q), spec.latent
    if latent is None:
        q, kv = num_heads * spec.head_dim, len(heads.kv) * spec.head_dim
        mixed = (2 * q + spec.hidden_size) * item  # rotated queries, attention output, output projection
        normed = (3 * q + kv) * FLOAT_BYTES if spec.qk_norm == "all" else 0
        return (q + 2 * kv) * item + max(mixed, normed)
    q, cached, taken = num_heads * spec.head_dim, latent.kv_rank + latent.rope_dim, num_heads * latent.kv_rank
    projected = (latent.q_rank or 0) + cached + q
    queries, values = num_heads * cached, num_heads * latent.v_dim
    return (projected + queries + taken + values + spec.hidden_size) * item


def _feed_forward(spec: ModelSpec, layout: ParallelLayout, tp_rank: int, item: int) -> int:
    """Bytes of one row in the feed-forward part of the widest layer."""

    def mlp(size: int) -> int:
        channels = len(split(size, layout.tp, MLP_UNIT, what="MLP channels")[tp_rank])
        per_channel = 3 * item if spec.gated else 2 * item + 3 * FLOAT_BYTES  # plain activations go through float32
        return max(channels * per_channel, (channels + spec.hidden_size) * item)  # the first product is gone before the second

    experts = spec.experts
    if experts is None:
        return mlp(spec.intermediate_size)
    size = experts.size if layout.expert_parallel else len(split(experts.size, layout.tp, MLP_UNIT, what="MLP channels")[tp_rank])
    num_active, stream = experts.routing.num_active, spec.hidden_size * item
    outputs = num_active * stream
    routed = -(-spec.hidden_size // ROUTER_SEGMENT) * (experts.count + experts.shared_gate) * FLOAT_BYTES
    shared = mlp(experts.shared_size) if experts.shared_size else 0
    mixture = num_active * 4 * FLOAT_BYTES + max(
        routed, num_active * 3 * size * item, num_active * size * item + outputs, outputs + max(shared, 2 * stream)
    )
    dense = mlp(spec.intermediate_size) if len(experts.layers) < spec.num_layers else 0
    return max(mixture, dense)
