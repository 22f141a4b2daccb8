"""What crosses the wire each step: rank 0 plans, every rank executes.

A step has no prefill phase and no decode phase: it is a list of chunks `(slot, start, count)`. A chunk computes the KV
entries of positions [start, start + count) of one sequence and, if `sample` is set, draws the token of position
start + count. If `score` is set, the log probabilities of the prompt's tokens at [start + 1, start + count] are wanted,
as far as the prompt goes.

    tokens[slot]    [0, start) in the KV cache | [start, start + count) computed by this chunk | start + count drawn
    block table     one a cache group, appended by Admission.tables and Chunk.blocks; position p lives in table[p // block_size].
                    Before what a group's window still sees it says nothing: no chunk reads it

Where the input ids come from: `Chunk.tokens` if it is not empty, else the worker's own `tokens[slot, start:start+count]`,
written there by the admission or by the sampler of an earlier plan.
"""

from collections.abc import Iterator, Sequence

from msgspec import Struct

from tpserve.types.packed import pack, unpack
from tpserve.types.sampling import MAX_LOGPROBS, EngineSamplingParams

NEW_SEQUENCE_HEADER_BYTES = 48
"""The fields of fixed size: three numbers of at most 9 bytes, a seed, and what msgpack puts before fields."""


class NewSequence(Struct, frozen=True, array_like=True):
    """A sequence takes a slot. Carries all that the ranks will ever need to know about it.

    `tokens`: packed ids, the prompt and everything produced so far (a preempted or resubmitted sequence comes back with
    its output). `tables`: the sequence's first block ids, packed, one entry per cache group.
    """

    slot: int
    tokens: bytes
    prompt_len: int
    params: EngineSamplingParams
    seed: int
    choice: int
    tables: tuple[bytes, ...]

    @staticmethod
    def max_bytes(params_bytes: int, num_tokens: int, num_blocks: int, num_groups: int) -> int:
        """An upper bound of the size on the wire. `params_bytes`: of the encoded params; `num_blocks`: in all tables."""
        return NEW_SEQUENCE_HEADER_BYTES + params_bytes + 4 * (num_tokens + num_blocks) + 5 * num_groups


class Chunk(Struct, frozen=True, array_like=True):
    """A run of positions of one sequence; see the module docstring. `blocks`: newly owned block ids per cache group."""

    slot: int
    start: int
    count: int
    sample: bool
    tokens: tuple[int, ...] = ()
    blocks: tuple[tuple[int, ...], ...] = ()
    score: bool = False


class StepPlan(Struct, frozen=True, array_like=True):
    """One step's work for every rank, chunks as a struct of packed arrays.

    Order of effects on a worker: releases, admissions, then chunks in order. A slot is named by at most one chunk.
    A 256-sequence decode plan takes about 3 KB.
    """

    epoch: int
    step: int
    releases: tuple[int, ...]
    new_sequences: tuple[NewSequence, ...]
    slots: bytes
    starts: bytes
    counts: bytes
    sample: bytes
    """One byte a chunk: 1 where the chunk draws a token."""
    input_ids: bytes
    """One byte a chunk: 1 where `tokens` holds the chunk's input ids."""
    tokens: bytes
    """Packed input ids of the chunks with `input_ids`, one after another."""
    block_runs: bytes
    """Packed triples (chunk index, cache group, number of block ids)."""
    blocks: bytes
    """Packed block ids of the runs, one after another."""
    score: bytes = b""
    """One byte a chunk: 1 where prompt tokens are scored; empty when no chunk does."""

    @staticmethod
    def of(
        epoch: int, step: int, chunks: Sequence[Chunk], new_sequences: Sequence[NewSequence] = (), releases: Sequence[int] = ()
    ) -> "StepPlan":
        """Pack a plan. `chunks` keeps its order; results are keyed by the index in it."""
        tokens: list[int] = []
        runs: list[int] = []
        blocks: list[int] = []
        for index, chunk in enumerate(chunks):
            assert not chunk.tokens or len(chunk.tokens) == chunk.count, "a chunk's tokens are given whole or not at all"
            tokens.extend(chunk.tokens)
            for group, ids in enumerate(chunk.blocks):
                if ids:
                    runs.extend((index, group, len(ids)))
                    blocks.extend(ids)
        return StepPlan(
            epoch=epoch,
            step=step,
            releases=tuple(releases),
            new_sequences=tuple(new_sequences),
            slots=pack([c.slot for c in chunks]),
            starts=pack([c.start for c in chunks]),
            counts=pack([c.count for c in chunks]),
            sample=bytes(c.sample for c in chunks),
            input_ids=bytes(bool(c.tokens) for c in chunks),
            tokens=pack(tokens),
            block_runs=pack(runs),
            blocks=pack(blocks),
            score=bytes(c.score for c in chunks) if any(c.score for c in chunks) else b"",
        )

    @staticmethod
    def max_bytes(num_seqs: int, num_tokens: int, num_groups: int) -> int:
        """An upper bound of a plan's size on the wire without its admissions: `num_seqs` chunks of `num_tokens` positions.

        A chunk has 3 numbers and 3 marks, a number for each position and, in each group, a run and a block for each position.
        """
        return 128 + num_seqs * (5 + 15 + 12 * num_groups) + 4 * num_tokens * (1 + num_groups)

    def num_tokens(self) -> int:
        """Number of positions the plan computes."""
        return sum(unpack(self.counts))

    def runs(self) -> Iterator[tuple[int, int, Sequence[int]]]:
        """Yield (chunk index, cache group, block ids) for each run of new blocks."""
        triples, ids, at = unpack(self.block_runs), unpack(self.blocks), 0
        for i in range(0, len(triples), 3):
            count = triples[i + 2]
            yield triples[i], triples[i + 1], ids[at : at + count]
            at += count

    def chunks(self, num_groups: int = 1) -> list[Chunk]:
        """Unpack the chunks (tests and the simulated worker; the hot path reads the arrays)."""
        blocks: dict[int, list[tuple[int, ...]]] = {}
        for index, group, ids in self.runs():
            blocks.setdefault(index, [() for _ in range(num_groups)])[group] = tuple(ids)
        given, at, result = unpack(self.tokens), 0, []
        rows = zip(unpack(self.slots), unpack(self.starts), unpack(self.counts), self.sample, self.input_ids, strict=True)
        for index, (slot, start, count, sample, has_tokens) in enumerate(rows):
            tokens: tuple[int, ...] = ()
            if has_tokens:
                tokens, at = tuple(given[at : at + count]), at + count
            score = bool(self.score) and bool(self.score[index])
            result.append(Chunk(slot, start, count, bool(sample), tokens, tuple(blocks.get(index, ())), score))
        return result


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """Natural log probabilities of the raw logits at one position: the chosen token's, and the most likely ones, best first."""

    chosen: float
    top_ids: tuple[int, ...]
    top: tuple[float, ...]


class PromptLogprobs(Struct, frozen=True, array_like=True):
    """Natural log probabilities of successive prompt tokens, each given those before it, of the raw logits.

    `chosen`: float32 bytes, one a token. `top_ids` (int32) and `top` (float32): the `num_top` most likely tokens of each
    position, best first, one position after another.
    """

    num_top: int
    chosen: bytes
    top_ids: bytes
    top: bytes

    @property
    def num_tokens(self) -> int:
        return len(self.chosen) // 4

    def after(self, count: int) -> "PromptLogprobs":
        """Without the first `count` tokens."""
        skip = 4 * count * self.num_top
        return PromptLogprobs(self.num_top, self.chosen[4 * count :], self.top_ids[skip:], self.top[skip:])


class StepResult(Struct, frozen=True, array_like=True):
    """What a plan drew. `tokens`: packed, one per chunk of the plan, -1 where the chunk does not sample.

    `logprobs`: (chunk index, entry) for the chunks whose request asked for them. `prompt_logprobs`: (chunk index, entries)
    of the chunks that score, in which at least one token of the prompt is scored.
    """

    epoch: int
    step: int
    tokens: bytes
    logprobs: tuple[tuple[int, TokenLogprobs], ...] = ()
    prompt_logprobs: tuple[tuple[int, PromptLogprobs], ...] = ()

    @staticmethod
    def max_bytes(num_seqs: int, num_tokens: int) -> int:
        """An upper bound of the size on the wire of a result, and of what becomes of it for the frontend.

        All of `num_tokens` positions may be scored, and all of `num_seqs` sequences may want log probabilities.
        """
        return 256 + num_seqs * (192 + 14 * MAX_LOGPROBS) + num_tokens * (4 + 8 * MAX_LOGPROBS)
