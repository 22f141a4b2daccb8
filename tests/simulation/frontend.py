"""The frontend: coordinator, request table and recovery as they are, and what `RankMonitor` and `EngineClient` do around them."""

from collections import deque
from collections.abc import Callable, Sequence
from time import process_time
from typing import TYPE_CHECKING

from tests.simulation.links import SimulatedEngineServer
from tpserve.coordinator.actions import Action, EpochFailed, EpochFinished, EpochReady, RankLost, SendMessage
from tpserve.coordinator.coordinator import Coordinator
from tpserve.coordinator.rank_monitor import CAUSE_S, PROBE_S, SETTLE_S
from tpserve.coordinator.roster import Peer
from tpserve.engine_client.engine_client import LEAVE_S
from tpserve.engine_client.recovery import Attach, Detach, EngineAction, Recovered, Recovery, SendInputs
from tpserve.engine_client.requests import RequestTable
from tpserve.observe.metrics import Metrics
from tpserve.types.messages import Delta, EngineInput, EngineOutput, Fault, Hello, RankMessage
from tpserve.wire.channels import EngineUnreachable

if TYPE_CHECKING:
    from tests.simulation.rank import Process
    from tests.simulation.world import SimulatedService

TICK_S = 0.3
"""Longer than the real one: every event has its time, and the limits that a tick finds are seconds."""


class QuietMetrics(Metrics):
    """Metrics without series, whose making takes longer than a schedule."""

    def __init__(self) -> None:
        pass

    def _nothing(self, *values: object) -> None:
        pass

    engine = quarantined = recovered = first_token = next_tokens = ended = _nothing  # type: ignore[assignment]


class SimulatedFrontend:
    """See the module. `blocked_until_s`: its event loop is held up."""

    def __init__(self, service: "SimulatedService") -> None:
        plan, self.service = service.plan, service
        self.coordinator = Coordinator(
            service.size,
            0.0,
            restarts=plan.restarts,
            form_timeout_s=plan.form_timeout_s,
            recovery_timeout_s=plan.recovery_timeout_s,
            drain_timeout_s=plan.drain_timeout_s,
        )
        self.table = RequestTable(self._send, QuietMetrics(), clock=lambda: service.events.now)
        self.recovery = Recovery(self.coordinator, self.table)
        self.engine = SimulatedEngineServer(service.router)
        self.blocked_until_s = 0.0
        self.recoveries: list[float] = []
        self.busy_s = 0.0
        self._tracked: dict[int, Peer] = {}
        """The newest incarnation of each rank."""
        self._dead: set[Peer] = set()
        """Tracked incarnations whose end can be seen."""
        self._faults: dict[Peer, Fault] = {}
        self._waiting: deque[tuple[Peer, RankMessage]] = deque()
        service.events.after(0.0, self._tick)

    # Events

    def receive(self, peer: Peer, message: RankMessage) -> None:
        """A message of a rank has arrived."""
        if self.service.events.now < self.blocked_until_s:
            self._waiting.append((peer, message))
            return
        now = self.service.events.now
        if isinstance(message, Fault) and message.kind != "user":
            if peer not in self._faults:
                self._faults[peer] = message
                self.service.events.after(SETTLE_S, self._deliver_fault, peer, message)
            return
        is_hello = isinstance(message, Hello)
        if is_hello:
            self._probe(peer)
        self._tell(self.coordinator.receive, peer, message, now)
        if is_hello and self.coordinator.is_current(peer):
            self._track(peer)

    def on_death(self, process: "Process") -> None:
        """A process has ended: its pidfd, or its closed connection, tells."""
        peer = process.incarnation.peer
        if self._tracked.get(peer.rank) == peer and self.service.random.random() >= self.service.plan.deaths_unseen:
            self._dead.add(peer)
            delay_s = CAUSE_S if process.node == 0 else PROBE_S * self.service.random.random()
            self.service.events.after(delay_s, self._report, peer)

    def receive_from_engine(self) -> None:
        """Frames of rank 0's engine have arrived."""
        if self.service.events.now < self.blocked_until_s or not self.service.router.has_arrived:
            return
        if outputs := self.engine.receive():
            self._check_positions(outputs)
            self._carry_out(self.recovery.on_outputs(outputs))
            self.service.take_all()

    def _check_positions(self, outputs: Sequence[EngineOutput]) -> None:
        """An engine goes on where the request table is."""
        known = {sequence.request.id: len(sequence.tokens) for sequence in self.table.open_sequences}
        for output in outputs:
            if isinstance(output, Delta) and output.id in known:
                assert output.start == known[output.id], f"tokens at {output.start}, and {known[output.id]} are known"
                known[output.id] += len(output.tokens)

    def watches(self, peer: Peer) -> bool:
        """Whether it has the pidfd of an incarnation."""
        return self._tracked.get(peer.rank) == peer

    def block(self, seconds: float) -> None:
        """The event loop is held up."""
        self.blocked_until_s = self.service.events.now + seconds

    def drain(self) -> None:
        self._tell(self.coordinator.drain, self.service.events.now)

    def _tick(self) -> None:
        events = self.service.events
        if events.now < self.blocked_until_s:
            events.at(self.blocked_until_s, self._tick)
            return
        events.after(TICK_S, self._tick)
        if self._waiting:
            waiting, self._waiting = self._waiting, deque()
            for peer, message in waiting:
                self.receive(peer, message)
        self.receive_from_engine()
        self._tell(self.coordinator.tick, events.now)
        self.perform(self.recovery.poll(events.now))

    # What is behind a message

    def _deliver_fault(self, peer: Peer, fault: Fault) -> None:
        self._faults.pop(peer, None)
        self._probe(peer)
        self._tell(self.coordinator.receive, peer, fault, self.service.events.now)

    def _track(self, peer: Peer) -> None:
        self._dead.discard(self._tracked.get(peer.rank, peer))
        self._tracked[peer.rank] = peer
        if not self.service.incarnations[peer.identity].process.alive:
            self._dead.add(peer)
            self._report(peer)

    def _probe(self, sender: Peer) -> None:
        """Report deaths before a message that may be a consequence."""
        for peer in sorted(self._dead):
            if peer != sender:
                self._report(peer)

    def _report(self, peer: Peer) -> None:
        process = self.service.incarnations[peer.identity].process
        if peer not in self._dead or process.node in self.service.network.cut:
            return  # the closed connection is seen once the link is back, or another incarnation has come
        self._dead.discard(peer)
        if (fault := self._faults.pop(peer, None)) is not None:
            self._tell(self.coordinator.receive, peer, fault, self.service.events.now)
        self._tell(self.coordinator.lost, peer, "ended", self.service.events.now)

    # Actions

    def _tell(self, event: Callable[..., list[Action]], *arguments: object) -> None:
        """Tell the coordinator of an event, and carry out what it decides."""
        begin_s = process_time()
        actions = event(*arguments)
        self.busy_s += process_time() - begin_s
        self.perform(actions)

    def perform(self, actions: list[Action]) -> None:
        """Carry out what the coordinator has decided."""
        service = self.service
        for action in actions:
            if isinstance(action, SendMessage):
                incarnation = service.incarnations.get(action.peer.identity)
                if incarnation is not None:
                    service.network.post(incarnation.process.node, incarnation.hear, action.message)
            elif isinstance(action, RankLost):
                process = service.incarnations[action.peer.identity].process
                if process.node == 0:
                    process.die("SIGKILL")
            else:
                if isinstance(action, EpochReady):
                    service.on_epoch_ready(action.epoch)
                elif isinstance(action, EpochFailed | EpochFinished):
                    service.ends.append(action)
                    service.events.after(LEAVE_S, self._kill)
                self._carry_out(self.recovery.on_action(action, service.events.now))
                if service.ends:
                    service.take_all()

    def _kill(self) -> None:
        """The service has ended: kill the ranks on this node that have not."""
        for peer in list(self._tracked.values()):
            process = self.service.incarnations[peer.identity].process
            if process.node == 0:
                process.die("SIGKILL")

    def _carry_out(self, actions: list[EngineAction]) -> None:
        for action in actions:
            match action:
                case Attach(identity):
                    self.engine.attach(identity)
                case Detach():
                    self.engine.detach()
                case SendInputs(inputs):
                    self._send(inputs)
                case Recovered(_, took_s):
                    self.recoveries.append(took_s)

    def _send(self, inputs: list[EngineInput]) -> None:
        try:
            self.engine.send(inputs)
        except EngineUnreachable:
            pass
