"""A sequence being generated: the scheduler's mutable state of a request. Private to scheduling/; it is never sent.

    tokens     [0, len(tokens)) known | [len(tokens), length) sampled by plans in flight
    positions  [0, computed) in the KV cache | [computed, planned) computed by plans in flight | [planned, length) to compute
    scores     prompt logprobs: tokens [1, num_scored) are sent | [num_scored, prompt_len) are missing, if the request wants them
    resumed    output from before a fault: its last tokens, [next_redraw, end_redraw), are still to be drawn again and compared

A sequence waits (no slot, no blocks, nothing planned), runs (a slot and blocks), or has ended. An ended sequence keeps its slot
and blocks until no plan in flight names it. `length` never passes `end`: the token at end - 1 is the last, and its own
position is never computed. A request with `max_tokens` 0 computes the prompt logprobs and samples nothing.
"""

from array import array
from dataclasses import dataclass, field

from msgspec import msgpack
from msgspec.structs import replace

from tpserve.types.messages import PhaseTimes
from tpserve.types.plan import MAX_REDRAWN
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in the scheduler. `in_flight`: plans in flight that name it; `pending_draws`: those of them that sample it."""

    request: Request
    params: EngineSamplingParams
    """Of the request, without the text of the grammar: what each admission sends."""
    tokens: "array[int]"
    prompt_len: int
    end: int
    arrived_s: float
    order: tuple[int, int]
    """Lower comes first: (priority, arrival number)."""
    num_scored: int
    params_bytes: int
    """Size of the encoded params."""
    next_redraw: int
    end_redraw: int
    slot: int = -1
    grammar: int = -1
    """The number of its grammar; -1 for none."""
    tables: tuple[list[int], ...] = ()
    admitted: int = 0
    """Number of tokens that the last admission sent. With `sync_sampling` the workers need later ones as `Chunk.tokens`."""
    hashes: list[bytes] = field(default_factory=list)
    """Hashes of full blocks, computed when first needed. Tokens never change, so neither do these."""
    pending_prefix: bytes = b""
    """Hash of the first block that the last lookup did not find in the prefix cache."""
    cached_tokens: int = 0
    computed: int = 0
    next_boundary: int = 0
    """Number of computed positions at which the next block becomes full or leaves a window."""
    planned: int = 0
    pending_draws: int = 0
    in_flight: int = 0
    ended: bool = False
    mismatches: int = 0
    """Tokens that were drawn again and differ."""
    started_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float = 0.0

    @staticmethod
    def of(request: Request, max_model_len: int, now: float, number: int) -> "Sequence":
        """A waiting sequence. `request.output`, the tokens from before a crash, counts towards max_tokens."""
        tokens = array("i")
        tokens.frombytes(request.prompt)
        prompt_len = len(tokens)
        tokens.frombytes(request.output)
        end = min(prompt_len + request.params.max_tokens, max_model_len)
        # prompt logprobs are sent before the first token, so a resubmitted request with output has them
        scored = prompt_len if request.params.prompt_logprobs is None or request.output else min(1, prompt_len)
        params = replace(request.params, grammar="") if request.params.grammar else request.params
        order, params_bytes = (request.priority, number), len(msgpack.encode(params))
        redraw, length = max(prompt_len, len(tokens) - MAX_REDRAWN), len(tokens)
        return Sequence(request, params, tokens, prompt_len, end, now, order, scored, params_bytes, redraw, length)

    @property
    def length(self) -> int:
        """Number of tokens that are known or being sampled."""
        return len(self.tokens) + self.pending_draws

    @property
    def num_to_compute(self) -> int:
        """Number of positions to compute before the next token is sampled: 1 in decode, 0 when all is planned."""
        length = len(self.tokens) + self.pending_draws
        if length < self.end:
            return length - self.planned
        return max(0, self.prompt_len - 1 - self.planned) if self.needs_scores else 0

    @property
    def known(self) -> int:
        """Number of positions that can be computed without sampling another token."""
        return min(len(self.tokens), self.end - 1)

    @property
    def needs_scores(self) -> bool:
        """Whether prompt logprobs are still missing."""
        return self.num_scored < self.prompt_len

    @property
    def first_logits(self) -> int:
        """The first position that must be computed though its keys and values may be known: its logits give a token."""
        return (self.next_redraw if self.redrawing else len(self.tokens)) - 1

    @property
    def redrawing(self) -> bool:
        """Whether known tokens are still to be drawn again."""
        return self.next_redraw < self.end_redraw

    @property
    def num_output(self) -> int:
        """Number of generated tokens that are known."""
        return len(self.tokens) - self.prompt_len

    @property
    def begun(self) -> bool:
        """Whether any of it was ever computed."""
        return self.started_s is not None or self.num_output > 0

    def scores(self, start: int, count: int) -> bool:
        """Whether positions [start, start + count) give prompt logprobs that are still missing."""
        return self.needs_scores and start + 1 < self.prompt_len and self.num_scored <= start + count

    def redraws(self, start: int, count: int) -> int:
        """How many tokens positions [start, start + count) draw again: all that are missing of [start + 1, start + count]."""
        return max(0, min(self.end_redraw, start + count + 1) - max(self.next_redraw, start + 1))

    def input_ids(self, start: int, count: int) -> tuple[int, ...]:
        """Input ids of positions [start, start + count); () when the admission sent them."""
        return () if start + count <= self.admitted else tuple(self.tokens[start : start + count])

    def suspend(self) -> None:
        """Back to waiting: keep the tokens, forget what is computed. The caller has freed the slot and the blocks."""
        assert not self.in_flight, "a plan in flight still names the sequence"
        self.slot, self.planned = -1, 0

    def times(self, now: float) -> PhaseTimes:
        """Seconds in queue, prefill and decode. Recomputation after a preemption counts to the phase that it interrupted."""
        if self.started_s is None:
            return PhaseTimes(now - self.arrived_s, 0.0, 0.0)
        if self.first_token_s is None:
            return PhaseTimes(self.started_s - self.arrived_s, now - self.started_s, 0.0)
        return PhaseTimes(
            self.started_s - self.arrived_s, self.first_token_s - self.started_s, self.last_token_s - self.first_token_s
        )
