"""Whom the next plan serves. Reads sequences, slots and blocks, and takes nothing: a batch is computed whole, against counts,
and then committed or dropped by the scheduler, never undone.

    decodes     all that are ready; each may need a block, and when there is none somebody must be preempted
    prompts     in progress: they grow in windows only. One that runs short there gets a smaller chunk, or none until others go
                on, or until a result gives it back what its last chunk took
    admissions  in order, while slots, budget, blocks and the plan's bytes last, leaving blocks for those that run. Who is
                admitted while budget and blocks are left gets all of its prompt, so that no two prompts in progress ever wait
                for each other
"""

from collections.abc import Iterable, Mapping
from math import ceil

from tpserve.scheduling.block_manager import BlockManager
from tpserve.scheduling.queue import WaitingQueue
from tpserve.scheduling.scheduler_config import SchedulerConfig
from tpserve.scheduling.sequence import Sequence

ScheduledBatch = list[tuple[Sequence, int, int]]
"""Whom the next plan serves, and how many positions each; sequences without a slot are to be admitted, with so many cached
blocks."""


class SchedulingPolicy:
    """Over the sequences that wait and run, which are the scheduler's."""

    def __init__(
        self, limits: SchedulerConfig, blocks: BlockManager, waiting: WaitingQueue, running: Mapping[int, Sequence]
    ) -> None:
        self._limits, self._blocks, self._waiting, self._running = limits, blocks, waiting, running

    def next_batch(self, num_slots: int, num_in_flight: int) -> ScheduledBatch | None:
        """The next batch, with `num_slots` free and so many plans in flight; None when somebody must be preempted first."""
        batch: ScheduledBatch = []
        budget, free = self._limits.max_num_batched_tokens, self._blocks.available
        ready = [s for s in self._running.values() if s.todo and not (self._limits.sync_sampling and s.draws)]
        decodes = [s for s in ready if s.todo == 1]
        for sequence in decodes[: min(budget, self._decode_share(len(decodes), num_in_flight))]:
            free -= self._blocks.num_missing(sequence, sequence.planned + 1)
            if free < 0:
                assert num_in_flight or len(self._running) > 1, "a sequence that fits the pool alone never runs short alone"
                return None
            batch.append((sequence, 1, 0))
        budget -= len(batch)
        prompts = [s for s in ready if s.todo > 1]
        for sequence in sorted(prompts, key=lambda s: s.order):
            count = min(sequence.todo, budget, self._blocks.max_positions(sequence, free) - sequence.planned)
            if count > 0:
                free -= self._blocks.num_missing(sequence, sequence.planned + count)
                batch.append((sequence, count, 0))
                budget -= count
        assert batch or num_in_flight or not prompts, "a prompt that runs short waits for others, or for what it had itself"
        refused = self._admit(batch, num_slots, budget, free)
        return None if refused is not None and self._outranks(refused) else batch

    def _decode_share(self, ready: int, num_in_flight: int) -> int:
        """Decodes the next plan may hold. With `sync_sampling` they are dealt out over all plans in flight: stages never stand
        idle."""
        if not self._limits.sync_sampling:
            return ready
        depth = self._limits.depth
        return min(ceil(ready / (depth - num_in_flight)), ceil(len(self._running) / depth))

    def _admit(self, batch: ScheduledBatch, slots: int, budget: int, free: int) -> Sequence | None:
        """Extend the batch by waiting sequences in order, while slots, budget, blocks and bytes last.

        Returns the first for which there was no slot or not enough blocks. A sequence is admitted with blocks for all its
        known tokens, in windows for those of its first chunk, so that mostly decodes run short. Blocks are left for all that
        run: what is admitted now is not preempted a few steps later.
        """
        if not (budget and self._waiting):
            return None
        begun = set[bytes]()
        reserve = self._reserve(self._running.values())
        room = self._limits.max_admission_bytes
        for sequence in self._waiting:
            match = self._blocks.match(sequence)
            if match.pending or match.next in begun:
                continue
            entry = self._blocks.plan_admission(sequence, match, budget, free - reserve) if slots else None
            if entry is None:
                return sequence
            room -= self._limits.admission_bytes(sequence.params_bytes, len(sequence.tokens))
            if room < 0:  # the next plan begins with it: none is larger than all room
                return None
            batch.append((sequence, entry.count, match.shared))
            budget -= entry.count
            if not budget:
                return None
            slots -= 1
            free -= entry.taken
            reserve += entry.reserve
            if match.next:
                begun.add(match.next)
        return None

    def _outranks(self, refused: Sequence) -> bool:
        """Whether it can be placed once sequences of a higher priority number have given way."""
        priority, _ = refused.order
        rest, held = [], 0
        for sequence in self._running.values():
            if sequence.order[0] > priority:
                held += self._blocks.num_held(sequence)
            else:
                rest.append(sequence)
        if len(rest) == len(self._running):
            return False
        need = self._blocks.need(refused, self._blocks.match(refused))
        return self._blocks.available + held - need >= self._reserve(rest)

    def _reserve(self, sequences: Iterable[Sequence]) -> int:
        """Blocks left for those that will still need some."""
        return sum(map(self._blocks.reserve, sequences))
