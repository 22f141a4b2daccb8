"""What a rank sends for operators only: its log lines and the token counts of its experts.

Owns the positions up to which each was sent. Never affects serving. Each line is sent once, and counts only after a change.
"""

from collections.abc import Callable
from typing import Protocol

from tpserve.process.orders import Orders
from tpserve.types.messages import ExpertLoad, LogLines, RankMessage


class LogSource(Protocol):
    """A rank's log buffer (`observe.log.LogRingBuffer`). `last_error`: the last error logged, without rank and time."""

    last_error: str
    num_errors: int

    def since(self, number: int) -> tuple[int, list[str]]:
        """The number of the first line at or after `number` that is still buffered, and the lines from there on."""


class Telemetry:
    """The telemetry of one incarnation of a rank."""

    def __init__(self, rank: int, orders: Orders) -> None:
        self._rank, self._orders = rank, orders
        self._source: LogSource | None = None
        self._lines_sent = self._errors_sent = 0
        self._layers: tuple[int, ...] = ()
        self._read_counts: Callable[[], bytes] | None = None
        self._counts_sent = b""

    def attach_log(self, source: LogSource) -> None:
        """Send the lines of `source` from now on."""
        self._source = source

    def attach_expert_load(self, layers: tuple[int, ...], read: Callable[[], bytes]) -> None:
        """Send the token counts of these layers' experts from now on. The control thread calls `read`."""
        self._layers, self._read_counts = layers, read

    def messages(self) -> list[RankMessage]:
        """The messages with everything new since the last call."""
        return [*self.counts(), *self.log()]

    def counts(self) -> list[RankMessage]:
        """The experts' token counts, if they have changed."""
        if self._orders.run is None or self._read_counts is None or (counts := self._read_counts()) == self._counts_sent:
            return []
        self._counts_sent = counts
        return [ExpertLoad(self._rank, self._orders.epoch, self._layers, counts)]

    def log(self) -> list[RankMessage]:
        """The next log lines that were not sent yet."""
        if self._source is None:
            return []
        start, lines = self._source.since(self._lines_sent)
        if not lines:
            return []
        num_errors = self._source.num_errors
        last_error = self._source.last_error if num_errors != self._errors_sent else ""
        self._lines_sent, self._errors_sent = start + len(lines), num_errors
        return [LogLines(self._rank, start, tuple(lines), last_error)]
