"""Which rows of a step the LM head sees, what for, and how many of them at once. Pure, like `batch`; the last stage's only.

Rows go through the LM head, the draw, its filters and the log probabilities in groups of as many as `LogitsChunking` allows:
rows that
ask for filters apart from those that do not, prompt tokens to score apart from both.

S sampled rows of a group, N scored rows of the step, C chunks that score.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from tpserve.sampler.filters import Filters
from tpserve.types.plan import StepPlan
from tpserve.worker.input_batch import ChunkTensors
from tpserve.worker.logits_chunking import LogitsChunking
from tpserve.worker.request_pool import RequestPool, to_device
from tpserve.worker.sampling_metadata import SamplingMetadata, filters


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
class PromptLogprobsBatch:
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


def sample_batches(
    plan: StepPlan, chunks: ChunkTensors, request_pool: RequestPool, logits_chunking: LogitsChunking
) -> list[SampleBatch]:
    """The chunks that draw, each in one batch."""
    ends_R = (chunks.starts_R + chunks.counts_R).tolist()
    plain: list[int] = []
    filtered: list[tuple[int, SamplingMetadata]] = []
    for chunk, slot in enumerate(chunks.slots_R.tolist()):
        if plan.sample[chunk]:
            asked = request_pool.sampling_metadata[slot]
            if asked is not None and asked.anything(ends_R[chunk]):
                filtered.append((chunk, asked))
            else:
                plain.append(chunk)
    batches = [
        _sample_batch(plain[at : at + logits_chunking.plain], chunks, request_pool, None)
        for at in range(0, len(plain), logits_chunking.plain)
    ]
    place = partial(to_device, device=request_pool.tokens.device)
    for at in range(0, len(filtered), logits_chunking.filtered):
        indices, asked_S = zip(*filtered[at : at + logits_chunking.filtered], strict=True)
        batches.append(_sample_batch(indices, chunks, request_pool, filters(asked_S, [ends_R[i] for i in indices], place)))
    return batches


def _sample_batch(indices: Sequence[int], chunks: ChunkTensors, request_pool: RequestPool, asked: Filters | None) -> SampleBatch:
    device = request_pool.tokens.device
    index_S = torch.tensor(indices)
    slots_S = chunks.slots_R[index_S]
    temperature = request_pool.temperature[slots_S]
    num_logprobs = tuple(request_pool.num_logprobs[slot] for slot in slots_S.tolist())
    return SampleBatch(
        chunks=tuple(indices),
        rows=to_device(chunks.query_starts[index_S + 1] - 1, device),
        slots=to_device(slots_S, device),
        positions=to_device((chunks.starts_R + chunks.counts_R)[index_S], device),
        temperature=to_device(temperature, device),
        seed=to_device(request_pool.seed[slots_S], device),
        choice=to_device(request_pool.choice[slots_S], device),
        all_greedy=not bool(temperature.any()),
        filters=asked,
        num_logprobs=num_logprobs if any(n is not None for n in num_logprobs) else (),
    )


def prompt_logprobs_batch(plan: StepPlan, chunks: ChunkTensors, request_pool: RequestPool) -> PromptLogprobsBatch | None:
    """The rows of chunks with `score`, as far as the prompt goes: its last token has no successor in it."""
    found: list[tuple[int, int, int]] = []
    for chunk, wanted in enumerate(plan.score):
        if wanted:
            slot, start, count = (int(x[chunk]) for x in (chunks.slots_R, chunks.starts_R, chunks.counts_R))
            num_top = request_pool.num_prompt_logprobs[slot]
            assert num_top is not None, "only a sequence that asked is scored"
            if (rows := min(count, request_pool.prompt_len[slot] - 1 - start)) > 0:
                found.append((chunk, rows, num_top))
    if not found:
        return None
    indices, counts, num_top_C = zip(*found, strict=True)
    index_N = torch.tensor(indices).repeat_interleave(torch.tensor(counts))
    offset_N = torch.cat([torch.arange(count) for count in counts])
    device = request_pool.tokens.device
    return PromptLogprobsBatch(
        chunks=indices,
        counts=counts,
        num_top=num_top_C,
        rows=to_device(chunks.query_starts[index_N] + offset_N, device),
        slots=to_device(chunks.slots_R[index_N], device),
        positions=to_device(chunks.starts_R[index_N] + offset_N + 1, device),
    )
