"""The KV blocks of one cache group, with those that can be found again. Owns their state; knows no sequence.

    in use    refs > 0: in the tables of so many sequences; full and known by its hash, or still being written by its one owner
    cached    refs = 0, free, and known by its hash until it is taken; least recently used first
    blank     refs = 0, free, taken before any cached one

A hash stands for a block's tokens and all tokens before them, so equal hashes mean equal contents. A block never changes
while it is known by its hash.
"""

from collections import OrderedDict
from collections.abc import Iterable


class Pool:
    """`num_blocks` blocks, all blank at first."""

    def __init__(self, num_blocks: int) -> None:
        self._refs = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._known: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        """In the order in which they are taken."""

    @property
    def num_free(self) -> int:
        """Blocks in no table."""
        return len(self._free)

    def find(self, hash: bytes) -> int | None:
        """The block of these contents, if there is one."""
        return self._known.get(hash)

    def is_free(self, block: int) -> bool:
        return not self._refs[block]

    def share(self, block: int) -> None:
        """One table more holds a known block."""
        if not self._refs[block]:
            del self._free[block]
        self._refs[block] += 1

    def take(self) -> int:
        """A block to be written. What it held is forgotten."""
        block, _ = self._free.popitem(last=False)
        if (hash := self._hashes[block]) is not None:
            del self._known[hash]
            self._hashes[block] = None
        self._refs[block] = 1
        return block

    def publish(self, block: int, hash: bytes) -> None:
        """The block is full from now on, and found by its hash; a second block of the same contents stays unknown."""
        if hash not in self._known:
            self._known[hash] = block
            self._hashes[block] = hash

    def release(self, table: Iterable[int]) -> None:
        """One table less holds these blocks. The last ones go first when blocks are taken: a prefix is of use without its end."""
        for block in reversed(list(table)):
            self._refs[block] -= 1
            if not self._refs[block]:
                self._free[block] = None
                if self._hashes[block] is None:
                    self._free.move_to_end(block, last=False)
