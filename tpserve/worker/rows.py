"""Which rows of a step the LM head sees, what for, and how many of them at once. Pure, like `batch`; the last stage's only.

Rows go through the LM head, the draw, its filters and the log probabilities in groups of as many as `AtOnce` allows: rows that
ask for filters apart from those that do not, prompt tokens to score apart from both.

S sampled rows of a group, N scored rows of the step, C chunks that score.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from tpserve.sampler.filters import Filters
from tpserve.types.plan import StepPlan
from tpserve.worker.asked import Asked, filters
from tpserve.worker.at_once import AtOnce
from tpserve.worker.batch import Chunks
from tpserve.worker.slots import Slots, to_device


@dataclass(frozen=True)
class SampleBatch:
    """Chunks whose tokens are drawn together; tensors on the device, S entries each."""

    chunks: tuple[int, ...]
    """Indices of the chunks in the plan"""
    rows: torch.Tensor
    """[S] int64: the rows of the step whose logits are wanted"""
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
    filters: Filters | None
    """None: the rows ask for nothing but a temperature."""
    num_logprobs: tuple[int | None, ...]
    """How many logprobs each asks for; empty when none does."""


@dataclass(frozen=True)
class ScoreBatch:
    """Rows whose next token is of the prompt already; tensors on the device, N entries each, chunk after chunk."""

    chunks: tuple[int, ...]
    """Indices of the chunks in the plan, those that score at least one token"""
    counts: tuple[int, ...]
    """How many rows each has"""
    num_top: tuple[int, ...]
    """How many of the most likely tokens each asks for"""
    rows: torch.Tensor
    """[N] int64: rows of the step"""
    slots: torch.Tensor
    """[N] int64"""
    positions: torch.Tensor
    """[N] int64: the position of the token to score"""


def sampled(plan: StepPlan, chunks: Chunks, slots: Slots, at_once: AtOnce) -> list[SampleBatch]:
    """The chunks that draw, each in one batch."""
    ends_R = (chunks.starts_R + chunks.counts_R).tolist()
    plain: list[int] = []
    filtered: list[tuple[int, Asked]] = []
    for chunk, slot in enumerate(chunks.slots_R.tolist()):
        if plan.sample[chunk]:
            asked = slots.asked[slot]
            if asked is not None and asked.anything(ends_R[chunk]):
                filtered.append((chunk, asked))
            else:
                plain.append(chunk)
    batches = [_sample_batch(plain[at : at + at_once.plain], chunks, slots, None) for at in range(0, len(plain), at_once.plain)]
    place = partial(to_device, device=slots.tokens.device)
    for at in range(0, len(filtered), at_once.filtered):
        indices, asked_S = zip(*filtered[at : at + at_once.filtered], strict=True)
        batches.append(_sample_batch(indices, chunks, slots, filters(asked_S, [ends_R[i] for i in indices], place)))
    return batches


def _sample_batch(indices: Sequence[int], chunks: Chunks, slots: Slots, asked: Filters | None) -> SampleBatch:
    device = slots.tokens.device
    index_S = torch.tensor(indices)
    slots_S = chunks.slots_R[index_S]
    temperature = slots.temperature[slots_S]
    num_logprobs = tuple(slots.num_logprobs[slot] for slot in slots_S.tolist())
    return SampleBatch(
        chunks=tuple(indices),
        rows=to_device(chunks.query_starts[index_S + 1] - 1, device),
        slots=to_device(slots_S, device),
        positions=to_device((chunks.starts_R + chunks.counts_R)[index_S], device),
        temperature=to_device(temperature, device),
        seed=to_device(slots.seed[slots_S], device),
        choice=to_device(slots.choice[slots_S], device),
        all_greedy=not bool(temperature.any()),
        filters=asked,
        num_logprobs=num_logprobs if any(n is not None for n in num_logprobs) else (),
    )


def scored(plan: StepPlan, chunks: Chunks, slots: Slots) -> ScoreBatch | None:
    """The rows of chunks with `score`, as far as the prompt goes: its last token has no successor in it."""
    found: list[tuple[int, int, int]] = []
    for chunk, wanted in enumerate(plan.score):
        if wanted:
            slot, start, count = (int(x[chunk]) for x in (chunks.slots_R, chunks.starts_R, chunks.counts_R))
            num_top = slots.num_prompt_logprobs[slot]
            assert num_top is not None, "only a sequence that asked is scored"
            if (rows := min(count, slots.prompt_len[slot] - 1 - start)) > 0:
                found.append((chunk, rows, num_top))
    if not found:
        return None
    indices, counts, num_top_C = zip(*found, strict=True)
    index_N = torch.tensor(indices).repeat_interleave(torch.tensor(counts))
    offset_N = torch.cat([torch.arange(count) for count in counts])
    device = slots.tokens.device
    return ScoreBatch(
        chunks=indices,
        counts=counts,
        num_top=num_top_C,
        rows=to_device(chunks.query_starts[index_N] + offset_N, device),
        slots=to_device(chunks.slots_R[index_N], device),
        positions=to_device(chunks.starts_R[index_N] + offset_N + 1, device),
    )
