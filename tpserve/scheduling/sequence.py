"""A sequence being generated: the only mutable request state there is. Private to scheduling/; it never crosses a wire.

    tokens     [0, len(tokens)) known | [len(tokens), length) drawn by plans in flight
    positions  [0, planned) in the KV cache, or put there by plans in flight | [planned, length) still to be computed

A sequence waits (no slot, no blocks, planned = 0), runs (a slot and blocks), or has ended; an ended sequence keeps its slot
and blocks until no plan in flight names it. `length` never passes `end`: the token at end - 1 is the last, and its own
position is never computed.
"""

from array import array
from dataclasses import dataclass

from tpserve.types.messages import PhaseTimes
from tpserve.types.request import Request


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way. `in_flight` counts the plans sent and not applied that name it, `draws` those that sample it."""

    request: Request
    tokens: "array[int]"
    prompt_len: int
    end: int
    arrived_s: float
    slot: int = -1
    tables: tuple[list[int], ...] = ()
    admitted: int = 0
    """Tokens the last admission carried: later ones are unknown to a worker that does not sample."""
    planned: int = 0
    draws: int = 0
    in_flight: int = 0
    ended: bool = False
    started_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float = 0.0

    @staticmethod
    def of(request: Request, max_model_len: int, now: float) -> "Sequence":
        """A waiting sequence. Tokens produced before a fault count towards max_tokens."""
        tokens = array("i")
        tokens.frombytes(request.prompt)
        prompt_len = len(tokens)
        tokens.frombytes(request.output)
        return Sequence(request, tokens, prompt_len, min(prompt_len + request.params.max_tokens, max_model_len), now)

    @property
    def length(self) -> int:
        """Positions whose token is known or being drawn."""
        return len(self.tokens) + self.draws

    @property
    def todo(self) -> int:
        """Positions to compute before the next token can be drawn: 1 while decoding, 0 when nothing more may be planned."""
        length = len(self.tokens) + self.draws
        return length - self.planned if length < self.end else 0

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    def given(self, start: int, count: int) -> tuple[int, ...]:
        """Input ids of a chunk that the admission did not carry, empty when it did."""
        return () if start + count <= self.admitted else tuple(self.tokens[start : start + count])

    def suspend(self) -> None:
        """Back to waiting: nothing computed is kept, every token is. The caller has taken slot and blocks away."""
        assert not self.in_flight, "a plan in flight still names the sequence"
        self.slot, self.tables, self.planned = -1, (), 0

    def times(self, now: float) -> PhaseTimes:
        """Phases of the first passage; what preemption repeats counts to the phase it interrupted."""
        if self.started_s is None:
            return PhaseTimes(now - self.arrived_s, 0.0, 0.0)
        if self.first_token_s is None:
            return PhaseTimes(self.started_s - self.arrived_s, now - self.started_s, 0.0)
        return PhaseTimes(
            self.started_s - self.arrived_s, self.first_token_s - self.started_s, self.last_token_s - self.first_token_s
        )
