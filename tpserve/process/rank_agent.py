"""A rank's control thread. It sends heartbeats, receives orders, takes signals and ends the process.

    main thread      hello -> wait_start -> ready -> wait_run -> check `over` between plans -> leave, or the next incarnation
    control thread   heartbeat   the rank's state, every 0.5 s and at once after a change
                     orders      messages from the coordinator
                     telemetry   log lines and expert counts, for operators
                     periodic    work that continues while the main thread is blocked, such as resending lost plans

Owns a DEALER socket, the signals and the decision to call `os._exit`. Never touches the model or torch, so it keeps running while
the main thread is blocked in a collective. An error on this thread is reported to the coordinator and ends the process.

Signals are blocked in all threads (`block_signals`, the first call in main) and taken here, because a Python handler would wait
until the main thread returns from C. The first signal requests a drain from the coordinator. If another rank of the node is dead,
the agent is already stopping the group, so the rank reports that and exits instead. A second signal ends the service at once.

Invariant: a rank exits when the coordinator sends Stop and when its agent is gone. When the frontend is gone it exits too, or
takes part again under the next frontend where there will be one.
"""

import contextlib
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import zmq
from msgspec.structs import replace
from zmq.utils.monitor import recv_monitor_message

from tpserve.errors import EngineFailure, PeerLost, UserError
from tpserve.process.exit_rules import AGENT, FRONTEND, GONE_S, SIBLING_REPORT_S, ExitRules
from tpserve.process.heartbeat import HeartbeatState, truncate_error
from tpserve.process.orders import Orders, drain_eventfd
from tpserve.process.process_utils import die_with, exit_now, live_children, log_error_from_thread, open_pidfd
from tpserve.process.signals import SAME_SIGNAL_S, SIGNALS, take_over
from tpserve.process.telemetry import LogSource, Telemetry
from tpserve.types.messages import (
    RESTART_CODE,
    UNKNOWN_NODE,
    Fault,
    Hello,
    Leave,
    MemoryLedger,
    NodeInfo,
    Numerics,
    RankMessage,
    Ready,
    Reconfigure,
    Start,
    Stop,
)
from tpserve.wire import codec
from tpserve.wire.channels import connect, open_socket
from tpserve.wire.curve import CurveClient

HEARTBEAT_S = 0.5
POLL_MS = 100
"""How often the thread checks for signals."""
LEAVE_S = 10.0
"""How long the process may take to end after `leave`. Destructors of a broken mesh can hang."""
STOP_WAIT_S = 3.0
"""How long a failed rank waits for Stop or Leave."""


class RankAgent:
    """The control thread of one incarnation of a rank. Public methods are for the main thread."""

    def __init__(
        self,
        rank: int,
        address: str,
        *,
        host: str,
        node: NodeInfo = UNKNOWN_NODE,
        curve_client: CurveClient | None = None,
        identity: int | None = None,
        frontend_pid: int | None = None,
        agent_pid: int | None = None,
        local_ranks: int = 1,
        on_failure: Callable[[], None] = lambda: None,
        failure_code: int = 1,
        frontend_returns_s: float | None = None,
        on_reconfigure: Callable[[Reconfigure], None] | None = None,
    ) -> None:
        """`address`: the coordinator's endpoint. `curve_client`: the keys for it, for TCP.

        `identity`: distinguishes this incarnation from others; random by default. `frontend_pid`: set when the frontend runs on
        this host. `agent_pid`: the parent process, which started `local_ranks` ranks on this host. `on_failure`: called on the
        control thread before a failure ends this process. `failure_code`: the exit code for Stop(1). `frontend_returns_s`: how
        long to wait for another frontend when this one is gone; None: end. `on_reconfigure`: called on the control thread with
        flags for the next process of this rank.
        """
        self.rank = rank
        self.identity = secrets.randbits(63) if identity is None else identity
        self._address, self._curve_client = address, curve_client
        self._host, self._node, self._on_failure = host, node, on_failure
        self._on_reconfigure = on_reconfigure
        self._frontend_pid, self._agent_pid, self._local_ranks = frontend_pid, agent_pid, local_ranks
        self._orders = Orders()
        self._exit_rules = ExitRules(rank, address, self._orders, time.monotonic(), failure_code, frontend_returns_s)
        self._heartbeat = HeartbeatState(rank, self._orders)
        self._telemetry = Telemetry(rank, self._orders)
        self._periodic: Callable[[], None] = lambda: None
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._left = False
        # used by the control thread only
        self._signalled_s: float | None = None

    # The main thread's side: reports

    def start(self) -> None:
        """Start the control thread."""
        if self._agent_pid is not None:
            die_with(self._agent_pid)
        take_over()
        self._thread.start()

    def wake(self) -> None:
        """Make the thread send a heartbeat at once."""
        with contextlib.suppress(OSError):  # closed: this incarnation has left
            os.eventfd_write(self._wake, 1)

    def report_progress(self, phase: str, percent: int) -> None:
        """Set the start's phase and percentage for the next heartbeats."""
        self._heartbeat.phase, self._heartbeat.percent = phase, percent

    def report_busy(self, what: str) -> None:
        """Report long work inside a step, such as compiling a kernel. It is not a hang, and ends with the step."""
        self._heartbeat.busy = what
        self.wake()

    def report_step(self, step: int) -> None:
        """Report that the plan of `step` is finished."""
        self._heartbeat.step, self._heartbeat.busy = step, ""

    def set_step_deadline(self, due: tuple[int, float] | None) -> None:
        """Rank 0: set the oldest plan in flight and its deadline (monotonic seconds). Step -1: the loop must come back."""
        self._heartbeat.due = due

    def report_expert_load(self, layers: tuple[int, ...], read: Callable[[], bytes]) -> None:
        """Send the token counts of these layers' experts from now on. The control thread calls `read`."""
        self._telemetry.attach_expert_load(layers, read)

    def report_log(self, lines: LogSource) -> None:
        """Send this rank's log lines from now on."""
        self._telemetry.attach_log(lines)

    def run_periodically(self, task: Callable[[], None]) -> None:
        """Call `task` every `POLL_MS` on the control thread, also while the main thread is blocked."""
        self._periodic = task

    def report_fault(self, text: str) -> None:
        """Report an error that this rank cannot recover from. Thread-safe."""
        self._heartbeat.fail("engine", text)
        self.wake()

    def hello(
        self,
        endpoints: dict[str, str],
        fingerprint: dict[str, str],
        traits: dict[str, str],
        stage: int = 0,
        processor: dict[str, str] | None = None,
        ledger: MemoryLedger | None = None,
        last_exit: str = "",
        configuration: int = 0,
        refused: str = "",
        answers: str = "",
    ) -> None:
        """Ask the coordinator to include this rank in the next epoch. The arguments are the fields of `Hello`."""
        self._orders.hello_sent = True
        me = (self.rank, self.identity, os.getpid(), self._host)
        hello = Hello(*me, endpoints, fingerprint, self._node, traits, stage, processor or {}, ledger, last_exit)
        self._heartbeat.hello = replace(hello, configuration=configuration, refused=refused, answers=answers)
        self.wake()

    def ready(self, ledger: MemoryLedger, facts: dict[str, int], numerics: Numerics | None = None) -> None:
        """Report that the mesh is formed and the shard is loaded. The arguments are the fields of `Ready`."""
        self._heartbeat.busy = ""
        self._heartbeat.ready = Ready(self.rank, self._orders.epoch, ledger, facts, numerics)
        self.wake()

    # The main thread's side: orders

    @property
    def stop(self) -> Stop | None:
        """The Stop message, once it has arrived."""
        return self._orders.stop

    @property
    def over(self) -> bool:
        """Whether this incarnation has to end: Stop or Leave has arrived."""
        return self._orders.over

    def raise_if_over(self) -> None:
        """Raise Stopped or EpochOver when one of them has arrived."""
        self._orders.raise_if_over()

    @property
    def draining(self) -> bool:
        """Whether Drain has arrived."""
        return self._orders.draining

    def fileno(self) -> int:
        """A descriptor that is readable from a new order until `clear`."""
        return self._orders.fileno()

    def clear(self) -> None:
        """Make the descriptor unreadable until the next order."""
        self._orders.clear()

    def wait_start(self, timeout_s: float | None = None) -> Start:
        """Wait for Start, which comes once all ranks have sent Hello. Raises as `Orders.wait` does."""
        self._orders.wait(lambda: self._orders.start is not None, timeout_s, "the other ranks")
        assert self._orders.start is not None
        return self._orders.start

    def wait_run(self, timeout_s: float | None = None) -> int:
        """Wait for Run, which comes once all ranks are ready; returns the epoch. Raises as `wait_start` does."""
        self._orders.wait(lambda: self._orders.run is not None, timeout_s, "the other ranks to load")
        return self._orders.epoch

    # The main thread's side: the end

    def fail(self, error: BaseException) -> int | None:
        """Report `error`, wait for Leave or Stop, and leave. Returns the exit code; None: take part in the next epoch."""
        by_user, by_peer = isinstance(error, UserError), isinstance(error, PeerLost)
        text = str(error) if by_user or by_peer else f"{type(error).__name__}: {error}"
        self._heartbeat.fail("user" if by_user else "peer" if by_peer else "engine", text)
        self.wake()
        self._orders.wait_over(STOP_WAIT_S)
        if by_peer and self.stop is None and self._orders.leave is not None:
            self.close()
            return None
        code = self.leave()
        return code if self.stop is not None else (2 if by_user else RESTART_CODE)

    def leave(self) -> int:
        """Close, and give the process `LEAVE_S` to end. Returns the exit code for Stop, or 0."""
        self.close()
        code = self._exit_rules.stop_code
        timer = threading.Timer(LEAVE_S, os._exit, (code,))
        timer.daemon = True
        timer.start()
        return code

    def close(self) -> None:
        """End the thread. The process continues and may rejoin as a new incarnation."""
        if self._left:
            return
        self._left = True
        self.wake()
        if self._thread.is_alive():
            self._thread.join()
        if self._signalled_s is not None and self.stop is None:
            os.kill(os.getpid(), signal.SIGTERM)  # the next incarnation handles it
        os.close(self._wake)
        self._orders.close()

    # The control thread's side

    def _run(self) -> None:
        """Run until the main thread leaves, or until this thread ends the process."""
        socket = open_socket(zmq.DEALER, codec.COORDINATOR.max_bytes)
        socket.set(zmq.ROUTING_ID, f"{self.rank}.{self.identity}".encode())
        try:
            self._serve(socket)
        except Exception as error:  # the rank must not live on without its control thread
            self._exit_on_error(socket, f"its control thread failed with {type(error).__name__}: {error}")
        finally:
            socket.close(linger=200)  # time to deliver a last Fault

    def _serve(self, socket: zmq.Socket[bytes]) -> None:
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        connect(socket, self._address, self._curve_client)
        watched = {open_pidfd(pid): name for pid, name in self._watched_processes() if pid is not None}
        poller = zmq.Poller()
        for source in (socket, monitor, self._wake, *(fd for fd in watched if fd is not None)):
            poller.register(source, zmq.POLLIN)
        next_beat_s = time.monotonic()
        try:
            while not self._left:
                ready = dict(poller.poll(POLL_MS))
                now = time.monotonic()
                if now - next_beat_s > GONE_S:
                    self._discount_own_delay(now)
                if socket in ready:
                    self._receive(socket, now)
                if monitor in ready:
                    self._note_connection(monitor, now)
                self._take_signal(now)
                self._periodic()
                if self._wake in ready or now >= next_beat_s:
                    drain_eventfd(self._wake)
                    self._send_reports(socket, [*self._telemetry.messages(), *self._heartbeat.messages(now)])
                    next_beat_s = now + HEARTBEAT_S
                gone = [name for fd, name in watched.items() if fd is None or fd in ready]
                self._exit_if_due(gone[0] if gone else "", now)
        finally:
            socket.disable_monitor()
            monitor.close(linger=0)
            for fd in watched:
                if fd is not None:
                    os.close(fd)

    def _watched_processes(self) -> list[tuple[int | None, str]]:
        return [(self._frontend_pid, FRONTEND), (self._agent_pid, AGENT)]

    def _send_reports(self, socket: zmq.Socket[bytes], messages: list[RankMessage]) -> None:
        frame = codec.RANK.encode(messages)
        try:
            socket.send(frame)
        except zmq.Again:
            exit_now(1, f"rank {self.rank} ends: the coordinator at {self._address} refuses its key, which is of another run")

    def _receive(self, socket: zmq.Socket[bytes], now: float) -> None:
        while True:
            try:
                messages = codec.COORDINATOR.decode(socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            except EngineFailure as error:
                self._exit_on_error(socket, f"it does not understand the coordinator: {error}")
            for message in messages:
                if isinstance(message, Reconfigure) and self._on_reconfigure is not None:
                    self._on_reconfigure(message)  # before the main thread can end the process
                if self._orders.apply(message) and isinstance(message, Stop | Leave | Reconfigure):
                    self._note_over(message, now)

    def _note_over(self, order: Stop | Leave | Reconfigure, now: float) -> None:
        self._exit_rules.note_over(now)
        if isinstance(order, Stop) and order.code:
            self._on_failure()
            if self._frontend_pid is None:
                log_error_from_thread(order.reason)  # on its own host the frontend logs it

    def _note_connection(self, monitor: zmq.Socket[bytes], now: float) -> None:
        """Track whether the coordinator is connected."""
        while monitor.poll(0):
            event = recv_monitor_message(monitor)["event"]
            self._exit_rules.note_connection(event == zmq.EVENT_HANDSHAKE_SUCCEEDED, now)

    def _take_signal(self, now: float) -> None:
        if signal.sigtimedwait(SIGNALS, 0) is None:
            return
        if self._signalled_s is None:
            self._signalled_s = now
            self._heartbeat.drain_requested = True
            if self._sibling_is_dead():  # the other rank's error is the cause; the frontend reports it
                self._heartbeat.fail("sibling", "another rank of this node has ended")
                self._exit_rules.note_sibling_dead(now)
            self.wake()
        elif now - self._signalled_s > SAME_SIGNAL_S and self._heartbeat.fault is None:
            self.report_fault("ended at once by a second signal")

    def _sibling_is_dead(self) -> bool:
        if self._agent_pid is None or self._local_ranks == 1:
            return False
        alive = live_children(self._agent_pid)
        return alive is not None and len(alive) < self._local_ranks

    def _discount_own_delay(self, now: float) -> None:
        """This thread itself was suspended or starved: reset the deadlines of others, for silence in that time proves nothing."""
        self._exit_rules.discount_delay(now)
        self._heartbeat.extend_deadline(now + GONE_S)

    def _exit_if_due(self, gone: str, now: float) -> None:
        """End the process when a grace period is over or a watched process is gone."""
        if (exit := self._exit_rules.due(gone, now)) is not None:
            if exit.failed:
                self._on_failure()
            exit_now(exit.code, exit.why)

    def _exit_on_error(self, socket: zmq.Socket[bytes], why: str) -> NoReturn:
        """Report an error of this thread, give the coordinator time to answer with Stop, and end the process."""
        log_error_from_thread(f"rank {self.rank} ends: {why}")
        with contextlib.suppress(Exception):
            socket.send(codec.RANK.encode([Fault(self.rank, self._orders.epoch, "engine", truncate_error(why))]), zmq.NOBLOCK)
        with contextlib.suppress(Exception):  # the log may be what the error is about
            socket.send(codec.RANK.encode(self._telemetry.log()), zmq.NOBLOCK)
        with contextlib.suppress(Exception):
            socket.poll(int(SIBLING_REPORT_S * 1000))
        exit_now(1)
