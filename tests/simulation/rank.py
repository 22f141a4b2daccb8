"""A rank: its processes, one after another, and what the control thread and the main thread of each do.

What is decided in a rank is the code itself: `Orders`, `HeartbeatState`, `ExitRules`, the agent's `RestartBackoff`, and on rank 0
`Engine`, `Scheduler` and `StepWatchdog`. Here are only the order of events and the time they take, as in `process.rank_agent`,
`engine.start` and `agent.rank_processes`.
"""

from collections import deque
from typing import TYPE_CHECKING

from tests.simulation.links import EngineSide
from tests.simulation.mesh import SimulatedMesh
from tpserve.coordinator.roster import Peer
from tpserve.engine.loop import IDLE_S, Engine
from tpserve.engine.watchdog import StepWatchdog
from tpserve.observe.trace import Trace
from tpserve.process.exit_rules import BLOCKED_S, ENDED_CODE, FAILED_GRACE_S, GONE_S, GRACE_S, ExitRules
from tpserve.process.heartbeat import HeartbeatState
from tpserve.process.orders import Orders
from tpserve.process.rank_agent import HEARTBEAT_S, STOP_WAIT_S
from tpserve.process.restart_backoff import RestartBackoff
from tpserve.scheduling.scheduler import Scheduler
from tpserve.types.messages import (
    RESTART_CODE,
    CoordinatorMessage,
    Hello,
    Leave,
    MemoryLedger,
    NodeInfo,
    Ready,
    Reconfigure,
    Stop,
)
from tpserve.types.plan import StepPlan, StepResult

if TYPE_CHECKING:
    from tests.simulation.world import SimulatedService

LEDGER = MemoryLedger(0, 0, 0, 0, 0, 0, 0, 1, 16, 256)
FORK_S = 0.02
FINE, REFUSED, BROKEN = b"fine", b"refused", b"broken"
"""Flags of a reload: those with which ranks start, those that they cannot read, those with which they cannot load."""
EPSILON_S = 0.001
TRACE = Trace(None, 0)


class SimulatedRank:
    """A rank's place in its node's agent, which starts it again. `done`: the agent has ended it for good."""

    def __init__(self, service: "SimulatedService", rank: int, node: int) -> None:
        self.service, self.rank, self.node = service, rank, node
        self.done = False
        self.process: Process
        self._backoff = RestartBackoff()
        self._last_exit = ""
        self.start()

    def start(self) -> None:
        if not self.done:
            self.process = Process(self, self._last_exit)
            self.service.processes.append(self.process)

    def on_exit(self, process: "Process", how: str, code: int | None) -> None:
        """The agent has reaped a process. `code`: None for a signal."""
        if process is not self.process:
            return
        if code in (0, 2, ENDED_CODE) or not self.service.plan.restarts:
            self.done = True
            return
        self._last_exit = how
        delay_s = self._backoff.delay_s(self.service.events.now - process.started_s)
        self.service.events.after(FORK_S + delay_s, self.start)

    def replace(self) -> None:
        """Another agent starts the rank although its process lives on."""
        if not self.service.plan.restarts:
            return
        self.process.orphan = True
        self.start()


class Process:
    """One process of a rank. `stopped`: by SIGSTOP; what arrives waits in `inbox`."""

    def __init__(self, slot: SimulatedRank, last_exit: str) -> None:
        self.slot, self.service = slot, slot.service
        self.rank, self.node = slot.rank, slot.node
        self.pid = self.service.next_number()
        self.last_exit = last_exit
        self.started_s = self.service.events.now
        self.alive, self.stopped, self.orphan, self.loaded = True, False, False, False
        self.stopped_s = 0.0
        self.inbox: list[CoordinatorMessage] = []
        self.order = self.service.orders.get(self.node)
        self.incarnation = Incarnation(self, prepared=False)

    def again(self) -> None:
        """The next incarnation of this process."""
        if self.alive:
            self.incarnation.close()
            self.incarnation = Incarnation(self, prepared=True)

    def die(self, how: str, code: int | None = None) -> None:
        """End now, by a signal or with an exit code."""
        if not self.alive:
            return
        self.alive = False
        self.incarnation.close()
        self.service.on_death(self)
        self.slot.on_exit(self, how, code)

    def exit(self, code: int) -> None:
        self.service.exits.append((self.rank, code))
        self.die(f"exit code {code}", code)

    def stop(self) -> None:
        self.stopped, self.stopped_s = True, self.service.events.now

    def go_on(self) -> None:
        """SIGCONT."""
        if self.alive and self.stopped:
            self.stopped = False
            if self.service.events.now - self.stopped_s > GONE_S:
                self.incarnation.rules.discount_delay(self.service.events.now)
                self.incarnation.heartbeat.extend_deadline(self.service.events.now + GONE_S)
            waiting, self.inbox = self.inbox, []
            for message in waiting:
                self.incarnation.hear(message)
            self.incarnation.wake()
            self.incarnation.main()


class Incarnation:
    """One attempt of a process to take part. `phase`: where its main thread is; `blocked`: in a call that may never return."""

    def __init__(self, process: Process, *, prepared: bool) -> None:
        self.process, self.service = process, process.service
        self.rank, self.identity = process.rank, self.service.next_number()
        self.service.incarnations[self.identity] = self
        now = self.service.events.now
        self.orders = Orders()
        self.heartbeat = HeartbeatState(self.rank, self.orders)
        self.rules = ExitRules(self.rank, "sim", self.orders, now, ENDED_CODE, self.service.plan.recovery_timeout_s)
        self.mesh: SimulatedMesh | None = None
        self.running: int | None = None
        self.phase, self.blocked, self.closed = "preparing", False, False
        self._engine: Engine | None = None
        self._engine_side: EngineSide | None = None
        self._results: deque[StepResult] = deque()
        after = self.service.events.after
        after(0.001, self._connect)
        after(self.service.random.random() * HEARTBEAT_S, self._beat)
        after(EPSILON_S if prepared else self.service.plan.prepare_s * (0.5 + self.service.random.random()), self._say_hello)

    @property
    def peer(self) -> Peer:
        return Peer(self.rank, self.identity)

    @property
    def awake(self) -> bool:
        """Whether its threads can do anything."""
        return self.process.alive and not self.process.stopped and not self.closed

    @property
    def over(self) -> bool:
        return self.closed or self.orders.over

    @property
    def can_compute(self) -> bool:
        return self.awake and not self.blocked and self.mesh is not None and self.running == self.mesh.epoch

    # The control thread

    def _connect(self) -> None:
        if self.awake and self.process.node not in self.service.network.cut:
            self.rules.note_connection(True, self.service.events.now)

    def on_cut(self) -> None:
        """The link has been cut for as long as ZeroMQ takes to notice."""
        if self.awake and self.process.node in self.service.network.cut:
            self.rules.note_connection(False, self.service.events.now)
            for delay_s in (GONE_S + EPSILON_S, GONE_S + BLOCKED_S + 2 * EPSILON_S):
                self.service.events.after(delay_s, self._check)

    def on_heal(self) -> None:
        self.service.events.after(0.5 * self.service.random.random(), self._connect)

    def _beat(self) -> None:
        if self.closed or not self.process.alive:
            return
        self.service.events.after(HEARTBEAT_S, self._beat)
        self.wake()
        self._check()

    def wake(self) -> None:
        """Send a heartbeat with what it has to say."""
        if self.awake:
            for message in self.heartbeat.messages(self.service.events.now):
                self.service.network.post(self.process.node, self.service.frontend.receive, self.peer, message)

    def hear(self, message: CoordinatorMessage) -> None:
        """An order has arrived."""
        if self.closed or not self.process.alive:
            return
        if self.process.stopped:
            self.process.inbox.append(message)
            return
        if isinstance(message, Reconfigure):
            self.service.keep_order(self.process.node, message)
        if not self.orders.apply(message):
            return
        if isinstance(message, Stop | Leave | Reconfigure):
            self.rules.note_over(self.service.events.now)
            grace_s = BLOCKED_S if isinstance(message, Leave) else FAILED_GRACE_S
            grace_s = GRACE_S if isinstance(message, Stop) and not message.code else grace_s
            self.service.events.after(grace_s + EPSILON_S, self._check)
        self.main()

    def _check(self) -> None:
        """End the process if that is due."""
        if self.awake:
            was_over = self.orders.over
            if (exit := self.rules.due("", self.service.events.now)) is not None:
                self.process.exit(exit.code)
            elif self.orders.over and not was_over:
                self.main()

    # The main thread

    def main(self) -> None:
        """Something has changed: go on if this phase waits for it."""
        if not self.awake or self.blocked or self.phase in ("preparing", "loading"):
            return
        if self.phase == "failing":
            if self.orders.over:
                self._end_failed()
        elif self.orders.over:
            self._leave()
        elif self.phase == "hello" and self.orders.start is not None:
            self.phase = "meshing"
            self.service.mesh_of(self.orders.start, self).join(self, self.orders.start.epoch)
        elif self.phase == "ready" and self.orders.run is not None:
            self._run()
        elif self.phase == "running":
            self._step()

    def _later(self, delay_s: float, call: str) -> None:
        """Go on with a long call's end, once the process is not stopped."""
        if self.closed or not self.process.alive:
            return
        if self.process.stopped or self.blocked:
            self.service.events.after(0.2, self._later, delay_s, call)
            return
        getattr(self, call)()

    def _say_hello(self) -> None:
        self._later(0.0, "_hello")

    def _hello(self) -> None:
        self.phase = "hello"
        self.orders.hello_sent = True
        endpoints = {"store": str(self.identity)} if self.rank == 0 else {}
        node = NodeInfo(self.process.node, f"n{self.process.node}", f"m{self.process.node}", {})
        last_exit = self.process.last_exit
        ledger = LEDGER if self.process.loaded else None
        self.heartbeat.hello = Hello(
            self.rank, self.identity, self.process.pid, "h", endpoints, {}, node, ledger=ledger, last_exit=last_exit,
            configuration=0 if (order := self.process.order) is None else order.number,
            refused="it is not on this node" if order is not None and order.changes == REFUSED else "",
        )  # fmt: skip
        self.process.last_exit = ""
        self.wake()
        self.main()

    def load(self) -> None:
        """The mesh has formed: load what is missing."""
        if not self.closed and self.process.alive and self.phase == "meshing":
            self.phase = "loading"
            delay_s = 0.005 if self.process.loaded else self.service.plan.load_s * (0.5 + self.service.random.random())
            self.service.events.after(delay_s, self._later, 0.0, "_ready")

    def _ready(self) -> None:
        if self.process.order is not None and self.process.order.changes == BROKEN:
            self._fail("user", "it does not fit")
            return
        self.phase, self.process.loaded = "ready", True
        if not self.orders.over:
            self.heartbeat.ready = Ready(self.rank, self.orders.epoch, LEDGER, {"max_model_len": 64})
            self.wake()
        self.main()

    def _run(self) -> None:
        assert self.orders.start is not None and self.mesh is not None
        self.service.check_one_epoch(self)
        self.phase, self.running = "running", self.orders.epoch
        if self.rank == 0:
            self._engine_side = EngineSide(self.service.router, self.identity, self.main)
            scheduler = Scheduler(self.service.scheduler_config, self.orders.epoch)
            watchdog = StepWatchdog(self.service.plan.form_timeout_s, 60.0)
            parts = (self, self._engine_side, self, self, self)
            self._engine = Engine(scheduler, *parts, TRACE, watchdog, lambda: self.service.events.now)  # type: ignore[arg-type]
            self.service.schedulers.append(scheduler)
            self._idle()

    def _idle(self) -> None:
        """Rank 0's loop looks around every second."""
        if self._engine is not None:
            self.service.events.after(IDLE_S, self._idle)
            self.main()

    def _step(self) -> None:
        """Rank 0: everything that the engine's loop has to do now."""
        while self._engine is not None and not self.orders.over and self._engine.step():
            pass

    def lose_peer(self) -> None:
        """A collective has failed."""
        self._fail("peer", "a peer is gone")

    def raise_error(self) -> None:
        """An error of its own. Before the first epoch it would end the service, and rightly."""
        if self.service.frontend.coordinator.facts:
            self._fail("engine", "RuntimeError: it broke")

    def hang(self) -> None:
        """The main thread never returns from what it does."""
        self.blocked = self.blocked or self.running is not None

    def _fail(self, kind: str, text: str) -> None:
        if self.process.stopped and not self.closed and self.process.alive:
            self.service.events.after(0.2, self._fail, kind, text)
        elif self.awake and not self.blocked and self.phase in ("meshing", "loading", "ready", "running"):
            if self.orders.over:
                self._leave()
                return
            self.phase, self.running, self._engine = "failing", None, None
            self.heartbeat.fail(kind, text)  # type: ignore[arg-type]
            self.wake()
            self.service.events.after(STOP_WAIT_S, self._end_failed)

    def _end_failed(self) -> None:
        """`RankAgent.fail` after its wait."""
        if not self.awake or self.phase != "failing":
            return
        fault, stop = self.heartbeat.fault, self.orders.stop
        assert fault is not None
        if fault.kind == "peer" and stop is None and self.orders.leave is not None:
            self.process.again()
        else:
            self.process.exit(RESTART_CODE if stop is None else self.rules.stop_code)

    def _leave(self) -> None:
        if self.orders.stop is not None:
            self.process.exit(self.rules.stop_code)
        else:
            self.process.again()

    def close(self) -> None:
        """The end of this incarnation."""
        if self.closed:
            return
        self.closed, self.running, self._engine = True, None, None
        self.orders.close()
        if self._engine_side is not None:
            self._engine_side.close()
        if self.mesh is not None:
            self.mesh.leave(self)

    # What the engine's loop sees: rank agent, runner, plans and results in one

    def take_result(self, result: StepResult) -> None:
        """The sampling rank's result has arrived."""
        self._results.append(result)
        self.main()

    def receive(self, timeout_s: float) -> list[StepResult]:
        results = list(self._results)
        self._results.clear()
        return results

    def launch(self, plan: StepPlan) -> None:
        assert self.mesh is not None
        self.mesh.submit(plan)

    def send(self, plan: StepPlan) -> None:
        assert plan.epoch == self.running

    def retire(self, step: int) -> None:
        pass

    def report_step(self, step: int) -> None:
        self.heartbeat.step = step

    def set_step_deadline(self, due: tuple[int, float] | None) -> None:
        self.heartbeat.due = due
