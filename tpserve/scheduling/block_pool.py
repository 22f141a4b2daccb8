"""The KV blocks that all cache groups share, with those that can be found again. Owns their state; knows no sequence.

    in use    refs > 0: in the tables of so many sequences; full and known by its key, or still being written by its one owner
    cached    refs = 0, free, and known by its key until it is taken; least recently used first
    blank     refs = 0, free, taken before any cached one

A key is a group and a hash, which stands for a block's tokens and all tokens before them: of equal keys, contents are equal.
A block serves one group at a time, any of them, and never changes while it is known by its key.
"""

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """`num_blocks` blocks, all blank at first."""

    def __init__(self, num_blocks: int, num_groups: int) -> None:
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._keys: list[tuple[int, bytes] | None] = [None] * num_blocks
        self._known: tuple[dict[bytes, int], ...] = tuple({} for _ in range(num_groups))
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        """In the order in which they are taken."""

    @property
    def num_free(self) -> int:
        """Blocks in no table."""
        return len(self._free)

    def find(self, group: int, hash: bytes) -> int | None:
        """The group's block of these contents, if there is one."""
        return self._known[group].get(hash)

    def known(self, group: int, hashes: Iterable[bytes]) -> bytes:
        """For each hash 1 where the group has such a block, else 0."""
        known = self._known[group]
        return bytes([hash in known for hash in hashes])

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
        if (key := self._keys[block]) is not None:
            group, hash = key
            del self._known[group][hash]
            self._keys[block] = None
        self._refs[block] = 1
        return block

    def publish(self, block: int, group: int, hash: bytes) -> None:
        """The block is full from now on, and found by its key; a second block of the same contents stays unknown."""
        known = self._known[group]
        if hash not in known:
            known[hash] = block
            self._keys[block] = (group, hash)

    def release(self, blocks: Iterable[int]) -> None:
        """One table less holds each of these blocks. They are taken in the order in which they come here."""
        for block in blocks:
            self._refs[block] -= 1
            if not self._refs[block]:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)
