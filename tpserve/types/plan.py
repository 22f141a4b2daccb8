"""The messages of a step: rank 0 sends a StepPlan, every rank executes it, the sampling rank answers with a StepResult.

A step has no prefill phase and no decode phase: it is a list of chunks `(slot, start, count)`. A chunk computes the KV
entries of positions [start, start + count) of one sequence and, if `sample` is set, draws the token of position
start + count. If `score` is set, the step also returns the log probabilities of the prompt's tokens among the positions
[start + 1, start + count]. With `redraw` it also draws so many known tokens again and returns them: the last ones among the
positions [start + 1, start + count], without the one that it samples. They change nothing; rank 0 compares.

    tokens[slot]    [0, start) in the KV cache | [start, start + count) computed by this chunk | start + count drawn
    block table     one per cache group, extended by NewSequence.tables and Chunk.blocks; position p is in table[p // block_size].
                    Entries before a group's window are invalid: no chunk reads them

The input ids are `Chunk.tokens` if it is not empty, else the worker's own `tokens[slot, start:start+count]`, which a NewSequence
or the sampler of an earlier plan has written.
"""

from collections.abc import Iterator, Sequence

from msgspec import Struct

from tpserve.types.packed import pack, unpack
from tpserve.types.sampling import MAX_LOGPROBS, EngineSamplingParams

NEW_GRAMMAR_BYTES = 4 << 20
"""The grammars of one plan: texts of at most so many bytes together."""
MAX_REDRAWN = 16
"""The most known tokens of a sequence that are drawn again."""
NEW_SEQUENCE_HEADER_BYTES = 57
"""Upper bound of the fixed-size fields: four numbers of at most 9 bytes, a seed, and msgpack's headers."""


class NewSequence(Struct, frozen=True, array_like=True):
    """A sequence enters a slot. Carries everything that the ranks need to know about it.

    `tokens`: packed ids of the prompt and of the output so far (not empty after a preemption or a resubmission).
    `tables`: the sequence's first block ids, packed, one entry per cache group.
    """

    slot: int
    tokens: bytes
    prompt_len: int
    params: EngineSamplingParams
    seed: int
    choice: int
    tables: tuple[bytes, ...]
    grammar: int = -1
    """The number of its grammar, in place of the text in `params`; -1 for none. It is compiled on all ranks of the last stage."""

    @staticmethod
    def max_bytes(params_bytes: int, num_tokens: int, num_blocks: int, num_groups: int) -> int:
        """An upper bound of the encoded size in bytes. `params_bytes`: of the encoded params; `num_blocks`: in all tables."""
        return NEW_SEQUENCE_HEADER_BYTES + params_bytes + 4 * (num_tokens + num_blocks) + 5 * num_groups


class Chunk(Struct, frozen=True, array_like=True):
    """A run of positions of one sequence; see the module docstring. `blocks`: ids of new blocks, per cache group."""

    slot: int
    start: int
    count: int
    sample: bool
    tokens: tuple[int, ...] = ()
    blocks: tuple[tuple[int, ...], ...] = ()
    score: bool = False
    redraw: int = 0


class GrammarOrders(Struct, frozen=True, array_like=True):
    """What the ranks of the last stage do about grammars, before the chunks of a plan.

    `new`: (number, text) to compile, beside the steps. `asked`: numbers of which the result tells whether all ranks have compiled
    them. `dropped`: numbers that no sequence will need. A plan with orders may have no chunks.
    """

    new: tuple[tuple[int, str], ...] = ()
    asked: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()


class StepPlan(Struct, frozen=True, array_like=True):
    """One step's work for every rank; the chunks are a struct of packed arrays.

    A worker applies releases, new sequences, then chunks in order. At most one chunk names a slot. A decode plan of 256
    sequences takes about 3 KB.
    """

    epoch: int
    step: int
    releases: tuple[int, ...]
    new_sequences: tuple[NewSequence, ...]
    slots: bytes
    starts: bytes
    counts: bytes
    sample: bytes
    """One byte per chunk: 1 where the chunk draws a token."""
    input_ids: bytes
    """One byte per chunk: 1 where `tokens` holds the chunk's input ids."""
    tokens: bytes
    """Packed input ids of the chunks with `input_ids`, one after another."""
    block_runs: bytes
    """Packed triples (chunk index, cache group, number of block ids)."""
    blocks: bytes
    """Packed block ids of the runs, one after another."""
    score: bytes = b""
    """One byte per chunk: 1 where prompt tokens are scored; empty when no chunk scores."""
    grammars: GrammarOrders = GrammarOrders()
    redraw: bytes = b""
    """One byte per chunk: the number of tokens to draw again; empty when no chunk does."""

    @staticmethod
    def of(
        epoch: int,
        step: int,
        chunks: Sequence[Chunk],
        new_sequences: Sequence[NewSequence] = (),
        releases: Sequence[int] = (),
        grammars: GrammarOrders = GrammarOrders(),
    ) -> "StepPlan":
        """Pack a plan. Results refer to chunks by their index in `chunks`."""
        tokens: list[int] = []
        runs: list[int] = []
        blocks: list[int] = []
        for index, chunk in enumerate(chunks):
            assert not chunk.tokens or len(chunk.tokens) == chunk.count, "a chunk has all of its tokens or none"
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
            grammars=grammars,
            redraw=bytes(c.redraw for c in chunks) if any(c.redraw for c in chunks) else b"",
        )

    @staticmethod
    def max_bytes(num_seqs: int, num_tokens: int, num_groups: int) -> int:
        """An upper bound in bytes of a plan without new sequences: `num_seqs` chunks with `num_tokens` positions in all.

        A chunk has 3 numbers and 4 bytes, a number for each position and, in each group, a run and a block for each position.
        """
        return 128 + num_seqs * (5 + 16 + 12 * num_groups) + 4 * num_tokens * (1 + num_groups)

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
        """Unpack the chunks (for tests; workers read the arrays)."""
        blocks: dict[int, list[tuple[int, ...]]] = {}
        for index, group, ids in self.runs():
            blocks.setdefault(index, [() for _ in range(num_groups)])[group] = tuple(ids)
        input_ids, at, result = unpack(self.tokens), 0, []
        rows = zip(unpack(self.slots), unpack(self.starts), unpack(self.counts), self.sample, self.input_ids, strict=True)
        for index, (slot, start, count, sample, has_tokens) in enumerate(rows):
            tokens: tuple[int, ...] = ()
            if has_tokens:
                tokens, at = tuple(input_ids[at : at + count]), at + count
            score, redraw = bool(self.score) and bool(self.score[index]), self.redraw[index] if self.redraw else 0
            result.append(Chunk(slot, start, count, bool(sample), tokens, tuple(blocks.get(index, ())), score, redraw))
        return result


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """Natural log probabilities of the raw logits at one position: `chosen` of the drawn token, `top` of the likeliest ones."""

    chosen: float
    top_ids: tuple[int, ...]
    top: tuple[float, ...]


class PromptLogprobs(Struct, frozen=True, array_like=True):
    """Natural log probabilities of consecutive prompt tokens, each given its prefix, of the raw logits.

    `chosen`: float32 bytes of shape [tokens]. `top_ids` (int32 bytes) and `top` (float32 bytes), of shape [tokens, num_top]: the
    most likely tokens of each position, best first.
    """

    num_top: int
    chosen: bytes
    top_ids: bytes
    top: bytes

    @property
    def num_tokens(self) -> int:
        """Number of prompt tokens in it."""
        return len(self.chosen) // 4

    def after(self, count: int) -> "PromptLogprobs":
        """The entries after the first `count` tokens."""
        skip = 4 * count * self.num_top
        return PromptLogprobs(self.num_top, self.chosen[4 * count :], self.top_ids[skip:], self.top[skip:])


class StepResult(Struct, frozen=True, array_like=True):
    """The result of a plan. `tokens`: packed, one drawn token per chunk, -1 where the chunk does not sample.

    `logprobs`: (chunk index, entry) for the chunks whose request wants them. `prompt_logprobs`: (chunk index, entries) for the
    chunks that score at least one prompt token. `grammar_ends`: (chunk index, error) of the chunks whose token ends a grammar;
    an error, mostly empty, says that the grammar could not be followed. `compiled`: (number, error) of grammars of `asked` that
    all ranks have compiled, or that one of them could not. `redrawn`: (chunk index, packed tokens) of the chunks that draw known
    tokens again, in order of position.
    """

    epoch: int
    step: int
    tokens: bytes
    logprobs: tuple[tuple[int, TokenLogprobs], ...] = ()
    prompt_logprobs: tuple[tuple[int, PromptLogprobs], ...] = ()
    grammar_ends: tuple[tuple[int, str], ...] = ()
    compiled: tuple[tuple[int, str], ...] = ()
    redrawn: tuple[tuple[int, bytes], ...] = ()

    @staticmethod
    def max_bytes(num_seqs: int, num_tokens: int) -> int:
        """An upper bound in bytes of a result, and of the messages to the frontend that it becomes.

        All of `num_tokens` positions may be scored and drawn again, and all of `num_seqs` sequences may want log probabilities.
        """
        return 256 + num_seqs * (208 + 14 * MAX_LOGPROBS) + num_tokens * (8 + 8 * MAX_LOGPROBS)
