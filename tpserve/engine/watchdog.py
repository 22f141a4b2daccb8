"""How long a step may take before something hangs. Pure: times come as `now`, in seconds of any monotonic clock.

A rank whose main thread hangs still sends heartbeats, and a collective waits for ever; what tells is that a plan does not come
back.

    allowed   ten times what the step would have cost at the slowest of the last steps, in seconds a token;
              never less than a minute;
              never more than the start's own limit, or ten times the slowest of the last steps as it was, whichever is longer

So one slow step (a kernel was compiled, a disk was slow) is forgotten after `RECENT` others, and while it is remembered a step of
many tokens is not given days. Until the first result nothing is known but the start's own limit. A rank that compiles says so in
its heartbeats, and the coordinator then waits longer (`coordinator/coordinator.py`).
"""

from collections import deque
from typing import NamedTuple

LEAST_S = 60.0
MARGIN = 10.0
RECENT = 32
"""So many steps are remembered."""


class _Step(NamedTuple):
    num_tokens: int
    took_s: float


class StepWatchdog:
    """The plans in flight, oldest first, and when the oldest is overdue."""

    def __init__(self, first_s: float) -> None:
        """`first_s`: what the first plan may take."""
        self._first_s = first_s
        self._in_flight: deque[tuple[int, int, float]] = deque()
        self._recent: deque[_Step] = deque(maxlen=RECENT)
        self._applied_s = 0.0

    def sent(self, step: int, num_tokens: int, now: float) -> None:
        """A plan is on its way."""
        self._in_flight.append((step, num_tokens, now))

    def applied(self, now: float) -> None:
        """The oldest plan's result is here. It is charged from when it was sent or the one before done, whichever is later."""
        _, num_tokens, sent_s = self._in_flight.popleft()
        self._recent.append(_Step(num_tokens, now - max(sent_s, self._applied_s)))
        self._applied_s = now

    @property
    def deadline(self) -> tuple[int, float] | None:
        """The oldest plan in flight and when it is overdue; None with nothing in flight."""
        if not self._in_flight:
            return None
        step, num_tokens, sent_s = self._in_flight[0]
        return step, max(sent_s, self._applied_s) + self._allowed_s(num_tokens)

    def _allowed_s(self, num_tokens: int) -> float:
        if not self._recent:
            return self._first_s
        by_tokens_s = MARGIN * num_tokens * max(took_s / tokens for tokens, took_s in self._recent)
        slowest_s = MARGIN * max(took_s for _, took_s in self._recent)
        return max(LEAST_S, min(by_tokens_s, max(self._first_s, slowest_s)))
