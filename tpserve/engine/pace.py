"""How long a step may take before something hangs. Pure: times come as `now`, in seconds of any monotonic clock.

A rank whose main thread hangs still beats, and a collective waits for ever; what tells is that a plan does not come back.
The allowance follows what was measured: ten times the slowest cost a token so far, never below a minute, because a kernel
may have to be compiled for a shape that was not met before. Until the first result nothing is known but the start's own limit.
"""

from collections import deque

LEAST_S = 60.0
MARGIN = 10.0


class Pace:
    """The plans in flight, oldest first, and when the oldest is overdue."""

    def __init__(self, first_s: float) -> None:
        """`first_s`: what the first plan may take."""
        self._first_s = first_s
        self._in_flight: deque[tuple[int, int, float]] = deque()
        self._slowest_s = 0.0
        """Seconds a token of the slowest step so far."""
        self._applied_s = 0.0
        self._known = False

    def sent(self, step: int, num_tokens: int, now: float) -> None:
        """A plan is on its way."""
        self._in_flight.append((step, num_tokens, now))

    def applied(self, now: float) -> None:
        """The oldest plan's result is here. It is charged from when it was sent or the one before done, whichever is later."""
        _, num_tokens, sent_s = self._in_flight.popleft()
        self._slowest_s = max(self._slowest_s, (now - max(sent_s, self._applied_s)) / num_tokens)
        self._applied_s = now
        self._known = True

    @property
    def due(self) -> tuple[int, float] | None:
        """The oldest plan in flight and when it is overdue; None with nothing in flight."""
        if not self._in_flight:
            return None
        step, num_tokens, sent_s = self._in_flight[0]
        allowed_s = max(LEAST_S, MARGIN * self._slowest_s * num_tokens) if self._known else self._first_s
        return step, max(sent_s, self._applied_s) + allowed_s
