"""The coordinator under random schedules: messages lost, repeated, late and out of order, ranks that die, hang and come back.

A simulated rank does what `process.rank_agent` and a rank's main do, on a simulated clock. Whatever happens:

    one epoch   when a rank starts to run an epoch, no rank runs another
    an end      once told to end, everything ends, although messages are still lost
    one story   exactly one of Failed and Finished, and without a fault it is Finished
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from tpserve.coordinator.actions import Action, EpochFailed, EpochFinished, EpochReady, SendMessage
from tpserve.coordinator.coordinator import Coordinator, EpochState
from tpserve.coordinator.roster import Peer
from tpserve.types.messages import (
    CoordinatorMessage,
    Fault,
    Heartbeat,
    Hello,
    Leave,
    MemoryLedger,
    RankMessage,
    Ready,
    Run,
    Start,
    Stop,
)

LEDGER = MemoryLedger(0, 0, 0, 0, 0, 0, 0, 1, 16, 256)
STEP_S = 0.05


@dataclass
class Process:
    """One incarnation of a rank: what `Control` repeats and notes, and how far its main thread is."""

    rank: int
    incarnation: int
    alive: bool = True
    blocked: bool = False
    orphan: bool = False
    start: Start | None = None
    up: bool = False
    running: int | None = None
    fault: Fault | None = None
    next_s: float = 0.0

    def sayings(self) -> list[RankMessage]:
        epoch = self.start.epoch if self.start else 0
        said: list[RankMessage] = [Heartbeat(self.rank, epoch, "x", 0, 0)]
        if self.start is None:
            said.append(
                Hello(self.rank, self.incarnation, 1, "h", {"store": f"{self.incarnation}"} if self.rank == 0 else {}, {})
            )
        elif self.up and self.running is None:
            said.append(Ready(self.rank, epoch, LEDGER, {}))
        if self.fault:
            said.append(self.fault)
        return said


@dataclass
class World:
    """Ranks, a bad network and a clock around one coordinator."""

    size: int
    seed: int
    restarts: bool
    now: float = 0.0
    runs: list[int] = field(default_factory=list)
    ends: list[Action] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.loss = self.random.choice([0.0, 0.05, 0.3])
        self.late_s = self.random.choice([0.0, 0.2, 1.5])
        self.coordinator = Coordinator(self.size, 0.0, restarts=self.restarts, form_timeout_s=60.0, drain_timeout_s=5.0)
        self.incarnations = 0
        self.processes: list[Process] = []
        self.mail: list[tuple[float, Peer, RankMessage | CoordinatorMessage, bool]] = []
        for rank in range(self.size):
            self.begin(rank)

    def begin(self, rank: int) -> None:
        """A new process, or a survivor that takes part again."""
        self.incarnations += 1
        self.processes = [p for p in self.processes if p.rank != rank or (p.orphan and p.alive)]
        self.processes.append(Process(rank, self.incarnations, next_s=self.now + self.random.random()))

    def post(self, peer: Peer, message: RankMessage | CoordinatorMessage, *, up: bool) -> None:
        for _ in range(2 if self.random.random() < 0.1 else 1):
            if self.random.random() >= self.loss:
                self.mail.append((self.now + self.random.random() * self.late_s, peer, message, up))

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, SendMessage):
                self.post(action.peer, action.message, up=False)
            elif isinstance(action, EpochFailed | EpochFinished):
                self.ends.append(action)
            elif isinstance(action, EpochReady):
                self.runs.append(action.epoch)

    def step(self, trouble: float) -> None:
        """Advance the clock: deliver what is due, let everyone act."""
        self.now += STEP_S if self.random.random() > 0.002 else 3.0
        due = [m for m in self.mail if m[0] <= self.now]
        self.mail = [m for m in self.mail if m[0] > self.now]
        self.random.shuffle(due)
        self.do(self.coordinator.tick(self.now))
        for _, peer, message, up in due:
            if up:
                self.do(self.coordinator.receive(peer, message, self.now))  # type: ignore[arg-type]
            else:
                for process in self.processes:
                    if process.alive and (process.rank, process.incarnation) == peer:
                        self.hear(process, message)  # type: ignore[arg-type]
        for process in list(self.processes):
            self.act(process, trouble)

    def hear(self, process: Process, message: CoordinatorMessage) -> None:
        match message:
            case Start() if process.start is None:
                process.start = message
            case Run(epoch) if process.up and process.start and epoch == process.start.epoch and process.running is None:
                others = {p.running for p in self.processes if p.alive and not p.orphan and p.running is not None}
                assert others <= {epoch}, f"epoch {epoch} runs beside {others}"
                process.running = epoch
            case Leave():
                process.alive = not process.blocked  # its control thread ends a process that is stuck
                self.begin(process.rank)
            case Stop():
                process.alive = False  # at the latest by os._exit
                if self.restarts and not process.orphan and self.coordinator.state is not EpochState.STOPPED:
                    self.begin(process.rank)

    def act(self, process: Process, trouble: float) -> None:
        peer = Peer(process.rank, process.incarnation)
        if not process.alive:
            return
        if not process.orphan and self.random.random() < trouble:
            self.crash(process, peer)
            return
        if process.running is not None and not process.blocked and self.broken(process) and self.random.random() < 0.3:
            self.notice(process)
            return
        if process.start is not None and not process.up and self.random.random() < 0.1:
            process.up = True
        if self.now >= process.next_s:
            process.next_s = self.now + 0.5
            for message in process.sayings():
                self.post(peer, message, up=True)

    def broken(self, process: Process) -> bool:
        """Has anybody of this process's epoch died or left it?"""
        present = [p for p in self.processes if p.alive and p.start and process.start and p.start.epoch == process.start.epoch]
        return len({p.rank for p in present}) < self.size

    def notice(self, process: Process) -> None:
        """A collective fails: take part again, or report it."""
        if self.restarts:
            self.begin(process.rank)
        else:
            process.fault = Fault(process.rank, process.running or 0, "peer", "peer gone")

    def crash(self, process: Process, peer: Peer) -> None:
        if self.random.random() < 0.3:
            process.blocked = True  # hangs in C while its control thread goes on
            return
        process.orphan = self.restarts and self.random.random() < 0.3  # replaced, yet it lives on
        process.alive = process.orphan
        seen = not process.orphan and self.random.random() < 0.5
        if self.restarts:
            self.begin(process.rank)
        if seen:
            self.do(self.coordinator.lost(peer, "died", self.now))

    def runs_whole(self) -> bool:
        """Every rank runs the coordinator's epoch, and nobody else is left."""
        running = [p.running for p in self.processes if p.alive]
        return self.coordinator.state is EpochState.RUN and running == [self.coordinator.epoch] * self.size

    def until(self, condition: Callable[[], bool], limit_s: float, trouble: float = 0.0) -> bool:
        limit_s += self.now
        while self.now < limit_s:
            self.step(trouble)
            if condition():
                return True
        return False


@pytest.mark.parametrize("seed", range(40))
def test_surviving_schedules(seed: int) -> None:
    world = World(size=1 + seed % 4, seed=seed, restarts=True)
    for _ in range(3):
        world.until(lambda: False, 4.0, trouble=0.01)
        assert world.until(world.runs_whole, 120.0), (world.coordinator.state, world.coordinator.phase)
    assert world.runs == sorted(set(world.runs))
    finish(world)
    assert isinstance(world.ends[0], EpochFinished)


@pytest.mark.parametrize("seed", range(40))
def test_schedules_that_stop_at_the_first_fault(seed: int) -> None:
    world = World(size=1 + seed % 4, seed=seed, restarts=False)
    world.until(lambda: bool(world.ends), 30.0, trouble=random.Random(seed).choice([0.0, 0.002, 0.02]))
    finish(world)
    assert world.runs in ([], [1]) and world.coordinator.epoch <= 1


def finish(world: World) -> None:
    """Told to end, everything ends."""
    world.do(world.coordinator.drain(world.now))
    world.do(world.coordinator.drained(world.now))
    assert world.until(lambda: world.coordinator.state is EpochState.STOPPED, 10.0)
    for process in world.processes:
        if process.blocked:
            process.blocked = False  # its control thread hears Stop all the same
    assert world.until(lambda: not any(p.alive for p in world.processes), 60.0), world.processes
    assert len(world.ends) == 1 and world.coordinator.state is EpochState.STOPPED
