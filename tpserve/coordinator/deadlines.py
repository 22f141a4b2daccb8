"""How long the coordinator waits, and since when. Pure: times are arguments, in seconds of any monotonic clock."""

BLOCKED_S = 1.0
"""A coordinator that was itself blocked for this long cannot tell which ranks were silent, and resets all timers."""


class Deadlines:
    """`form_timeout_s` bounds the first start and `recovery_timeout_s` a recovery, counted from the last progress of any rank;
    `drain_timeout_s` bounds a drain."""

    def __init__(self, now: float, form_timeout_s: float, recovery_timeout_s: float, drain_timeout_s: float) -> None:
        self.set_timeouts(form_timeout_s, recovery_timeout_s, drain_timeout_s)
        self._drain_began_s: float | None = None
        self._progress_s = self._ticked_s = now

    def set_timeouts(self, form_timeout_s: float, recovery_timeout_s: float, drain_timeout_s: float) -> None:
        """Change what the constructor has got."""
        self.form_timeout_s, self._recovery_timeout_s = form_timeout_s, recovery_timeout_s
        self.drain_timeout_s = drain_timeout_s

    @property
    def draining(self) -> bool:
        """Whether a drain has begun."""
        return self._drain_began_s is not None

    def begin_drain(self, now: float) -> None:
        """A drain begins."""
        self._drain_began_s = now

    def drain_over(self, now: float) -> bool:
        """Whether a drain has lasted long enough."""
        return self._drain_began_s is not None and now - self._drain_began_s > self.drain_timeout_s

    def note_progress(self, now: float) -> None:
        """A rank is further."""
        self._progress_s = now

    def note_tick(self, now: float) -> bool:
        """The owner lives; returns whether it was blocked since the last time."""
        blocked, self._ticked_s = now - self._ticked_s > BLOCKED_S, now
        return blocked

    def start_over(self, now: float, recovering: bool) -> float | None:
        """The limit for a start without progress, in seconds, if it is exceeded."""
        limit_s = self._recovery_timeout_s if recovering else self.form_timeout_s
        return limit_s if now - self._progress_s > limit_s else None
