"""Builds the model's input from a plan. Reads the plan and the request pool and changes neither.

R: chunks of the step, T: rows (positions) of the step. Index arithmetic runs on the host, where the plan is. Each tensor that the
model reads goes to the device in one asynchronous copy.
"""

from dataclasses import dataclass

import torch

from tpserve.attention.metadata import AttentionMetadata, ModelInput
from tpserve.types.plan import StepPlan
from tpserve.worker.request_pool import RequestPool, as_int32, to_device


@dataclass(frozen=True)
class ChunkTensors:
    """The plan's chunks as int64 host tensors; chunk r is rows [query_starts[r], query_starts[r + 1]) of the step."""

    slots_R: torch.Tensor
    starts_R: torch.Tensor
    counts_R: torch.Tensor
    query_starts: torch.Tensor

    @staticmethod
    def of(plan: StepPlan) -> "ChunkTensors":
        """The chunks of `plan` in plan order."""
        slots_R, starts_R, counts_R = (as_int32(data).long() for data in (plan.slots, plan.starts, plan.counts))
        query_starts = torch.zeros(len(slots_R) + 1, dtype=torch.int64)
        torch.cumsum(counts_R, 0, out=query_starts[1:])
        return ChunkTensors(slots_R, starts_R, counts_R, query_starts)


def build_model_input(chunks: ChunkTensors, request_pool: RequestPool) -> ModelInput:
    """The model's input for a plan that `request_pool.update` has applied already."""
    device = request_pool.tokens.device
    slots_R, starts_R, query_starts = chunks.slots_R, chunks.starts_R, chunks.query_starts
    num_chunks = len(slots_R)
    context_R = starts_R + chunks.counts_R
    rows = int(query_starts[-1])
    if rows == num_chunks:  # all decode: one row a chunk
        chunk_T, positions_T = torch.arange(num_chunks), starts_R
    else:
        chunk_T = torch.repeat_interleave(torch.arange(num_chunks), chunks.counts_R, output_size=rows)
        positions_T = torch.arange(rows) - query_starts[chunk_T] + starts_R[chunk_T]
    row_slots_T = slots_R[chunk_T]
    query_lens, context_lens = tuple(chunks.counts_R.tolist()), tuple(context_R.tolist())
    width = -(-max(context_lens) // request_pool.block_size)
    groups = []
    for table, window in zip(request_pool.tables, request_pool.windows, strict=True):
        blocks_T = table[row_slots_T, positions_T // request_pool.block_size].long()
        groups.append(
            AttentionMetadata(
                query_starts=to_device(query_starts.int(), device),
                context_lens=to_device(context_R.int(), device),
                tables=to_device(table[slots_R, :width], device),
                write_slots=to_device(blocks_T * request_pool.block_size + positions_T % request_pool.block_size, device),
                query_lens_host=query_lens,
                context_lens_host=context_lens,
                window=window,
            )
        )
    positions_device = to_device(positions_T, device)
    return ModelInput(
        tokens_T=request_pool.tokens[to_device(row_slots_T, device), positions_device].long(),
        positions_T=positions_device,
        groups=tuple(groups),
    )
