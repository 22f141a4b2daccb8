"""A whole service on one simulated clock: the frontend, the ranks of all nodes, their network and clients, and what must hold.

one epoch     when a rank begins to run an epoch, no rank runs another; epochs grow
one mesh      a mesh has one incarnation of each rank, all in its epoch (`mesh`)
exact         each client's tokens are a prefix of the undisturbed run's; no error while the service runs (`clients`)
one end       every request ends exactly once, and so does the service
conservation  slots and blocks (`tests.scheduling.simulator`, at every plan)
"""

import logging
from dataclasses import dataclass
from itertools import count
from random import Random

from tests.simulation.clients import SimulatedClient
from tests.simulation.events import CUT_NOTICED_S, EventQueue, SimulatedNetwork, Weather
from tests.simulation.frontend import SimulatedFrontend
from tests.simulation.links import QueueRouter
from tests.simulation.mesh import SimulatedMesh
from tests.simulation.rank import Incarnation, Process, SimulatedRank
from tpserve.coordinator.actions import EpochFailed, EpochFinished
from tpserve.coordinator.epoch_state import EpochState
from tpserve.scheduling.scheduler import Scheduler
from tpserve.scheduling.scheduler_config import SchedulerConfig
from tpserve.types.messages import Start

VOCAB = 100
CALM = Weather(late_s=0.002)
STOPPED_KILLED_S = 4.5
"""A stopped process is killed by its node's agent after this long."""


def quiet(on: bool = True) -> None:
    """Without the log of the code under test, which would be most of a schedule's time."""
    logging.getLogger("tpserve").setLevel(logging.CRITICAL if on else logging.NOTSET)


@dataclass(frozen=True)
class ServicePlan:
    """What a service is like. `collectives_hang`, `deaths_unseen`: shares of the cases in which nobody notices."""

    size: int
    nodes: int = 1
    restarts: bool = True
    weather: Weather = CALM
    step_s: float = 0.03
    prepare_s: float = 0.3
    load_s: float = 0.2
    collectives_hang: float = 0.0
    deaths_unseen: float = 0.0
    agent_kills_stopped: bool = True
    """Else the frontend has to do it, on its own node."""
    engine_late_s: float = 0.01
    poison: str = ""
    """How a request that is poison ends a rank: "error" of the rank's own, a signal, or an exit code; empty: there is none."""
    form_timeout_s: float = 60.0
    recovery_timeout_s: float = 120.0
    drain_timeout_s: float = 25.0
    num_blocks: int = 40


class SimulatedService:
    """See the module."""

    def __init__(self, plan: ServicePlan, random: Random) -> None:
        self.plan, self.random, self.size = plan, random, plan.size
        self.vocab_size = VOCAB
        self.scheduler_config = SchedulerConfig(
            max_num_seqs=4,
            max_num_batched_tokens=32,
            max_model_len=64,
            num_blocks=plan.num_blocks,
            block_size=4,
            depth=random.choice([1, 2, 3]),
            sync_sampling=random.random() < 0.3,
            eos_ids=(),
            vocab_size=VOCAB,
        )
        self.events = EventQueue()
        self.network = SimulatedNetwork(self.events, random, plan.weather)
        self.router = QueueRouter(self.events, random, plan.engine_late_s, lambda: self.frontend.receive_from_engine())
        self.processes: list[Process] = []
        self.incarnations: dict[int, Incarnation] = {}
        self.schedulers: list[Scheduler] = []
        self.exits: list[tuple[int, int]] = []
        self.ends: list[EpochFailed | EpochFinished] = []
        self.epochs: list[int] = []
        self.clients: list[SimulatedClient] = []
        self.num_poisoned = 0
        self._meshes: dict[str, SimulatedMesh] = {}
        self._numbers = count(1)
        self.frontend = SimulatedFrontend(self)
        self.ranks = [SimulatedRank(self, rank, rank * plan.nodes // plan.size) for rank in range(plan.size)]

    def next_number(self) -> int:
        return next(self._numbers)

    def close(self) -> None:
        """Close what the code itself has opened."""
        for process in self.processes:
            process.alive = False
            process.incarnation.close()

    # What the parts tell

    def mesh_of(self, start: Start, incarnation: Incarnation) -> SimulatedMesh:
        """The mesh of a Start: whoever first asks for a store makes its mesh."""
        store = start.endpoints["store"]
        if store not in self._meshes:
            self._meshes[store] = SimulatedMesh(self, start.epoch, self.incarnations[int(store)])
        return self._meshes[store]

    def on_death(self, process: Process) -> None:
        self.frontend.on_death(process)

    def on_epoch_ready(self, epoch: int) -> None:
        assert not self.epochs or epoch > self.epochs[-1], f"epoch {epoch} after {self.epochs[-1]}"
        self.epochs.append(epoch)

    def check_one_epoch(self, incarnation: Incarnation) -> None:
        """A rank begins to run its epoch."""
        others = {p.incarnation.running for p in self.processes if p.alive and not p.orphan} - {None, incarnation.orders.epoch}
        assert not others or incarnation.process.orphan, f"epoch {incarnation.orders.epoch} runs beside {others}"

    def take_all(self) -> None:
        for client in self.clients:
            client.take()

    # Faults

    @property
    def running(self) -> list[Process]:
        """The processes that count, in the order of their ranks."""
        return [rank.process for rank in self.ranks if rank.process.alive]

    def freeze(self, process: Process, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after that, unless the node's agent is sooner."""
        process.stop()
        if seconds < STOPPED_KILLED_S:
            self.events.after(seconds, process.go_on)
        else:
            self.events.after(STOPPED_KILLED_S, self._kill_stopped, process)

    def kill_node(self, node: int) -> None:
        """SIGKILL to all ranks of a node."""
        for process in self.running:
            if process.node == node:
                process.die("SIGKILL")

    def poison(self, victim: Incarnation) -> None:
        """A request ends a rank."""
        self.num_poisoned += 1
        if self.plan.poison == "error":
            victim.raise_error()
        else:
            victim.process.die(self.plan.poison, 1 if "code" in self.plan.poison else None)

    def _kill_stopped(self, process: Process) -> None:
        """By the agent, where the frontend cannot or would not."""
        if not process.alive or not process.stopped:
            return
        watched = self.frontend.watches(process.incarnation.peer)
        if self.plan.agent_kills_stopped or process.node or process.orphan or not watched:
            process.die("SIGKILL")
        else:
            self.events.after(STOPPED_KILLED_S, self._kill_stopped, process)

    def cut(self, node: int, seconds: float) -> None:
        """Cut the link to a node, unless it is the frontend's own."""
        if node == 0 or node in self.network.cut:
            return
        self.network.cut.add(node)
        self.events.after(CUT_NOTICED_S, self._notice_cut, node)
        self.events.after(seconds, self.heal, node)

    def _notice_cut(self, node: int) -> None:
        if node in self.network.cut:
            for process in self.processes:
                if process.node == node:
                    process.incarnation.on_cut()

    def heal(self, node: int) -> None:
        self.network.heal(node)
        for process in self.processes:
            if process.node == node:
                process.incarnation.on_heal()
        for process in self.processes:
            if process.node == node and not process.alive:
                self.frontend._report(process.incarnation.peer)

    def calm(self) -> None:
        """The faults cease, and the network is whole."""
        self.network.weather = CALM
        for node in list(self.network.cut):
            self.heal(node)

    # Clients

    def open(self, *, poison: bool = False) -> None:
        """A client comes; the frontend takes requests while the service runs or recovers."""
        coordinator = self.frontend.coordinator
        if coordinator.facts and not coordinator.draining and coordinator.state is not EpochState.STOPPED:
            self.clients.append(SimulatedClient(self, poison=poison))

    @property
    def answered(self) -> bool:
        return all(client.done for client in self.clients)

    # What must hold in the end

    @property
    def whole(self) -> bool:
        """Every rank runs the coordinator's epoch, and nobody else is left."""
        coordinator = self.frontend.coordinator
        if coordinator.state is not EpochState.RUN:
            return False
        living = [process for process in self.processes if process.alive]
        return len(living) == self.size and all(p.incarnation.running == coordinator.epoch for p in living)

    @property
    def gone(self) -> bool:
        """The service has ended, and so has every process."""
        return bool(self.ends) and not any(process.alive for process in self.processes)

    def check_end(self) -> None:
        """Every request and the service have ended once."""
        self.take_all()
        assert len(self.ends) == 1, self.ends
        assert self.frontend.table.num_open == 0
        unanswered = [client.answers for client in self.clients if not client.done]
        assert not unanswered, unanswered
        mismatches = sum(scheduler.stats().resume_mismatches for scheduler in self.schedulers)
        assert mismatches == 0, f"{mismatches} tokens of resumed requests differ"

    def check_idle(self) -> None:
        """Nothing is held by an engine that has answered everything."""
        if any(process.incarnation.blocked for process in self.running):
            return  # its last plan is still in flight
        stats = self.schedulers[-1].stats()
        assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0), stats
