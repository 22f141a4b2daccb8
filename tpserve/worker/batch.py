"""A plan becomes tensors. Pure: reads the plan and the slots, changes neither.

R chunks, T rows (positions) of the step, S sampled chunks. Index arithmetic runs on the host, where the plan is; what
the model reads goes to the device in one copy per tensor and without waiting.
"""

from dataclasses import dataclass
from functools import partial

import torch

from tpserve.attention.batch import AttentionBatch, StepBatch
from tpserve.sampler.filters import Filters
from tpserve.types.plan import StepPlan
from tpserve.worker.asked import filters
from tpserve.worker.slots import Slots, as_int32, to_device

FILTERED_ROWS = 32
"""Rows filtered at once: bounds the memory of whole vocabularies side by side."""


@dataclass(frozen=True)
class Part:
    """Sampled rows that are drawn together. `filters` None: they ask for nothing but a temperature."""

    rows: torch.Tensor
    """[R] int64 on the device: indices into the sampled rows"""
    all_greedy: bool
    filters: Filters | None


@dataclass(frozen=True)
class SampleBatch:
    """The sampled chunks' side of a step; tensors on the device, S entries each."""

    chunks: torch.Tensor
    """[S] int64 on the host: index of the chunk in the plan"""
    slots: torch.Tensor
    """[S] int64"""
    positions: torch.Tensor
    """[S] int64: the position of the token to draw"""
    temperature: torch.Tensor
    """[S] float32"""
    seed: torch.Tensor
    """[S] int64, the bits of the unsigned seed"""
    choice: torch.Tensor
    """[S] int64"""
    all_greedy: bool
    parts: tuple[Part, ...]
    """All rows, each once, when some ask for filters; empty when none does."""
    num_logprobs: tuple[int | None, ...]
    """How many logprobs each asks for, on the host; empty when none does."""


def build(plan: StepPlan, slots: Slots) -> tuple[StepBatch, SampleBatch | None]:
    """The model's and the sampler's input for `plan`, whose effects on `slots` have been applied."""
    device = slots.tokens.device
    slots_R, starts_R, counts_R = (as_int32(data).long() for data in (plan.slots, plan.starts, plan.counts))
    num_chunks = len(slots_R)
    query_starts = torch.zeros(num_chunks + 1, dtype=torch.int64)
    torch.cumsum(counts_R, 0, out=query_starts[1:])
    context_R = starts_R + counts_R
    rows = int(query_starts[-1])
    if rows == num_chunks:  # all decode: one row a chunk
        chunk_T, positions_T = torch.arange(num_chunks), starts_R
    else:
        chunk_T = torch.repeat_interleave(torch.arange(num_chunks), counts_R, output_size=rows)
        positions_T = torch.arange(rows) - query_starts[chunk_T] + starts_R[chunk_T]
    row_slots_T = slots_R[chunk_T]
    query_lens, context_lens = tuple(counts_R.tolist()), tuple(context_R.tolist())
    width = -(-max(context_lens) // slots.block_size)
    groups = []
    for table in slots.tables:
        blocks_T = table[row_slots_T, positions_T // slots.block_size].long()
        groups.append(
            AttentionBatch(
                query_starts=to_device(query_starts.int(), device),
                context_lens=to_device(context_R.int(), device),
                tables=to_device(table[slots_R, :width], device),
                write_slots=to_device(blocks_T * slots.block_size + positions_T % slots.block_size, device),
                query_lens_host=query_lens,
                context_lens_host=context_lens,
            )
        )
    positions_device = to_device(positions_T, device)
    sampled = torch.frombuffer(bytearray(plan.sample), dtype=torch.uint8).nonzero().squeeze(1)
    step = StepBatch(
        tokens_T=slots.tokens[to_device(row_slots_T, device), positions_device].long(),
        positions_T=positions_device,
        groups=tuple(groups),
        sample_rows_S=to_device(query_starts[1:][sampled] - 1, device),
    )
    return step, _samples(slots, sampled, slots_R[sampled], context_R[sampled]) if len(sampled) else None


def _samples(slots: Slots, chunks: torch.Tensor, slots_S: torch.Tensor, positions_S: torch.Tensor) -> SampleBatch:
    device = slots.tokens.device
    temperature = slots.temperature[slots_S]
    wanted = tuple(slots.num_logprobs[slot] for slot in slots_S.tolist())
    return SampleBatch(
        chunks=chunks,
        slots=to_device(slots_S, device),
        positions=to_device(positions_S, device),
        temperature=to_device(temperature, device),
        seed=to_device(slots.seed[slots_S], device),
        choice=to_device(slots.choice[slots_S], device),
        all_greedy=not bool(temperature.any()),
        parts=_parts(slots, slots_S.tolist(), positions_S.tolist(), temperature),
        num_logprobs=wanted if any(n is not None for n in wanted) else (),
    )


def _parts(slots: Slots, slot_S: list[int], position_S: list[int], temperature: torch.Tensor) -> tuple[Part, ...]:
    """Rows that ask for filters apart from those that do not, in groups of bounded size."""
    place = partial(to_device, device=slots.tokens.device)
    asked = [
        it if (it := slots.asked[slot]) is not None and it.anything(position) else None
        for slot, position in zip(slot_S, position_S, strict=True)
    ]
    filtered = [i for i, it in enumerate(asked) if it is not None]
    if not filtered:
        return ()
    parts = []
    if plain := [i for i, it in enumerate(asked) if it is None]:
        parts.append(Part(place(torch.tensor(plain)), not bool(temperature[plain].any()), None))
    for start in range(0, len(filtered), FILTERED_ROWS):
        rows = filtered[start : start + FILTERED_ROWS]
        wanted = filters([it for i in rows if (it := asked[i]) is not None], [position_S[i] for i in rows], place)
        parts.append(Part(place(torch.tensor(rows)), not bool(temperature[rows].any()), wanted))
    return tuple(parts)
