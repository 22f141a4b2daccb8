"""The scheduling policy: which sequences the next plan serves, and how many positions of each.

Reads sequences, slots and blocks and changes none of them: it computes a batch against counts, and the scheduler commits that
batch or drops it. Nothing is ever undone.

    decodes     all that are ready. Each may need a block; without a free block a sequence must be preempted
    prefills    of running sequences. Only tables with windows grow here; when blocks are short the chunk is smaller, or the
                sequence waits until others proceed or until a result frees the blocks of its last chunk
    admissions  in queue order, while slots, token budget, blocks and the plan's bytes last, with blocks reserved for running
                sequences. While budget and blocks last a new sequence gets its whole prompt, so two prefills never wait for
                each other
"""

from collections.abc import Iterable, Mapping
from math import ceil

from tpserve.scheduling.block_manager import BlockManager
from tpserve.scheduling.queue import WaitingQueue
from tpserve.scheduling.scheduler_config import SchedulerConfig
from tpserve.scheduling.sequence import Sequence

ScheduledBatch = list[tuple[Sequence, int, int]]
"""(sequence, number of positions, number of cached blocks) of the next plan; the last is for sequences without a slot, which the
plan admits, and 0 otherwise."""


class SchedulingPolicy:
    """Reads the scheduler's waiting and running sequences; owns no state."""

    def __init__(
        self, config: SchedulerConfig, blocks: BlockManager, waiting: WaitingQueue, running: Mapping[int, Sequence]
    ) -> None:
        self._config, self._blocks, self._waiting, self._running = config, blocks, waiting, running

    def next_batch(self, num_slots: int, num_in_flight: int, *, begins: bool = True) -> ScheduledBatch | None:
        """The next batch, with `num_slots` free slots; None when a running sequence must be preempted first.

        `begins`: whether sequences of which nothing is computed may be admitted.
        """
        batch: ScheduledBatch = []
        budget, free = self._config.max_num_batched_tokens, self._blocks.available
        ready = [s for s in self._running.values() if s.num_to_compute and not (self._config.sync_sampling and s.pending_draws)]
        decodes = [s for s in ready if s.num_to_compute == 1]
        for sequence in decodes[: min(budget, self._decode_share(len(decodes), num_in_flight))]:
            free -= self._blocks.num_new_blocks(sequence, sequence.planned + 1)
            if free < 0:
                assert num_in_flight or len(self._running) > 1, "a sequence alone always fits the block pool"
                return None
            batch.append((sequence, 1, 0))
        budget -= len(batch)
        prefills = [s for s in ready if s.num_to_compute > 1]
        for sequence in sorted(prefills, key=lambda s: s.order):
            count = min(sequence.num_to_compute, budget, self._blocks.max_positions(sequence, free) - sequence.planned)
            if count > 0:
                free -= self._blocks.num_new_blocks(sequence, sequence.planned + count)
                batch.append((sequence, count, 0))
                budget -= count
        assert batch or num_in_flight or not prefills, "a prefill short of blocks waits for a decode or for a plan in flight"
        blocked = self._admit(batch, num_slots, budget, free, begins)
        return None if blocked is not None and self._can_preempt_for(blocked) else batch

    def _decode_share(self, ready: int, num_in_flight: int) -> int:
        """Number of decodes in the next plan. With `sync_sampling` they are spread over all plans in flight, so that no stage
        idles."""
        if not self._config.sync_sampling:
            return ready
        depth = self._config.depth
        return min(ceil(ready / (depth - num_in_flight)), ceil(len(self._running) / depth))

    def _admit(self, batch: ScheduledBatch, slots: int, budget: int, free: int, begins: bool) -> Sequence | None:
        """Extend the batch by waiting sequences in order, while slots, budget, blocks and bytes last.

        Returns the first sequence that found no slot or too few blocks. An admission takes blocks for all known tokens, in
        windowed groups for those of the first chunk, so that a shortage mostly hits decodes. Reserved blocks for running
        sequences prevent the preemption of a new sequence a few steps later.
        """
        if not (budget and self._waiting):
            return None
        prefixes_in_batch = set[bytes]()
        reserve = self._reserve(self._running.values())
        room_bytes = self._config.max_admission_bytes
        for sequence in self._waiting:
            if not (begins or sequence.begun):
                continue
            match = self._blocks.match(sequence)
            if match.pending or match.next_hash in prefixes_in_batch:
                continue
            admission = self._blocks.plan_admission(sequence, match, budget, free - reserve) if slots else None
            if admission is None:
                return sequence
            room_bytes -= self._config.admission_bytes(sequence.params_bytes, len(sequence.tokens))
            if room_bytes < 0:  # the next plan admits it first: `_refusal` rejects what no plan can carry
                return None
            batch.append((sequence, admission.count, match.shared))
            budget -= admission.count
            if not budget:
                return None
            slots -= 1
            free -= admission.taken
            reserve += admission.reserve
            if match.next_hash:
                prefixes_in_batch.add(match.next_hash)
        return None

    def _can_preempt_for(self, blocked: Sequence) -> bool:
        """Whether a waiting sequence fits after the preemption of all running ones with a higher priority number."""
        priority, _ = blocked.order
        rest, preemptible = [], 0
        for sequence in self._running.values():
            if sequence.order[0] > priority:
                preemptible += self._blocks.num_allocated(sequence)
            else:
                rest.append(sequence)
        if len(rest) == len(self._running):
            return False
        required = self._blocks.num_required(blocked, self._blocks.match(blocked))
        return self._blocks.available + preemptible - required >= self._reserve(rest)

    def _reserve(self, sequences: Iterable[Sequence]) -> int:
        """Number of blocks to keep free for these sequences."""
        return sum(map(self._blocks.reserve, sequences))
