"""The KV blocks of each cache group and who may have them. Owns the free lists; knows no slot and no plan.

Every block of a group is either free or in exactly one sequence's table. Today every group keeps every position, so a
sequence has tables of equal length in all groups.
"""

from collections import deque

from tpserve.scheduling.limits import Limits
from tpserve.scheduling.sequence import Sequence


class Blocks:
    """Free lists, first freed first reused, one a cache group."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._free = tuple(deque(range(limits.num_blocks)) for _ in range(limits.num_groups))

    @property
    def available(self) -> int:
        """Blocks free in every group."""
        return min(len(free) for free in self._free)

    @property
    def used(self) -> int:
        """Blocks in some table, all groups together."""
        return self._limits.num_blocks * self._limits.num_groups - sum(len(free) for free in self._free)

    def missing(self, sequence: Sequence, positions: int) -> int:
        """Blocks a sequence needs on top of its own, in each group, to hold its first `positions` positions."""
        owned = len(sequence.tables[0]) if sequence.tables else 0
        return max(0, self._limits.blocks_for(positions) - owned)

    def grow(self, sequence: Sequence, positions: int) -> tuple[tuple[int, ...], ...]:
        """Let the tables hold `positions` positions and return the new blocks of each group, () if there are none."""
        count = self.missing(sequence, positions)
        if not count:
            return ()
        assert count <= self.available, "blocks are counted before they are taken"
        if not sequence.tables:
            sequence.tables = tuple([] for _ in self._free)
        new = tuple(tuple(free.popleft() for _ in range(count)) for free in self._free)
        for table, ids in zip(sequence.tables, new, strict=True):
            table.extend(ids)
        return new

    def release(self, sequence: Sequence) -> None:
        """Take all blocks back."""
        for free, table in zip(self._free, sequence.tables, strict=True):
            free.extend(table)
        sequence.tables = ()
