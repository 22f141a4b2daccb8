"""A sequence being generated: the only mutable request state there is. Private to scheduling/; it never crosses a wire.

    tokens     [0, len(tokens)) known | [len(tokens), length) drawn by plans in flight
    positions  [0, computed) in the KV cache | [computed, planned) put there by plans in flight | [planned, length) to compute
    scores     of the prompt's tokens [1, scored) told | [scored, prompt_len) wanted, when the request asks for them

A sequence waits (no slot, no blocks, nothing planned), runs (a slot and blocks), or has ended; an ended sequence keeps its slot
and blocks until no plan in flight names it. `length` never passes `end`: the token at end - 1 is the last, and its own
position is never computed. A request for scores alone (`max_tokens` 0) computes what they need and draws nothing.
"""

from array import array
from dataclasses import dataclass, field

from msgspec import msgpack

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
    order: tuple[int, int]
    """Lower comes first: (priority, number of arrival)."""
    scored: int
    params_bytes: int
    """Size of the encoded params, a part of each admission."""
    slot: int = -1
    tables: tuple[list[int], ...] = ()
    admitted: int = 0
    """Tokens the last admission carried: later ones are unknown to a worker that does not sample."""
    hashes: list[bytes] = field(default_factory=list)
    """Of full blocks, as far as they were needed; tokens never change, so neither do these."""
    pending_prefix: bytes = b""
    """Hash of the first block that was not in the prefix cache when last looked for."""
    cached_tokens: int = 0
    computed: int = 0
    due: int = 0
    """Before so many positions are computed no block becomes full, and none leaves a window."""
    planned: int = 0
    draws: int = 0
    in_flight: int = 0
    ended: bool = False
    started_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float = 0.0

    @staticmethod
    def of(request: Request, max_model_len: int, now: float, number: int) -> "Sequence":
        """A waiting sequence. Tokens produced before a fault count towards max_tokens, and scores were told before the first."""
        tokens = array("i")
        tokens.frombytes(request.prompt)
        prompt_len = len(tokens)
        tokens.frombytes(request.output)
        end = min(prompt_len + request.params.max_tokens, max_model_len)
        scored = prompt_len if request.params.prompt_logprobs is None or request.output else min(1, prompt_len)
        params_bytes = len(msgpack.encode(request.params))
        return Sequence(request, tokens, prompt_len, end, now, (request.priority, number), scored, params_bytes)

    @property
    def length(self) -> int:
        """Positions whose token is known or being drawn."""
        return len(self.tokens) + self.draws

    @property
    def todo(self) -> int:
        """Positions to compute before the next token can be drawn: 1 while decoding, 0 when nothing more may be planned."""
        length = len(self.tokens) + self.draws
        if length < self.end:
            return length - self.planned
        return max(0, self.prompt_len - 1 - self.planned) if self.unscored else 0

    @property
    def known(self) -> int:
        """Positions that can be computed without another draw."""
        return min(len(self.tokens), self.end - 1)

    @property
    def unscored(self) -> bool:
        """Whether prompt tokens are still to be scored."""
        return self.scored < self.prompt_len

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    def scores(self, start: int, count: int) -> bool:
        """Whether a chunk computes what scores of the prompt are still wanted from."""
        return self.unscored and start + 1 < self.prompt_len and self.scored <= start + count

    def input_ids(self, start: int, count: int) -> tuple[int, ...]:
        """Input ids of a chunk that the admission did not carry, empty when it did."""
        return () if start + count <= self.admitted else tuple(self.tokens[start : start + count])

    def suspend(self) -> None:
        """Back to waiting: nothing computed is kept, every token is. The caller has taken slot and blocks away."""
        assert not self.in_flight, "a plan in flight still names the sequence"
        self.slot, self.planned = -1, 0

    def times(self, now: float) -> PhaseTimes:
        """Phases of the first passage; what preemption repeats counts to the phase it interrupted."""
        if self.started_s is None:
            return PhaseTimes(now - self.arrived_s, 0.0, 0.0)
        if self.first_token_s is None:
            return PhaseTimes(self.started_s - self.arrived_s, now - self.started_s, 0.0)
        return PhaseTimes(
            self.started_s - self.arrived_s, self.first_token_s - self.started_s, self.last_token_s - self.first_token_s
        )
