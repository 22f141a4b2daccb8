"""Who has which KV blocks: tables that grow, windows that move, prefixes that are shared, promises. Knows no slot and no plan.

A sequence has a table in each cache group; position p lives in entry p // block_size of each. In a group without a window,
where the table holds all known tokens from the admission on:

    [0, computed) full, and in the prefix cache where nobody else was first | [computed, len) its own, being written

In a group with a window, where the table grows chunk by chunk:

    [0, first) given back, or never held: 0, read by nobody | [first, computed) as above | [computed, len) as above

`first` is the first block that position `computed` sees. What lies before is given back when the result is applied that moves
`computed`: no plan in flight or to come computes an earlier position. Like the blocks of an ended sequence it can be found
until it is taken for something else.

A block is known by its group and a hash of its tokens chained to the block before it; the chain begins with the request's
cache_salt. `pending` blocks are being computed by a running sequence, in all groups: who needs the same prefix waits for
them instead of computing it again, which is also how the choices of a request come to share their prompt.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import zip_longest

from tpserve.scheduling.block_pool import BlockPool
from tpserve.scheduling.scheduler_config import SchedulerConfig
from tpserve.scheduling.sequence import Sequence
from tpserve.types.window import first_block, max_blocks

HASH_BYTES = 16
"""Collisions cannot be found on purpose, which Python's own hash would allow."""


@dataclass(frozen=True)
class PrefixMatch:
    """What a waiting sequence finds: `shared` leading blocks are cached, as far as a position after them sees them.

    `free`: how many of the blocks to share are in no table. `next`: the hash of the first full block that is not cached, if
    there is one; `pending`: somebody is computing it.
    """

    shared: int = 0
    free: int = 0
    next: bytes = b""
    pending: bool = False


@dataclass(frozen=True)
class AdmissionPlan:
    """What admitting a sequence comes to: `count` positions at once, `taken` free blocks, and `reserve` left for it."""

    count: int
    taken: int
    reserve: int


class BlockManager:
    """The tables of all sequences, over one pool, and what is promised."""

    def __init__(self, limits: SchedulerConfig) -> None:
        self._limits, self._size = limits, limits.block_size
        self._pool = BlockPool(limits.num_blocks, len(limits.windows))
        self._groups = tuple(enumerate(limits.windows))
        self._windowed = tuple((group, window) for group, window in self._groups if window is not None)
        self._full = tuple(group for group, window in self._groups if window is None)
        self._shortest = self._windowed[0][0] if self._windowed else 0
        """A group of which no table is longer than others: those of windows are alike, and grow last."""
        self._pending_prefixes: dict[bytes, Sequence] = {}

    @property
    def available(self) -> int:
        """Blocks in no table."""
        return self._pool.num_free

    @property
    def used(self) -> int:
        return self._limits.num_blocks - self._pool.num_free

    # counting

    def num_held(self, sequence: Sequence) -> int:
        """Blocks in a running sequence's tables."""
        return sum(map(len, sequence.tables)) - sum(self._first(sequence.computed, window) for _, window in self._windowed)

    def num_missing(self, sequence: Sequence, positions: int) -> int:
        """Blocks that a running sequence needs on top of its own to hold its first `positions` positions."""
        if positions <= len(sequence.tables[self._shortest]) * self._size:
            return 0
        goal = self._limits.blocks_for(positions)
        return sum(max(0, goal - len(table)) for table in sequence.tables)

    def max_positions(self, sequence: Sequence, free: int) -> int:
        """How many positions a running sequence can hold if it takes `free` blocks at most, of its known ones."""
        more = free // len(self._windowed) if self._windowed else 0
        return (len(sequence.tables[self._shortest]) + more) * self._size

    def reserve(self, sequence: Sequence) -> int:
        """Blocks to leave for a running sequence: one for each table that will grow."""
        whole = self._limits.blocks_for(sequence.end - 1)
        return sum(whole > len(table) for table in sequence.tables)

    def need(self, sequence: Sequence, match: PrefixMatch) -> int:
        """Free blocks without which a waiting sequence is not admitted: for all known tokens, in windows for what they see."""
        known = self._limits.blocks_for(sequence.known)
        need = match.free + len(self._full) * (known - match.shared)
        for _, window in self._windowed:
            first = self._first(match.shared * self._size, window)
            need += min(first + max_blocks(sequence.known, window, self._size), known) - match.shared
        return need

    def plan_admission(self, sequence: Sequence, match: PrefixMatch, budget: int, spare: int) -> AdmissionPlan | None:
        """How to admit a waiting sequence with `spare` blocks and at most `budget` positions; None when blocks are too few."""
        if spare < self.need(sequence, match):
            return None
        start, known, whole = match.shared * self._size, *map(self._limits.blocks_for, (sequence.known, sequence.end - 1))
        num_full, num_windowed = len(self._full), len(self._windowed)
        taken, count = match.free + num_full * (known - match.shared), min(sequence.todo - start, budget)
        if num_windowed:
            count = min(count, (spare - taken) // num_windowed * self._size)
        held = self._limits.blocks_for(start + count)
        taken += num_windowed * (held - match.shared)
        return AdmissionPlan(count, taken, num_full * (whole > known) + num_windowed * (whole > held))

    def _first(self, position: int, window: int | None) -> int:
        return first_block(position, window, self._size)

    # finding

    def match(self, sequence: Sequence) -> PrefixMatch:
        """How a waiting sequence would begin. The last token is always computed, because the next one is drawn from it."""
        if not self._limits.prefix_caching or sequence.unscored:
            return PrefixMatch()
        if self._is_pending(sequence, sequence.pending_prefix):
            return PrefixMatch(next=sequence.pending_prefix, pending=True)
        length = len(sequence.tokens)
        chain = self._chain(sequence, length // self._size)
        shared = self._within_windows(chain, self._leading(chain, (length - 1) // self._size))
        free = sum(self._pool.is_free(block) for _, block in self._to_share(chain, shared))
        if shared == len(chain) or self._is_known(chain[shared]):
            return PrefixMatch(shared, free)
        sequence.pending_prefix = chain[shared]
        return PrefixMatch(shared, free, chain[shared], self._is_pending(sequence, chain[shared]))

    def _leading(self, chain: list[bytes], most: int) -> int:
        """How many leading blocks, up to `most`, are known in all groups that keep every position."""
        for group in self._full:
            most = next((index for index in range(most) if self._pool.find(group, chain[index]) is None), most)
        return most

    def _within_windows(self, chain: list[bytes], most: int) -> int:
        """The largest number of leading blocks, up to `most`, of which all is known that each window sees after them."""
        known = [(self._pool.known(group, chain[:most]), window) for group, window in self._windowed]
        shared = most
        while True:
            before = shared
            for blocks, window in known:
                gap = blocks.rfind(0, self._first(shared * self._size, window), shared)
                if gap >= 0:
                    shared = blocks.rfind(1, 0, gap) + 1
            if shared == before:
                return shared

    def _to_share(self, chain: list[bytes], shared: int) -> Iterator[tuple[int, int]]:
        """(group, block) of all that a sequence holds which begins with so many shared blocks, table by table, in order."""
        for group, window in self._groups:
            for hash in chain[self._first(shared * self._size, window) : shared]:
                block = self._pool.find(group, hash)
                assert block is not None, "what was matched is still there"
                yield group, block

    def _is_known(self, hash: bytes) -> bool:
        """Whether all groups know a block."""
        return all(self._pool.find(group, hash) is not None for group, _ in self._groups)

    def _is_pending(self, sequence: Sequence, hash: bytes) -> bool:
        """Whether to wait for a block. Never for a sequence that others may overtake more easily."""
        owner = self._pending_prefixes.get(hash)
        return owner is not None and not owner.ended and owner.request.priority <= sequence.request.priority

    # taking and giving back

    def share(self, sequence: Sequence, count: int) -> None:
        """Begin the tables with `count` cached blocks, and promise the full ones that follow."""
        sequence.computed = count * self._size
        sequence.tables = tuple([0] * self._first(sequence.computed, window) for _, window in self._groups)
        if not self._limits.prefix_caching:
            return
        chain = self._chain(sequence, len(sequence.tokens) // self._size)
        for group, block in self._to_share(chain, count):
            self._pool.share(block)
            sequence.tables[group].append(block)
        for hash in chain[count:]:
            if (owner := self._pending_prefixes.get(hash)) is None or owner.ended:
                self._pending_prefixes[hash] = sequence

    def allocate(self, sequence: Sequence, count: int) -> None:
        """Let the tables that were begun hold all known positions, those of windows `count` more than are shared."""
        for group, window in self._groups:
            positions = sequence.known if window is None else sequence.computed + count
            table = sequence.tables[group]
            table.extend(self._pool.take() for _ in range(self._limits.blocks_for(positions) - len(table)))

    def grow(self, sequence: Sequence, positions: int) -> tuple[tuple[int, ...], ...]:
        """Let the tables hold `positions` positions and return the new blocks of each group, () if there are none."""
        if positions <= len(sequence.tables[self._shortest]) * self._size:
            return ()
        goal = self._limits.blocks_for(positions)
        new = tuple(tuple(self._pool.take() for _ in range(goal - len(table))) for table in sequence.tables)
        for table, ids in zip(sequence.tables, new, strict=True):
            table.extend(ids)
        return new

    def commit(self, sequence: Sequence, computed: int) -> None:
        """Positions [0, computed) are in the cache for good: full blocks can be shared, and what no window sees is given back."""
        before, sequence.computed = sequence.computed, computed
        if computed < sequence.due:
            return
        done, full = before // self._size, computed // self._size
        sequence.due = (full + 1) * self._size
        if self._limits.prefix_caching:
            for index, hash in enumerate(self._chain(sequence, full)[done:], done):
                for group, _ in self._groups:
                    self._pool.publish(sequence.tables[group][index], group, hash)
                self._drop_pending(sequence, hash)
        for group, window in self._windowed:
            old, first, table = self._first(before, window), self._first(computed, window), sequence.tables[group]
            if old < first:
                self._pool.release(reversed(table[old:first]))
                table[old:first] = [0] * (first - old)
            sequence.due = min(sequence.due, (first + 1) * self._size + window - 1)

    def free(self, sequence: Sequence) -> None:
        """Take all blocks back. Full ones can still be found, until they are needed for something else: of a prefix, its end."""
        held = [sequence.tables[group][self._first(sequence.computed, window) :] for group, window in self._groups]
        rows = zip_longest(*map(reversed, held), fillvalue=None)
        self._pool.release(block for row in rows for block in row if block is not None)
        for hash in sequence.hashes[sequence.computed // self._size :]:
            self._drop_pending(sequence, hash)
        sequence.tables, sequence.computed, sequence.due = (), 0, 0

    def _drop_pending(self, sequence: Sequence, hash: bytes) -> None:
        if self._pending_prefixes.get(hash) is sequence:
            del self._pending_prefixes[hash]

    def _chain(self, sequence: Sequence, count: int) -> list[bytes]:
        """Hashes of the first `count` full blocks."""
        hashes = sequence.hashes
        if len(hashes) < count:
            last = hashes[-1] if hashes else _digest(sequence.request.cache_salt.encode(), b"root")
            for index in range(len(hashes), count):
                last = _digest(last + sequence.tokens[index * self._size : (index + 1) * self._size].tobytes())
                hashes.append(last)
        return hashes if len(hashes) == count else hashes[:count]


def _digest(data: bytes, kind: bytes = b"block") -> bytes:
    return blake2b(data, digest_size=HASH_BYTES, person=kind).digest()
