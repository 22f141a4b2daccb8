"""Builds the model's input from a plan on the CPU; `device_input` does on a card. Changes neither plan nor request pool.

R: chunks of the step, T: rows (positions) of the step. Index arithmetic is plain Python, where the plan is: a tensor operation
costs as much as dozens of integers.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from tpserve.attention.metadata import AttentionMetadata, ModelInput
from tpserve.types.packed import unpack
from tpserve.types.plan import StepPlan
from tpserve.worker.host_arrays import copy_arrays
from tpserve.worker.request_pool import BlockTables, RequestPool


@dataclass(frozen=True)
class ChunkArrays:
    """The plan's chunks on the host: chunk r computes positions [starts[r], ends[r]) of the sequence in slots[r].

    Its rows of the step are [query_starts[r], query_starts[r + 1]).
    """

    slots: Sequence[int]
    starts: Sequence[int]
    counts: Sequence[int]
    ends: Sequence[int]
    query_starts: Sequence[int]
    """R + 1 integers"""

    @staticmethod
    def of(plan: StepPlan) -> "ChunkArrays":
        """The chunks of `plan` in plan order."""
        slots, starts, counts = unpack(plan.slots), unpack(plan.starts), unpack(plan.counts)
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        return ChunkArrays(slots, starts, counts, ends, list(accumulate(counts, initial=0)))

    @property
    def num_rows(self) -> int:
        """T."""
        return self.query_starts[-1]


def build_model_input(chunks: ChunkArrays, request_pool: RequestPool) -> ModelInput:
    """The model's input on the CPU for a plan that `request_pool.update` has applied already."""
    if chunks.num_rows == len(chunks.slots):  # all decode: one row a chunk
        positions, row_slots = array("q", chunks.starts), array("q", chunks.slots)
    else:
        positions, row_slots = array("q"), array("q")
        for slot, start, end in zip(chunks.slots, chunks.starts, chunks.ends, strict=True):
            positions.extend(range(start, end))
            row_slots.extend([slot] * (end - start))
    width = -(-max(chunks.ends) // request_pool.block_size)
    arrays: list[array[int]] = [positions, row_slots, array("i", chunks.query_starts), array("i", chunks.ends)]
    for tables in request_pool.tables:
        assert isinstance(tables, BlockTables), "a request pool on the CPU"
        arrays += _write_slots(tables, chunks), tables.rows(chunks.slots, width)
    positions_T, row_slots_T, query_starts, context_lens, *of_groups = copy_arrays(arrays, request_pool.tokens.device)
    query_lens_host, context_lens_host = tuple(chunks.counts), tuple(chunks.ends)
    groups = tuple(
        AttentionMetadata(
            query_starts=query_starts,
            context_lens=context_lens,
            tables=of_groups[2 * group + 1].view(len(chunks.slots), width),
            write_slots=of_groups[2 * group],
            query_lens_host=query_lens_host,
            context_lens_host=context_lens_host,
            window=window,
        )
        for group, window in enumerate(request_pool.windows)
    )
    return ModelInput(request_pool.tokens[row_slots_T, positions_T].long(), positions_T, groups)


def _write_slots(tables: BlockTables, chunks: ChunkArrays) -> "array[int]":
    """Where each row's key and value go: block * block_size + entry. T integers."""
    size, blocks = tables.block_size, tables.blocks
    result = array("q")
    for slot, start, end in zip(chunks.slots, chunks.starts, chunks.ends, strict=True):
        first = slot * tables.width
        while start < end:
            entry = start % size
            count = min(end - start, size - entry)
            at = blocks[first + start // size] * size + entry
            if count == 1:
                result.append(at)
            else:
                result.extend(range(at, at + count))
            start += count
    return result
