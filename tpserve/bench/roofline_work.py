"""What a step must at least read and compute, by the planner's own counts, and the floor of its time. Imports no torch.

Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model for multicore architectures".
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from tpserve.config.engine_config import EngineConfig
from tpserve.models.rank_weights import RankWeights
from tpserve.models.weight_bytes import HeldFormat, weight_bytes_read
from tpserve.types.model_spec import ModelSpec
from tpserve.worker.sizing import held_format, kv_bytes_read

Span = tuple[int, int]
"""(start, count): the positions of a sequence that a step computes."""


class MachineRates(msgspec.Struct, frozen=True):
    """What the machine reaches a second: bytes read from memory, and operations of a product whose operands are in cache."""

    bytes_per_s: float
    flops_per_s: float


class StepWork(msgspec.Struct, frozen=True):
    """Bytes of weights and KV cache that a step reads, each once, and the operations of its products and its attention."""

    num_bytes: int
    flops: int

    def floor_s(self, rates: MachineRates) -> float:
        """The least seconds of the step."""
        return max(self.num_bytes / rates.bytes_per_s, self.flops / rates.flops_per_s)

    def bound(self, rates: MachineRates) -> Literal["memory", "compute"]:
        """What the floor comes from."""
        return "memory" if self.num_bytes / rates.bytes_per_s >= self.flops / rates.flops_per_s else "compute"


def step_work(spec: ModelSpec, config: EngineConfig, spans: Sequence[Span], *, library: bool) -> StepWork:
    """The work of a step of one rank that computes `spans`, each of another sequence, and samples once for each.

    Of experts those of one token are read, the least that any batch reads. `library`: whether the CPU kernels serve.
    """
    layout, rows = config.layout, sum(count for _, count in spans)
    elements = weight_bytes_read(spec, layout, 0, HeldFormat("float32")) // 4
    head = spec.vocab_size * (spec.embedding_size or spec.hidden_size)
    kv_shape = RankWeights(spec, 1, 0).kv_shape()
    of_pair = 2 * spec.num_heads * (kv_shape.k_dim + kv_shape.v_dim)
    pairs = sum(_pairs(span, group.window) * len(group.layers) for group in spec.cache for span in spans)
    num_bytes = weight_bytes_read(spec, layout, 0, held_format(config, library=library))
    num_bytes += sum(kv_bytes_read(spec, config, 0, start + count, count) for start, count in spans)
    return StepWork(num_bytes, 2 * rows * (elements - head) + 2 * len(spans) * head + of_pair * pairs)


def _pairs(span: Span, window: int | None) -> int:
    """Pairs of a computed position and one that it sees, in one layer."""
    start, count = span
    if window is None:
        return count * start + count * (count + 1) // 2
    return sum(min(position + 1, window) for position in range(start, start + count))
