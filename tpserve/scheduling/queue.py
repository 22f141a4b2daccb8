"""The waiting queue: sequences without a slot, in order of priority number, then of arrival."""

from bisect import bisect_left, insort
from collections.abc import Iterator

from tpserve.scheduling.sequence import Sequence


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


class WaitingQueue:
    """Sorted by `Sequence.order`, with access by request id. A preempted sequence keeps its arrival number, and so its place."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self._by_id: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def get(self, id: int) -> Sequence | None:
        """The waiting sequence of a request, or None."""
        return self._by_id.get(id)

    def add(self, sequence: Sequence) -> None:
        """Insert a sequence at its place in the order."""
        self._by_id[sequence.request.id] = sequence
        insort(self._sequences, sequence, key=_order)

    def pop(self, id: int) -> Sequence | None:
        """Remove and return the sequence of a request; None when it does not wait."""
        if (sequence := self._by_id.pop(id, None)) is not None:
            del self._sequences[bisect_left(self._sequences, sequence.order, key=_order)]
        return sequence
