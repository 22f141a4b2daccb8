"""The ranks of one epoch as they compute together: who takes part, plans one after another, and what a lost peer does to others.

A mesh forms on the store that rank 0's incarnation hosts. It computes while every rank is there and can go on; if one has left or
died, the others get an error, or hang when collectives hang. Its model is `tests.scheduling.simulator`: tokens are a hash of
their true context, and every wrong block or slot is an assertion.
"""

from collections import deque
from typing import TYPE_CHECKING

from tests.scheduling.simulator import SimulatedWorker
from tpserve.types.packed import unpack
from tpserve.types.plan import StepPlan

if TYPE_CHECKING:
    from tests.simulation.rank import Incarnation
    from tests.simulation.world import SimulatedService

POISON = 99
"""A prompt that begins with this token kills a rank once as many output tokens are known as the next token says."""
NOTICE_S = 0.03
"""How soon a broken connection is an error in a collective."""
RETRY_S = 0.1


class SimulatedMesh:
    """The mesh of one epoch."""

    def __init__(self, service: "SimulatedService", epoch: int, host: "Incarnation") -> None:
        self.epoch = epoch
        self.members: dict[int, Incarnation] = {}
        self.formed = self.broken = False
        self._service = service
        self._host = host
        self._plans: deque[StepPlan] = deque()
        self._busy = False
        self._worker: SimulatedWorker | None = None
        self._poison: dict[int, int] = {}

    def join(self, incarnation: "Incarnation", epoch: int) -> None:
        assert epoch == self.epoch, f"rank {incarnation.rank} joins the mesh of epoch {self.epoch} in epoch {epoch}"
        assert incarnation.rank not in self.members, f"two incarnations of rank {incarnation.rank} in epoch {epoch}"
        if self.broken or self._host.over or not self._host.process.alive:  # its store is gone
            self._service.events.after(NOTICE_S, incarnation.lose_peer)
            return
        self.members[incarnation.rank] = incarnation
        incarnation.mesh = self
        if len(self.members) == self._service.size:
            self.formed = True
            for member in list(self.members.values()):
                member.load()

    def leave(self, incarnation: "Incarnation") -> None:
        """A member has died or has left. Who waits for a plan does not notice."""
        if self.broken:
            return
        self.broken = True
        self.members.pop(incarnation.rank)
        if self._busy or not self.formed:
            self._break()

    def _break(self) -> None:
        service = self._service
        for member in self.members.values():
            if service.random.random() < service.plan.collectives_hang:
                member.blocked = self._busy  # a mesh that forms looks for Leave
            else:
                service.events.after(NOTICE_S * (0.5 + service.random.random()), member.lose_peer)

    def submit(self, plan: StepPlan) -> None:
        """Rank 0 has sent a plan."""
        self._plans.append(plan)
        if self.broken and not self._busy:
            self._busy = True
            self._break()
        self._go_on()

    def _go_on(self) -> None:
        if self._plans and not self._busy:
            self._busy = True
            self._service.events.after(self._service.plan.step_s, self._complete)

    def _complete(self) -> None:
        """The plan is computed, unless somebody is missing."""
        service, members = self._service, self.members.values()
        if self.broken:
            return
        cut = service.network.cut
        if any(not m.can_compute for m in members) or (cut and len({m.process.node in cut for m in members}) > 1):
            service.events.after(RETRY_S, self._complete)
            return
        plan = self._plans[0]
        if (victim := self._poisoned(plan)) is not None:
            service.poison(victim)
            return
        if self._worker is None:
            self._worker = SimulatedWorker(service.scheduler_config, service.vocab_size, self.epoch)
        self._plans.popleft()
        self._busy = False
        self.members[0].take_result(self._worker.execute(plan))
        self._go_on()

    def _poisoned(self, plan: StepPlan) -> "Incarnation | None":
        """The rank that `plan` kills."""
        if not self._service.plan.poison:
            return None
        for slot in plan.releases:
            self._poison.pop(slot, None)
        for new in plan.new_sequences:
            tokens = unpack(new.tokens)
            if tokens[0] == POISON:
                self._poison[new.slot] = new.prompt_len + tokens[1]
        for slot, start, number in zip(unpack(plan.slots), unpack(plan.starts), unpack(plan.counts), strict=True):
            if slot in self._poison and start + number >= self._poison[slot]:
                return self._service.random.choice(list(self.members.values()))
        return None
