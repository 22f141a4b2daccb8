"""KV blocks of sequences: block tables, sliding windows, the prefix cache. Never touches a slot or a plan.

A sequence has one block table per cache group; position p is in entry p // block_size of each. In a group without a window
the table covers all known tokens from admission on:

    [0, computed) full, and in the prefix cache unless an equal block is there already | [computed, len) private, being written

In a group with a window the table grows chunk by chunk:

    [0, first) freed, or never allocated: the entry is 0 and never read | [first, computed) as above | [computed, len) as above

`first` is the first block that position `computed` sees. The blocks before it are freed when the result that moves `computed`
is applied: no plan in flight and no later plan computes an earlier position. Freed blocks stay in the prefix cache until they
are allocated again, like those of an ended sequence.

The prefix cache finds a block by its group and by a hash of its tokens and of the block before it. The first hash of a chain
covers the request's cache_salt. A pending prefix is a block that a running sequence is computing, in all groups. A sequence that
needs the same prefix waits for it instead of computing it again; this is also how the choices of a request share their prompt.
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
"""A cryptographic hash: nobody can construct a collision, as they could with Python's own hash."""


@dataclass(frozen=True)
class PrefixMatch:
    """What the prefix cache holds for a waiting sequence.

    `shared`: number of leading blocks that are cached, counting only blocks that a position after them sees. `free`: how many of
    them are in no table. `next_hash`: hash of the first full block that is not cached, b"" without one. `pending`: a running
    sequence computes that block.
    """

    shared: int = 0
    free: int = 0
    next_hash: bytes = b""
    pending: bool = False


@dataclass(frozen=True)
class AdmissionPlan:
    """How to admit a sequence: `count` positions in its first chunk, `taken` free blocks, `reserve` more to keep free."""

    count: int
    taken: int
    reserve: int


class BlockManager:
    """The block tables of all sequences over one block pool, and the pending prefixes."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config, self._size = config, config.block_size
        self._pool = BlockPool(config.num_blocks, len(config.windows))
        self._groups = tuple(enumerate(config.windows))
        self._windowed = tuple((group, window) for group, window in self._groups if window is not None)
        self._full = tuple(group for group, window in self._groups if window is None)
        self._shortest = self._windowed[0][0] if self._windowed else 0
        """A group whose tables are the shortest: tables of groups with windows have equal lengths and grow last."""
        self._pending_prefixes: dict[bytes, Sequence] = {}

    @property
    def available(self) -> int:
        """Number of blocks in no table."""
        return self._pool.num_free

    @property
    def used(self) -> int:
        """Number of blocks in at least one table."""
        return self._config.num_blocks - self._pool.num_free

    # counting

    def num_allocated(self, sequence: Sequence) -> int:
        """Number of blocks in a running sequence's tables."""
        return sum(map(len, sequence.tables)) - sum(
            self._first_visible(sequence.computed, window) for _, window in self._windowed
        )

    def num_new_blocks(self, sequence: Sequence, positions: int) -> int:
        """Number of blocks to allocate before a running sequence can hold its first `positions` positions."""
        if positions <= len(sequence.tables[self._shortest]) * self._size:
            return 0
        goal = self._config.blocks_for(positions)
        return sum(max(0, goal - len(table)) for table in sequence.tables)

    def max_positions(self, sequence: Sequence, free: int) -> int:
        """Number of positions, among the known ones, that a running sequence can hold after allocating at most `free` blocks."""
        more = free // len(self._windowed) if self._windowed else 0
        return (len(sequence.tables[self._shortest]) + more) * self._size

    def reserve(self, sequence: Sequence) -> int:
        """Number of blocks to keep free for a running sequence: one for each table that will grow."""
        final = self._config.blocks_for(sequence.end - 1)
        return sum(final > len(table) for table in sequence.tables)

    def num_required(self, sequence: Sequence, match: PrefixMatch) -> int:
        """Number of free blocks that admission requires: for all known tokens, and in windowed groups for what they see."""
        known = self._config.blocks_for(sequence.known)
        need = match.free + len(self._full) * (known - match.shared)
        for _, window in self._windowed:
            first = self._first_visible(match.shared * self._size, window)
            need += min(first + max_blocks(sequence.known, window, self._size), known) - match.shared
        return need

    def plan_admission(self, sequence: Sequence, match: PrefixMatch, budget: int, spare: int) -> AdmissionPlan | None:
        """How to admit a waiting sequence with `spare` free blocks and at most `budget` positions; None with too few blocks."""
        if spare < self.num_required(sequence, match):
            return None
        start, known, final = match.shared * self._size, *map(self._config.blocks_for, (sequence.known, sequence.end - 1))
        num_full, num_windowed = len(self._full), len(self._windowed)
        taken, count = match.free + num_full * (known - match.shared), min(sequence.num_to_compute - start, budget)
        if num_windowed:
            count = min(count, (spare - taken) // num_windowed * self._size)
        first_chunk = self._config.blocks_for(start + count)
        taken += num_windowed * (first_chunk - match.shared)
        return AdmissionPlan(count, taken, num_full * (final > known) + num_windowed * (final > first_chunk))

    def _first_visible(self, position: int, window: int | None) -> int:
        return first_block(position, window, self._size)

    # prefix cache

    def match(self, sequence: Sequence) -> PrefixMatch:
        """The cached prefix of a waiting sequence. It never includes the last token: its logits give the next token.

        Nor the tokens of which the logits give a known token again.
        """
        if not self._config.prefix_caching or sequence.needs_scores:
            return PrefixMatch()
        if self._is_pending(sequence, sequence.pending_prefix):
            return PrefixMatch(next_hash=sequence.pending_prefix, pending=True)
        most = sequence.first_logits // self._size
        hashes = self._block_hashes(sequence, most if sequence.redrawing else len(sequence.tokens) // self._size)
        shared = self._num_cached_in_windows(hashes, self._num_cached(hashes, most))
        free = sum(self._pool.is_free(block) for _, block in self._shared_blocks(hashes, shared))
        if shared == len(hashes) or self._is_cached(hashes[shared]):
            return PrefixMatch(shared, free)
        sequence.pending_prefix = hashes[shared]
        return PrefixMatch(shared, free, hashes[shared], self._is_pending(sequence, hashes[shared]))

    def _num_cached(self, hashes: list[bytes], most: int) -> int:
        """Number of leading blocks, up to `most`, that are cached in all groups without a window."""
        for group in self._full:
            most = next((index for index in range(most) if self._pool.find(group, hashes[index]) is None), most)
        return most

    def _num_cached_in_windows(self, hashes: list[bytes], most: int) -> int:
        """The largest number of leading blocks, up to `most`, such that each group has cached all that its window sees next."""
        known = [(self._pool.cached_mask(group, hashes[:most]), window) for group, window in self._windowed]
        shared = most
        while True:
            before = shared
            for blocks, window in known:
                gap = blocks.rfind(0, self._first_visible(shared * self._size, window), shared)
                if gap >= 0:
                    shared = blocks.rfind(1, 0, gap) + 1
            if shared == before:
                return shared

    def _shared_blocks(self, hashes: list[bytes], shared: int) -> Iterator[tuple[int, int]]:
        """(group, block) for each block that a sequence shares when it begins with `shared` cached blocks, table by table."""
        for group, window in self._groups:
            for hash in hashes[self._first_visible(shared * self._size, window) : shared]:
                block = self._pool.find(group, hash)
                assert block is not None, "a matched block is still cached"
                yield group, block

    def _is_cached(self, hash: bytes) -> bool:
        """Whether a block is cached in all groups."""
        return all(self._pool.find(group, hash) is not None for group, _ in self._groups)

    def _is_pending(self, sequence: Sequence, hash: bytes) -> bool:
        """Whether `sequence` waits for a block. It never waits for an owner of lower priority, which may be preempted first."""
        owner = self._pending_prefixes.get(hash)
        return owner is not None and not owner.ended and owner.request.priority <= sequence.request.priority

    def reset_cache(self) -> None:
        """Forget every cached block. What running sequences compute from now on is cached again."""
        self._pool.forget()

    # allocation

    def share(self, sequence: Sequence, count: int) -> None:
        """Start the tables with `count` cached blocks and register the full blocks after them as pending prefixes."""
        sequence.computed = count * self._size
        sequence.tables = tuple([0] * self._first_visible(sequence.computed, window) for _, window in self._groups)
        if not self._config.prefix_caching:
            return
        hashes = self._block_hashes(sequence, len(sequence.tokens) // self._size)
        for group, block in self._shared_blocks(hashes, count):
            self._pool.share(block)
            sequence.tables[group].append(block)
        for hash in hashes[count:]:
            if (owner := self._pending_prefixes.get(hash)) is None or owner.ended:
                self._pending_prefixes[hash] = sequence

    def allocate(self, sequence: Sequence, count: int) -> None:
        """Extend new tables to all known positions, in windowed groups to `count` positions after the shared ones."""
        for group, window in self._groups:
            positions = sequence.known if window is None else sequence.computed + count
            table = sequence.tables[group]
            table.extend(self._pool.allocate() for _ in range(self._config.blocks_for(positions) - len(table)))

    def grow(self, sequence: Sequence, positions: int) -> tuple[tuple[int, ...], ...]:
        """Extend all tables to `positions` positions. Returns the new blocks of each group, () without any."""
        if positions <= len(sequence.tables[self._shortest]) * self._size:
            return ()
        goal = self._config.blocks_for(positions)
        new = tuple(tuple(self._pool.allocate() for _ in range(goal - len(table))) for table in sequence.tables)
        for table, ids in zip(sequence.tables, new, strict=True):
            table.extend(ids)
        return new

    def commit(self, sequence: Sequence, computed: int) -> None:
        """Record that positions [0, computed) are in the KV cache: publish full blocks, free those that no window sees."""
        before, sequence.computed = sequence.computed, computed
        if computed < sequence.next_boundary:
            return
        done, full = before // self._size, computed // self._size
        sequence.next_boundary = (full + 1) * self._size
        if self._config.prefix_caching:
            for index, hash in enumerate(self._block_hashes(sequence, full)[done:], done):
                for group, _ in self._groups:
                    self._pool.publish(sequence.tables[group][index], group, hash)
                self._drop_pending(sequence, hash)
        for group, window in self._windowed:
            old, first, table = self._first_visible(before, window), self._first_visible(computed, window), sequence.tables[group]
            if old < first:
                self._pool.release(reversed(table[old:first]))
                table[old:first] = [0] * (first - old)
            sequence.next_boundary = min(sequence.next_boundary, (first + 1) * self._size + window - 1)

    def free(self, sequence: Sequence) -> None:
        """Free all blocks. Full ones stay cached until they are allocated again, the end of a prefix before its beginning."""
        tables = [sequence.tables[group][self._first_visible(sequence.computed, window) :] for group, window in self._groups]
        rows = zip_longest(*map(reversed, tables), fillvalue=None)
        self._pool.release(block for row in rows for block in row if block is not None)
        for hash in sequence.hashes[sequence.computed // self._size :]:
            self._drop_pending(sequence, hash)
        sequence.tables, sequence.computed, sequence.next_boundary = (), 0, 0

    def _drop_pending(self, sequence: Sequence, hash: bytes) -> None:
        if self._pending_prefixes.get(hash) is sequence:
            del self._pending_prefixes[hash]

    def _block_hashes(self, sequence: Sequence, count: int) -> list[bytes]:
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
