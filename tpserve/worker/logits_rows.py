"""Selects the rows of a step that need logits, and groups them. On the last stage only; reads the plan and the request pool.

`LogitsChunking` limits the rows of one group. Rows with filters, rows without, and prompt tokens to score are in separate groups.

S: sampled rows of a group, N: scored rows of the step, C: chunks that score.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from tpserve.sampler.draw import DrawParams
from tpserve.sampler.filters import Filters
from tpserve.types.plan import StepPlan
from tpserve.worker.grammars import SlotGrammar
from tpserve.worker.host_arrays import copy_arrays, to_device
from tpserve.worker.input_batch import ChunkArrays
from tpserve.worker.logits_chunking import LogitsChunking
from tpserve.worker.request_pool import RequestPool
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
    draw: DrawParams
    all_greedy: bool
    filters: Filters | None
    """None: the rows have no sampling parameters but a temperature."""
    num_logprobs: tuple[int | None, ...]
    """Number of top logprobs of each request, None without logprobs; () when no request has any."""
    grammars: tuple[SlotGrammar | None, ...]
    """The grammar of each sequence; () when none has one."""


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
    plan: StepPlan, chunks: ChunkArrays, request_pool: RequestPool, logits_chunking: LogitsChunking
) -> list[SampleBatch]:
    """The chunks that sample, each in exactly one batch."""
    plain: list[int] = []
    filtered: list[tuple[int, SamplingMetadata]] = []
    for chunk, (sample, slot, end) in enumerate(zip(plan.sample, chunks.slots, chunks.ends, strict=True)):
        if sample:
            metadata = request_pool.sampling_metadata[slot]
            if metadata is not None and metadata.needs_filters(end):
                filtered.append((chunk, metadata))
            else:
                plain.append(chunk)
    batches = [
        _sample_batch(plain[at : at + logits_chunking.plain], chunks, request_pool, ())
        for at in range(0, len(plain), logits_chunking.plain)
    ]
    for at in range(0, len(filtered), logits_chunking.filtered):
        indices, metadata_S = zip(*filtered[at : at + logits_chunking.filtered], strict=True)
        batches.append(_sample_batch(indices, chunks, request_pool, metadata_S))
    return batches


def _sample_batch(
    indices: Sequence[int], chunks: ChunkArrays, request_pool: RequestPool, filtered: Sequence[SamplingMetadata]
) -> SampleBatch:
    """The chunks of these indices. `filtered`: what filters each of them, or empty when none needs any."""
    slots, device = [chunks.slots[i] for i in indices], request_pool.tokens.device
    row_filters, grammars = None, tuple[SlotGrammar | None, ...]()
    if filtered:
        grammars = tuple(request_pool.grammars[slot] for slot in slots)
        move = partial(to_device, device=device)
        row_filters = filters(filtered, [chunks.ends[i] for i in indices], move, grammars)
    params = [request_pool.params[slot] for slot in slots]
    temperature = array("f", [each.temperature for each in params])
    arrays: list[array[int] | array[float]] = [
        array("q", [chunks.query_starts[i + 1] - 1 for i in indices]),
        array("q", slots),
        array("q", [request_pool.seed[slot] for slot in slots]),
        array("q", [chunks.ends[i] for i in indices]),
        array("q", [request_pool.choice[slot] for slot in slots]),
        temperature,
    ]
    rows, slots_S, seed, positions, choice, temperature_S = copy_arrays(arrays, device)
    num_logprobs = tuple(each.logprobs for each in params)
    return SampleBatch(
        chunks=tuple(indices),
        rows=rows,
        slots=slots_S,
        draw=DrawParams(temperature_S, seed, positions, choice, not all(temperature)),
        all_greedy=not any(temperature),
        filters=row_filters,
        num_logprobs=num_logprobs if any(n is not None for n in num_logprobs) else (),
        grammars=grammars if any(grammar is not None for grammar in grammars) else (),
    )


def prompt_logprobs_batch(plan: StepPlan, chunks: ChunkArrays, request_pool: RequestPool) -> PromptLogprobsBatch | None:
    """The rows of chunks with `score` whose next token is in the prompt; None without any. The last prompt token has none."""
    found: list[tuple[int, int, int]] = []
    rows, slots, positions = array("q"), array("q"), array("q")
    for chunk, score in enumerate(plan.score):
        if score:
            slot, start, count = chunks.slots[chunk], chunks.starts[chunk], chunks.counts[chunk]
            num_top = request_pool.params[slot].prompt_logprobs
            assert num_top is not None, "only a request with prompt_logprobs is scored"
            if (num_rows := min(count, request_pool.prompt_len[slot] - 1 - start)) > 0:
                found.append((chunk, num_rows, num_top))
                rows.extend(range(chunks.query_starts[chunk], chunks.query_starts[chunk] + num_rows))
                slots.extend([slot] * num_rows)
                positions.extend(range(start + 1, start + 1 + num_rows))
    if not found:
        return None
    indices, counts, num_top_C = zip(*found, strict=True)
    tensors = copy_arrays([rows, slots, positions], request_pool.tokens.device)
    return PromptLogprobsBatch(indices, counts, num_top_C, *tensors)
