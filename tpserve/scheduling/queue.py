"""Sequences that have no slot yet: lower priority numbers first, then first come, first served. Any may leave by id."""

from bisect import bisect_left, insort
from collections.abc import Iterator

from tpserve.scheduling.sequence import Sequence


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


class WaitingQueue:
    """A preempted sequence keeps its number of arrival, and so its place."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self._by_id: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def get(self, id: int) -> Sequence | None:
        return self._by_id.get(id)

    def add(self, sequence: Sequence) -> None:
        self._by_id[sequence.request.id] = sequence
        insort(self._sequences, sequence, key=_order)

    def pop(self, id: int) -> Sequence | None:
        if (sequence := self._by_id.pop(id, None)) is not None:
            del self._sequences[bisect_left(self._sequences, sequence.order, key=_order)]
        return sequence
