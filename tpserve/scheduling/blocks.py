"""Who has which KV blocks: tables that grow, prefixes that are shared, promises. Knows no slot and no plan.

A sequence's table, in blocks (every group keeps every position, so tables are of equal length in all groups):

    [0, filled) full, and in the prefix cache where nobody else was first | [filled, len) its own, being written

A block is known by a hash of its tokens chained to the block before it; the chain begins with the request's cache_salt.
`promised` blocks are being computed by a running sequence: who needs the same prefix waits for them instead of computing
it again, which is also how the choices of a request come to share their prompt.
"""

from dataclasses import dataclass
from hashlib import blake2b

from tpserve.scheduling.limits import Limits
from tpserve.scheduling.pool import Pool
from tpserve.scheduling.sequence import Sequence

HASH_BYTES = 16
"""Collisions cannot be found on purpose, which Python's own hash would allow."""


@dataclass(frozen=True)
class Match:
    """What a waiting sequence finds: `shared` leading blocks are cached, `free` of them (of the group with most) in no table.

    `next`: the hash of the first full block that is not cached, if there is one; `promised`: somebody is computing it.
    """

    shared: int = 0
    free: int = 0
    next: bytes = b""
    promised: bool = False


class Blocks:
    """The pools of all cache groups."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._pools = tuple(Pool(limits.num_blocks) for _ in range(limits.num_groups))
        self._promised: dict[bytes, Sequence] = {}

    @property
    def available(self) -> int:
        """Blocks free in every group."""
        return min(pool.num_free for pool in self._pools)

    @property
    def used(self) -> int:
        """Blocks in some table, all groups together."""
        return self._limits.num_blocks * self._limits.num_groups - sum(pool.num_free for pool in self._pools)

    def missing(self, sequence: Sequence, positions: int) -> int:
        """Blocks a sequence needs on top of its own, in each group, to hold its first `positions` positions."""
        held = len(sequence.tables[0]) * self._limits.block_size if sequence.tables else 0
        return self._limits.blocks_for(positions - held) if positions > held else 0

    def match(self, sequence: Sequence) -> Match:
        """How a waiting sequence would begin. The last token is always computed, because the next one is drawn from it."""
        if not self._limits.prefix_caching or sequence.unscored:
            return Match()
        if self._is_promised(sequence, sequence.awaits):
            return Match(next=sequence.awaits, promised=True)
        size, length = self._limits.block_size, len(sequence.tokens)
        most, free = (length - 1) // size, [0] * len(self._pools)
        for shared, hash in enumerate(self._chain(sequence, length // size)):
            blocks = [pool.find(hash) for pool in self._pools]
            if None in blocks:
                sequence.awaits = hash
                return Match(shared, max(free), hash, self._is_promised(sequence, hash))
            if shared < most:
                for group, (pool, block) in enumerate(zip(self._pools, blocks, strict=True)):
                    assert block is not None
                    free[group] += pool.is_free(block)
        return Match(most, max(free))

    def share(self, sequence: Sequence, count: int) -> None:
        """Begin the tables with `count` cached blocks, and promise the full ones that follow."""
        sequence.tables = tuple([] for _ in self._pools)
        sequence.filled = count
        if not self._limits.prefix_caching:
            return
        chain = self._chain(sequence, len(sequence.tokens) // self._limits.block_size)
        for pool, table in zip(self._pools, sequence.tables, strict=True):
            for hash in chain[:count]:
                block = pool.find(hash)
                assert block is not None, "what was matched is still there"
                pool.share(block)
                table.append(block)
        for hash in chain[count:]:
            if (owner := self._promised.get(hash)) is None or owner.ended:
                self._promised[hash] = sequence

    def grow(self, sequence: Sequence, positions: int) -> tuple[tuple[int, ...], ...]:
        """Let the tables hold `positions` positions and return the new blocks of each group, () if there are none."""
        count = self.missing(sequence, positions)
        if not count:
            return ()
        assert count <= self.available, "blocks are counted before they are taken"
        new = tuple(tuple(pool.take() for _ in range(count)) for pool in self._pools)
        for table, ids in zip(sequence.tables, new, strict=True):
            table.extend(ids)
        return new

    def fill(self, sequence: Sequence, computed: int) -> None:
        """Positions [0, computed) are in the cache for good: blocks that are full now can be shared."""
        full = computed // self._limits.block_size
        if full <= sequence.filled or not self._limits.prefix_caching:
            return
        for index, hash in enumerate(self._chain(sequence, full)[sequence.filled :], sequence.filled):
            for pool, table in zip(self._pools, sequence.tables, strict=True):
                pool.publish(table[index], hash)
            self._withdraw(sequence, hash)
        sequence.filled = full

    def release(self, sequence: Sequence) -> None:
        """Take all blocks back. Full ones can still be found, until they are needed for something else."""
        for pool, table in zip(self._pools, sequence.tables, strict=True):
            pool.release(table)
        for hash in sequence.hashes[sequence.filled :]:
            self._withdraw(sequence, hash)
        sequence.tables, sequence.filled = (), 0

    def _is_promised(self, sequence: Sequence, hash: bytes) -> bool:
        """Whether to wait for a block. Never for a sequence that others may overtake more easily."""
        owner = self._promised.get(hash)
        return owner is not None and not owner.ended and owner.request.priority <= sequence.request.priority

    def _withdraw(self, sequence: Sequence, hash: bytes) -> None:
        if self._promised.get(hash) is sequence:
            del self._promised[hash]

    def _chain(self, sequence: Sequence, count: int) -> list[bytes]:
        """Hashes of the first `count` full blocks."""
        hashes, size = sequence.hashes, self._limits.block_size
        if len(hashes) < count:
            last = hashes[-1] if hashes else _digest(sequence.request.cache_salt.encode(), b"root")
            for index in range(len(hashes), count):
                last = _digest(last + sequence.tokens[index * size : (index + 1) * size].tobytes())
                hashes.append(last)
        return hashes if len(hashes) == count else hashes[:count]


def _digest(data: bytes, kind: bytes = b"block") -> bytes:
    return blake2b(data, digest_size=HASH_BYTES, person=kind).digest()
