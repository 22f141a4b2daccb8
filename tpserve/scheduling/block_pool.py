"""The KV blocks that all cache groups share, with reference counts and the prefix cache's index. Knows no sequence.

    in use    refs > 0, the number of tables that hold it: full and indexed by its key, or being written by its one owner
    cached    refs = 0, free, indexed by its key until it is allocated; the least recently used is allocated first
    blank     refs = 0, free, without a key; allocated before any cached block

A key is (group, hash), where the hash covers the block's tokens and all tokens before them. Blocks of equal keys have equal
contents. A block serves one group at a time, and its contents never change while it has a key.
"""

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """`num_blocks` blocks, all blank at the start."""

    def __init__(self, num_blocks: int, num_groups: int) -> None:
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._keys: list[tuple[int, bytes] | None] = [None] * num_blocks
        self._cached: tuple[dict[bytes, int], ...] = tuple({} for _ in range(num_groups))
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        """In allocation order."""

    @property
    def num_free(self) -> int:
        """Number of blocks in no table."""
        return len(self._free)

    def find(self, group: int, hash: bytes) -> int | None:
        """The block of `group` with this key, or None."""
        return self._cached[group].get(hash)

    def cached_mask(self, group: int, hashes: Iterable[bytes]) -> bytes:
        """One byte per hash: 1 when `group` has a block with this key, else 0."""
        cached = self._cached[group]
        return bytes([hash in cached for hash in hashes])

    def is_free(self, block: int) -> bool:
        """Whether a block is in no table."""
        return not self._refs[block]

    def share(self, block: int) -> None:
        """Add a reference to a cached block."""
        if not self._refs[block]:
            del self._free[block]
        self._refs[block] += 1

    def allocate(self) -> int:
        """Take a free block for writing; it loses its key. KeyError without a free block."""
        block, _ = self._free.popitem(last=False)
        if (key := self._keys[block]) is not None:
            group, hash = key
            del self._cached[group][hash]
            self._keys[block] = None
        self._refs[block] = 1
        return block

    def publish(self, block: int, group: int, hash: bytes) -> None:
        """Index a full block by its key. A second block with the same key stays without one."""
        cached = self._cached[group]
        if hash not in cached:
            cached[hash] = block
            self._keys[block] = (group, hash)

    def forget(self) -> None:
        """Drop the key of every block: nothing is found any more. Tables keep their blocks."""
        for cached in self._cached:
            cached.clear()
        self._keys = [None] * self.num_blocks

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one reference of each block. Blocks that become free are allocated again in the order given here."""
        for block in blocks:
            self._refs[block] -= 1
            if not self._refs[block]:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)
