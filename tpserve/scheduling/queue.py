"""Sequences that have no slot yet, first come, first served. A preempted one goes back to the head; any may leave by id."""

from collections import OrderedDict
from collections.abc import Iterator

from tpserve.scheduling.sequence import Sequence


class WaitingQueue:
    """Arrival order. Every waiting sequence came after every running one, because only the youngest is ever preempted."""

    def __init__(self) -> None:
        self._sequences: OrderedDict[int, Sequence] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())

    def get(self, id: int) -> Sequence | None:
        return self._sequences.get(id)

    def append(self, sequence: Sequence) -> None:
        self._sequences[sequence.request.id] = sequence

    def push_head(self, sequence: Sequence) -> None:
        self._sequences[sequence.request.id] = sequence
        self._sequences.move_to_end(sequence.request.id, last=False)

    def pop(self, id: int) -> Sequence | None:
        return self._sequences.pop(id, None)
