"""The deadline of a step. Pure: times come as `now`, in seconds of any monotonic clock.

A rank whose main thread hangs still sends heartbeats, and a collective waits forever. The only sign of the hang is a plan whose
result does not arrive.

    allowed   ten times the step's number of tokens, times the seconds a token of the slowest recent step;
              at least `least_s`: a minute where kernels may have to be compiled, ten seconds on the CPU;
              at most the start timeout, or ten times the duration of the slowest recent step if that is longer

With nothing in flight the loop itself has to come back, within `least_s`: it looks around every second.

So one slow step (a kernel was compiled, a disk was slow) counts for `RECENT` further steps only, and its seconds a token do not
allow days for a step of many tokens. Before the first result the start timeout is the limit. A rank that compiles reports it
in its heartbeats, and the coordinator then waits longer (`coordinator/coordinator.py`).
"""

from collections import deque
from typing import NamedTuple

NO_STEP = -1
MARGIN = 10.0
RECENT = 32
"""Number of steps that count as recent."""


class _Step(NamedTuple):
    num_tokens: int
    took_s: float


class StepWatchdog:
    """The plans in flight, oldest first, and when the oldest is overdue."""

    def __init__(self, first_s: float, least_s: float) -> None:
        """`first_s`: the limit until the first result, in seconds (the start timeout). `least_s`: the shortest limit after it."""
        self._first_s, self._least_s = first_s, least_s
        self._in_flight: deque[tuple[int, int, float]] = deque()
        self._recent: deque[_Step] = deque(maxlen=RECENT)
        self._token_s = self._slowest_s = 0.0
        """Of the recent steps: the seconds a token of the slowest, and the seconds of the longest."""
        self._applied_s = 0.0

    def sent(self, step: int, num_tokens: int, now: float) -> None:
        """A plan is sent."""
        self._in_flight.append((step, num_tokens, now))

    def applied(self, now: float) -> None:
        """The oldest plan's result has arrived. Its time runs from its sending or from the result before, whichever is later."""
        _, num_tokens, sent_s = self._in_flight.popleft()
        if num_tokens:  # a plan without chunks tells nothing about steps
            self._recent.append(_Step(num_tokens, now - max(sent_s, self._applied_s)))
            self._token_s = max(took_s / tokens for tokens, took_s in self._recent)
            self._slowest_s = max(took_s for _, took_s in self._recent)
        self._applied_s = now

    def deadline(self, now: float) -> tuple[int, float]:
        """(step, time) of the oldest plan in flight and its deadline; step `NO_STEP` with nothing in flight."""
        if not self._in_flight:
            return NO_STEP, now + self._least_s
        step, num_tokens, sent_s = self._in_flight[0]
        return step, max(sent_s, self._applied_s) + self._allowed_s(num_tokens)

    def _allowed_s(self, num_tokens: int) -> float:
        if not self._recent:
            return self._first_s
        return max(self._least_s, min(MARGIN * num_tokens * self._token_s, max(self._first_s, MARGIN * self._slowest_s)))
