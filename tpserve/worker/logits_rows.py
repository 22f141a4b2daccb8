"""Selects the rows of a step that need logits, and groups them. On the last stage only; reads the plan and the request pool.

`LogitsChunking` limits the rows of one group. Rows with filters, rows without, prompt tokens to score and known tokens to draw
again are in separate groups.

S: drawn rows of a group, N: scored rows of the step, C: chunks that score.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter

import torch

from tpserve.sampler.draw import DrawParams
from tpserve.sampler.filters import Filters
from tpserve.types.plan import StepPlan
from tpserve.worker.grammars import SlotGrammar
from tpserve.worker.host_arrays import copy_arrays
from tpserve.worker.input_batch import ChunkArrays
from tpserve.worker.logits_chunking import LogitsChunking
from tpserve.worker.request_pool import RequestPool
from tpserve.worker.sampling_metadata import SamplingMetadata, filters


@dataclass(frozen=True)
class SampleBatch:
    """Rows that are drawn together. Tensors are on the device with S entries each."""

    chunks: tuple[int, ...]
    """For each row the index of its chunk in the plan"""
    positions: tuple[int, ...]
    """For each row the position of the token that it draws"""
    rows: torch.Tensor
    """[S] int64: rows of the step; where the next token is sampled, the last one of the chunk"""
    slots: torch.Tensor
    """[S] int64"""
    draw: DrawParams
    all_greedy: bool
    filters: Filters | None
    """None: the rows have no sampling parameters but a temperature."""
    num_logprobs: tuple[int | None, ...] = ()
    """Number of top logprobs of each request, None without logprobs; () when no request has any."""
    grammars: tuple[SlotGrammar | None, ...] = ()
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


@dataclass
class _Rows:
    """Rows to draw: those without filters, and those with what filters each. A row is (chunk, position of the token).

    Filters that look at one id at a time need no whole rows, which ranks with parts of the vocabulary would have to gather. A
    sequence whose rows need both (`min_tokens`) needs whole ones first, as its grammar wants them, in order.
    """

    plain: list[tuple[int, int]] = field(default_factory=list)
    whole: list[tuple[int, int, SamplingMetadata]] = field(default_factory=list)
    per_id: list[tuple[int, int, SamplingMetadata]] = field(default_factory=list)

    def add(self, chunk: int, position: int, metadata: SamplingMetadata | None) -> None:
        if metadata is None or not metadata.needs_filters(position):
            self.plain.append((chunk, position))
        elif metadata.needs_whole_rows(position):
            self.whole.append((chunk, position, metadata))
        else:
            self.per_id.append((chunk, position, metadata))

    def batches(
        self, chunks: ChunkArrays, request_pool: RequestPool, logits_chunking: LogitsChunking, max_filtered: int
    ) -> list[SampleBatch]:
        """Each row in exactly one batch, in order of the plan among the plain ones and among the others."""
        max_plain = logits_chunking.plain
        plain = [self.plain[at : at + max_plain] for at in range(0, len(self.plain), max_plain)]
        kinds = [self.whole, self.per_id] if logits_chunking.sharded else [sorted(self.whole + self.per_id, key=itemgetter(0, 1))]
        filtered = [rows[at : at + max_filtered] for rows in kinds for at in range(0, len(rows), max_filtered)]
        return [_draw_batch(rows, chunks, request_pool, ()) for rows in plain] + [
            _draw_batch([row[:2] for row in rows], chunks, request_pool, [row[2] for row in rows]) for rows in filtered
        ]


def sample_batches(
    plan: StepPlan, chunks: ChunkArrays, request_pool: RequestPool, logits_chunking: LogitsChunking
) -> list[SampleBatch]:
    """The chunks that sample, each in exactly one batch."""
    rows = _Rows()
    for chunk, (sample, slot, end) in enumerate(zip(plan.sample, chunks.slots, chunks.ends, strict=True)):
        if sample:
            rows.add(chunk, end, request_pool.sampling_metadata[slot])
    batches = rows.batches(chunks, request_pool, logits_chunking, logits_chunking.filtered)
    return [_with_extras(batch, chunks, request_pool) for batch in batches]


def rows_left(chunks: ChunkArrays, request_pool: RequestPool, logits_chunking: LogitsChunking) -> list[SampleBatch]:
    """The chunks of a decode step, one row each, that a draw without filters does not serve: those with filters or logprobs."""
    rows = _Rows()
    for chunk, (slot, end) in enumerate(zip(chunks.slots, chunks.ends, strict=True)):
        metadata = request_pool.sampling_metadata[slot]
        filtered = metadata is not None and metadata.needs_filters(end)
        if filtered or request_pool.params[slot].logprobs is not None:
            rows.add(chunk, end, metadata)
    batches = rows.batches(chunks, request_pool, logits_chunking, logits_chunking.filtered)
    return [_with_extras(batch, chunks, request_pool) for batch in batches]


def redraw_batches(
    plan: StepPlan, chunks: ChunkArrays, request_pool: RequestPool, logits_chunking: LogitsChunking
) -> list[SampleBatch]:
    """The rows that draw known tokens again, with all filters of the draw. With filters no more at once than may sample.

    A grammar follows the tokens of a sequence in order, so these batches are made before those that sample.
    """
    rows = _Rows()
    for chunk, count in enumerate(plan.redraw):
        last = chunks.ends[chunk] - plan.sample[chunk]
        for position in range(last - count + 1, last + 1):
            rows.add(chunk, position, request_pool.sampling_metadata[chunks.slots[chunk]])
    max_filtered = min(logits_chunking.filtered, len(request_pool.params))
    return rows.batches(chunks, request_pool, logits_chunking, max_filtered)


def _draw_batch(
    rows: Sequence[tuple[int, int]], chunks: ChunkArrays, request_pool: RequestPool, filtered: Sequence[SamplingMetadata]
) -> SampleBatch:
    """These rows. `filtered`: what filters each of them, or empty when none needs any."""
    indices, ends = zip(*rows, strict=True)
    slots, device = [chunks.slots[i] for i in indices], request_pool.tokens.device
    row_filters = None
    if filtered:
        row_filters = filters(filtered, ends, device, [request_pool.grammars[slot] for slot in slots])
    temperature = array("f", [request_pool.params[slot].temperature for slot in slots])
    arrays: list[array[int] | array[float]] = [
        array("q", [chunks.query_starts[i] + end - 1 - chunks.starts[i] for i, end in rows]),
        array("q", slots),
        array("q", [request_pool.seed[slot] for slot in slots]),
        array("q", ends),
        array("q", [request_pool.choice[slot] for slot in slots]),
        temperature,
    ]
    rows_S, slots_S, seed, positions, choice, temperature_S = copy_arrays(arrays, device)
    return SampleBatch(
        chunks=indices,
        positions=ends,
        rows=rows_S,
        slots=slots_S,
        draw=DrawParams(temperature_S, seed, positions, choice, not all(temperature)),
        all_greedy=not any(temperature),
        filters=row_filters,
    )


def _with_extras(batch: SampleBatch, chunks: ChunkArrays, request_pool: RequestPool) -> SampleBatch:
    """With what a new token needs beside its draw: log probabilities, and grammars that follow it."""
    slots = [chunks.slots[i] for i in batch.chunks]
    num_logprobs = tuple(request_pool.params[slot].logprobs for slot in slots)
    grammars = tuple(request_pool.grammars[slot] for slot in slots)
    return replace(
        batch,
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
