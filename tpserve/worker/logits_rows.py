"""Selects the rows of a step that need logits, and groups them. On the last stage only; reads the plan and the request pool.

`LogitsChunking` limits the rows of one group. Rows with filters, rows without, and prompt tokens to score are in separate groups.

S: sampled rows of a group, N: scored rows of the step, C: chunks that score.
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
    """Chunks that sample together. Tensors are on the device with S entries each."""

    chunks: tuple[int, ...]
    """Indices of the chunks in the plan"""
    rows: torch.Tensor
    """[S] int64: rows of the step, the last one of each chunk"""
    slots: torch.Tensor
    """[S] int64"""
    positions: torch.Tensor
    """[S] int64: the position of the token to sample"""
    temperature: torch.Tensor
    """[S] float32"""
    seed: torch.Tensor
    """[S] int64, the bits of the unsigned seed"""
    choice: torch.Tensor
    """[S] int64"""
    all_greedy: bool
    filters: Filters | None
    """None: the rows have no sampling parameters but a temperature."""
    num_logprobs: tuple[int | None, ...]
    """Number of top logprobs of each request, None without logprobs; () when no request has any."""


@dataclass(frozen=True)
class PromptLogprobsBatch:
    """Rows whose next token is a prompt token. Tensors are on the device with N entries each, chunk after chunk."""

    chunks: tuple[int, ...]
    """Indices of the chunks in the plan, those with at least one token to score"""
    counts: tuple[int, ...]
    """Number of rows of each chunk"""
    num_top: tuple[int, ...]
    """Number of top logprobs that each request wants"""
    rows: torch.Tensor
    """[N] int64: rows of the step"""
    slots: torch.Tensor
    """[N] int64"""
    positions: torch.Tensor
    """[N] int64: the position of the token to score"""


def sample_batches(
    plan: StepPlan, chunks: ChunkTensors, request_pool: RequestPool, logits_chunking: LogitsChunking
) -> list[SampleBatch]:
    """The chunks that sample, each in exactly one batch."""
    ends_R = (chunks.starts_R + chunks.counts_R).tolist()
    plain: list[int] = []
    filtered: list[tuple[int, SamplingMetadata]] = []
    for chunk, slot in enumerate(chunks.slots_R.tolist()):
        if plan.sample[chunk]:
            metadata = request_pool.sampling_metadata[slot]
            if metadata is not None and metadata.needs_filters(ends_R[chunk]):
                filtered.append((chunk, metadata))
            else:
                plain.append(chunk)
    batches = [
        _sample_batch(plain[at : at + logits_chunking.plain], chunks, request_pool, None)
        for at in range(0, len(plain), logits_chunking.plain)
    ]
    move = partial(to_device, device=request_pool.tokens.device)
    for at in range(0, len(filtered), logits_chunking.filtered):
        indices, metadata_S = zip(*filtered[at : at + logits_chunking.filtered], strict=True)
        batches.append(_sample_batch(indices, chunks, request_pool, filters(metadata_S, [ends_R[i] for i in indices], move)))
    return batches


def _sample_batch(
    indices: Sequence[int], chunks: ChunkTensors, request_pool: RequestPool, row_filters: Filters | None
) -> SampleBatch:
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
        filters=row_filters,
        num_logprobs=num_logprobs if any(n is not None for n in num_logprobs) else (),
    )


def prompt_logprobs_batch(plan: StepPlan, chunks: ChunkTensors, request_pool: RequestPool) -> PromptLogprobsBatch | None:
    """The rows of chunks with `score` whose next token is in the prompt; None without any. The last prompt token has none."""
    found: list[tuple[int, int, int]] = []
    for chunk, score in enumerate(plan.score):
        if score:
            slot, start, count = (int(x[chunk]) for x in (chunks.slots_R, chunks.starts_R, chunks.counts_R))
            num_top = request_pool.num_prompt_logprobs[slot]
            assert num_top is not None, "only a request with prompt_logprobs is scored"
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
