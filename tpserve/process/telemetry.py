"""What a rank tells for operators alone: its log lines and its experts' counts. Nothing is decided by it, nothing repeated."""

from collections.abc import Callable
from typing import Protocol

from tpserve.process.orders import Orders
from tpserve.types.messages import ExpertLoad, LogLines, RankMessage


class Lines(Protocol):
    """A rank's log as it is kept; `observe.log.Kept`. `last_error`: the last error that it logged, without who and when."""

    last_error: str
    num_errors: int

    def since(self, number: int) -> tuple[int, list[str]]:
        """Lines that follow each other, from `number` on or later, and the number of the first."""


class Telemetry:
    """One rank's, for one incarnation."""

    def __init__(self, rank: int, orders: Orders) -> None:
        self._rank, self._orders = rank, orders
        self._lines: Lines | None = None
        self._lines_told = self._errors_told = 0
        self._layers: tuple[int, ...] = ()
        self._read_counts: Callable[[], bytes] | None = None
        self._counts_told = b""

    def repeat(self, lines: Lines) -> None:
        """Tell from now on what this rank logs."""
        self._lines = lines

    def count(self, layers: tuple[int, ...], read: Callable[[], bytes]) -> None:
        """Tell from now on what the experts of these layers have had; `read` is called on the control thread."""
        self._layers, self._read_counts = layers, read

    def messages(self) -> list[RankMessage]:
        """What is new since the last call."""
        return [*self.counts(), *self.log()]

    def counts(self) -> list[RankMessage]:
        """The experts' counts, if they have changed."""
        if self._orders.run is None or self._read_counts is None or (counts := self._read_counts()) == self._counts_told:
            return []
        self._counts_told = counts
        return [ExpertLoad(self._rank, self._orders.epoch, self._layers, counts)]

    def log(self) -> list[RankMessage]:
        """Lines that were not told, some at a time."""
        if self._lines is None:
            return []
        start, lines = self._lines.since(self._lines_told)
        if not lines:
            return []
        self._lines_told, told, self._errors_told = start + len(lines), self._errors_told, self._lines.num_errors
        last_error = self._lines.last_error if self._errors_told != told else ""
        return [LogLines(self._rank, start, tuple(lines), last_error)]
