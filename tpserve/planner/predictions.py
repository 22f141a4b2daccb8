"""What a decode step of one rank launches, reads and computes, kernel by kernel, as counted from the model alone. Pure.

Predictions: nothing here was measured. Launches are those of the simulated card (`tests/card/test_launches.py` compares them).
Bytes are those that a kernel must move between the card's memory and its cores at least: weights and cached keys and values once,
activations once in and once out. Operations are those of products and attention, a multiplication and an addition each counted.

T rows (sequences), H hidden channels; bytes and operations are of all layers of the rank together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tpserve.config.engine_config import EngineConfig
from tpserve.models.rank_weights import RankWeights
from tpserve.models.units import MLP_UNIT
from tpserve.models.weight_bytes import ITEM_BYTES
from tpserve.parallel.split import split
from tpserve.types.model_spec import ExpertsSpec, ModelSpec
from tpserve.worker.sizing import kv_bytes_read

FLOAT_BYTES = 4
BATCHES = (1, 32, 256)


@dataclass(frozen=True)
class KernelWork:
    """One kernel's part of a step. `launches`: over all layers."""

    name: str
    launches: int
    num_bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class StepPrediction:
    """A decode step of `batch` sequences on `rank`."""

    rank: int
    batch: int
    kernels: tuple[KernelWork, ...]


def predict(spec: ModelSpec, config: EngineConfig, rank: int, batch: int, context: int) -> tuple[KernelWork, ...]:
    """A decode step of `batch` sequences, each of `context` tokens. One entry for each kernel, in order of their first launch."""
    by_name: dict[str, list[KernelWork]] = {}
    for work in _StepModel(spec, config, rank, batch, context).kernels():
        by_name.setdefault(work.name, []).append(work)
    return tuple(total(works, name) for name, works in by_name.items())


def total(kernels: Sequence[KernelWork], name: str = "all") -> KernelWork:
    """The sum of some kernels."""
    return KernelWork(
        name,
        sum(kernel.launches for kernel in kernels),
        sum(kernel.num_bytes for kernel in kernels),
        sum(kernel.flops for kernel in kernels),
    )


class _StepModel:
    """The launches of one step, in order."""

    def __init__(self, spec: ModelSpec, config: EngineConfig, rank: int, batch: int, context: int) -> None:
        layout = config.layout
        self._spec, self._config, self._rank = spec, config, rank
        self._rows, self._context = batch, context
        self._item = ITEM_BYTES[config.dtype]
        self._tp, self._tp_rank, self._stage = layout.tp, layout.tp_rank_of(rank), layout.stage_of(rank)
        self._layers = layout.layers_of(self._stage)
        self._first, self._last = self._stage == 0, self._stage == layout.pp - 1
        weights = RankWeights(spec, self._tp, self._tp_rank, layout.expert_parallel)
        self._num_heads, self._num_kv, self._vocab = len(weights.heads.q), len(weights.heads.kv), len(weights.vocab)
        self._kv_shape = weights.kv_shape()

    def kernels(self) -> Iterator[KernelWork]:
        spec, stream = self._spec, self._activations(self._spec.hidden_size)
        yield KernelWork("step inputs", 2)  # edits of the request pool, the rows
        yield KernelWork("attention plan", len(spec.cache))
        if self._first:
            yield from self._embedding()
        for layer in self._layers:
            yield from self._norms(layer == self._layers[0] and self._first)
            yield from self._attention(layer) if spec.latent is None else self._latent_attention(layer)
            yield from self._sum()
            if spec.experts is not None and layer in spec.experts.layers:
                yield from self._mixture(spec.experts)
            else:
                yield from self._mlp(spec.intermediate_size)
            yield from self._sum()
        sums = {"before": 1, "around": 1, "output": 2 * len(self._layers), "after": 2 * len(self._layers)}[spec.norm_place]
        if spec.norm_place == "around":
            yield KernelWork("norms", 1, 2 * stream)
        yield KernelWork("residual", sums, 3 * sums * stream)
        if self._last:
            yield from self._head()
        links = (not self._first) + (not self._last)
        if links:
            yield KernelWork("pipeline link", links, links * stream)

    def _activations(self, channels: int) -> int:
        """Bytes of one tensor of the step's rows."""
        return self._rows * channels * self._item

    def _product(self, outputs: int, inner: int, name: str = "products", matrices: int = 1) -> KernelWork:
        """x [T, inner] times a weight [outputs, inner], `matrices` of them in one launch."""
        weights = outputs * inner * self._item
        moved = self._activations(outputs + inner)
        return KernelWork(name, 1, matrices * (weights + moved), 2 * matrices * self._rows * outputs * inner)

    def _embedding(self) -> Iterator[KernelWork]:
        width = self._spec.embedding_size or self._spec.hidden_size
        yield KernelWork("embedding", 1, 2 * self._activations(width))
        if self._spec.embedding_scale != 1:
            yield KernelWork("embedding", 1, 2 * self._activations(width))
        if self._spec.rope is None:
            yield KernelWork("embedding", 2, 5 * self._activations(self._spec.hidden_size))
        if self._spec.embedding_size is not None:
            yield self._product(self._spec.hidden_size, width)

    def _norms(self, first: bool) -> Iterator[KernelWork]:
        """Those of one layer: with the residual two tensors in and two out. The norm of an output is in the launch after it."""
        stream, place = self._activations(self._spec.hidden_size), self._spec.norm_place
        with_residual = place in ("before", "around")
        yield KernelWork("norms", 2, (4 if not with_residual else 6 if first else 8) * stream)
        if self._spec.residual_scale != 1:
            yield KernelWork("residual", 2, 4 * stream)

    def _attention(self, layer: int) -> Iterator[KernelWork]:
        spec = self._spec
        q, kv = self._num_heads * spec.head_dim, self._num_kv * spec.head_dim
        yield self._product(q + 2 * kv, spec.hidden_size)
        if spec.qk_norm == "all":
            yield KernelWork("norms", 2, 2 * self._activations(q + kv))
        yield KernelWork("rotation and KV write", 1, 2 * self._activations(q + 2 * kv))
        yield from self._attend(layer)
        yield self._product(spec.hidden_size, q)

    def _latent_attention(self, layer: int) -> Iterator[KernelWork]:
        spec, latent, heads = self._spec, self._spec.latent, self._num_heads
        assert latent is not None
        cached = latent.kv_rank + latent.rope_dim
        yield self._product((latent.q_rank or heads * spec.head_dim) + cached, spec.hidden_size)
        if latent.q_rank is not None:
            yield KernelWork("norms", 1, 2 * self._activations(latent.q_rank))
            yield self._product(heads * spec.head_dim, latent.q_rank)
        yield self._product(latent.kv_rank, latent.nope_dim, matrices=heads)
        yield KernelWork("rotation and KV write", 1, 2 * self._activations(cached + heads * latent.rope_dim))
        yield from self._attend(layer)
        yield self._product(latent.v_dim, latent.kv_rank, matrices=heads)
        yield self._product(spec.hidden_size, heads * latent.v_dim)

    def _attend(self, layer: int) -> Iterator[KernelWork]:
        """Reads what each sequence sees, once for all heads that share it."""
        shape, group = self._kv_shape, next(group for group in self._spec.cache if layer in group.layers)
        seen = self._context if group.window is None else min(self._context, group.window)
        in_all = kv_bytes_read(self._spec, self._config, self._rank, self._context)
        per_context = sum(
            self._context if each.window is None else min(self._context, each.window)
            for each in self._spec.cache
            for inside in each.layers
            if inside in self._layers
        )
        width = shape.k_dim + shape.v_dim
        read = self._rows * in_all * seen // per_context + self._activations(self._num_heads * width)
        yield KernelWork("attention", 2, read, 2 * self._rows * seen * self._num_heads * width)  # and the merge

    def _mlp(self, size: int) -> Iterator[KernelWork]:
        channels = len(split(size, self._tp, MLP_UNIT, what="MLP channels")[self._tp_rank])
        yield self._product(channels * (2 if self._spec.gated else 1), self._spec.hidden_size)
        yield KernelWork("activation", 1, self._activations(channels * (3 if self._spec.gated else 2)))
        yield self._product(self._spec.hidden_size, channels)

    def _mixture(self, experts: ExpertsSpec) -> Iterator[KernelWork]:
        """Reads the experts that a batch picks when it picks each with equal chance: expected, so bytes are rounded."""
        spec, active = self._spec, experts.routing.num_active
        by_experts = self._config.layout.expert_parallel
        local, channels = experts.count, experts.size
        if by_experts:
            local = len(split(experts.count, self._tp, what="experts")[self._tp_rank])
        else:
            channels = len(split(experts.size, self._tp, MLP_UNIT, what="MLP channels")[self._tp_rank])
        picked = local * (1 - (1 - active / experts.count) ** self._rows)
        pairs = self._rows * active * local / experts.count
        hidden, item, rows = spec.hidden_size, self._item, self._rows
        logits = experts.count + experts.shared_gate
        router = logits * hidden * FLOAT_BYTES + self._activations(hidden)
        yield KernelWork("routing", 3, router + 4 * rows * logits * FLOAT_BYTES, 2 * rows * logits * hidden)
        for outputs, inner in ((2 * channels, hidden), (hidden, channels)):
            moved = round(item * (picked * outputs * inner + pairs * (outputs + inner)))
            yield KernelWork("experts", 1, moved, round(2 * pairs * outputs * inner))
        yield KernelWork("activation", 1, round(item * pairs * 3 * channels))
        yield KernelWork("experts", 1, round(item * (pairs + rows) * hidden))  # the weighted sum
        if experts.shared_size:
            yield from self._mlp(experts.shared_size)

    def _sum(self) -> Iterator[KernelWork]:
        """The all-reduce that closes a half of a layer, on the link."""
        if self._tp > 1:
            yield KernelWork("all-reduce", 1, 2 * self._activations(self._spec.hidden_size))

    def _head(self) -> Iterator[KernelWork]:
        spec, width = self._spec, self._spec.embedding_size or self._spec.hidden_size
        if spec.final_norm:
            yield KernelWork("norms", 1, 2 * self._activations(spec.hidden_size))
        if spec.embedding_size is not None:
            yield self._product(width, spec.hidden_size)
        yield self._product(self._vocab, width, "LM head")
        logits = self._activations(self._vocab)
        yield KernelWork("draw", 3 + (self._tp > 1), 3 * logits)  # a copy for rows with filters; the largest of blocks; the token
        if self._tp > 1:
            yield KernelWork("all-gather", 1, self._tp * self._rows * 2 * FLOAT_BYTES)
