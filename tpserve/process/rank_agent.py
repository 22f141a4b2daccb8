"""A rank's control thread: it heartbeats, takes orders and signals, and ends the process.

    main thread   hello -> wait_start -> up -> wait_run -> look at `stop` and `draining` between plans -> leave
    this thread   heartbeat   what the coordinator must hear, every 0.5 s and at once when there is news
                  orders      what the coordinator says
                  telemetry   log lines and counts, for operators
                  beside      what must go on while the main thread is blocked, such as sending lost plans again

Owns a DEALER socket, the signals and the decision to `os._exit`. Never touches the model or torch, so that it goes on while the
main thread is blocked in a collective. An error on it ends the process, and the coordinator hears of the error first.

Signals are blocked in all threads (`block_signals`, first thing in main) and taken here: a Python handler would wait for the main
thread to come back from C. The first one asks the coordinator to drain, unless a sibling is dead already (then the agent is
tearing the group down, and there is nothing to drain to). A second one ends the service at once.

A rank never outlives what it serves: it exits when the coordinator says Stop, when the frontend is gone, and when its agent is.
"""

import contextlib
import math
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import zmq
from zmq.utils.monitor import recv_monitor_message

from tpserve.errors import EngineFailure, UserError
from tpserve.process.heartbeat import HeartbeatState, sendable
from tpserve.process.orders import Orders, empty
from tpserve.process.process_utils import die_with, exit_now, live_children, log_error_from_thread, open_pidfd
from tpserve.process.signals import SAME_SIGNAL_S, SIGNALS, take_over
from tpserve.process.telemetry import Lines, Telemetry
from tpserve.types.messages import UNKNOWN_NODE, Fault, Hello, MemoryLedger, NodeInfo, Numerics, RankMessage, Ready, Start, Stop
from tpserve.wire import codec
from tpserve.wire.channels import connect, open_socket
from tpserve.wire.curve import CurveClient

HEARTBEAT_S = 0.5
POLL_MS = 100
"""How often signals are looked for."""
GRACE_S, FAILED_GRACE_S = 2.0, 0.5
"""How long after Stop the main thread may take to leave; after a failure it has nothing to finish."""
SIBLING_REPORT_S = 0.5
"""How long a rank that ends may take to tell the coordinator why."""
LEAVE_S = 10.0
"""How long the process may take to end after it left: destructors of a broken mesh can hang."""
GONE_S = 5.0
"""A coordinator that cannot be reached again for this long is gone (a heartbeat of 5 s has found the link dead before)."""
CONNECT_S = 30.0
VERDICT_S = 3.0


class RankAgent:
    """See the module docstring. One per incarnation; every public method is for the main thread."""

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
        at_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """`address`: the coordinator's; `curve_client`: to get in there over TCP. `identity`: by default a random number, by
        which the
        coordinator tells this incarnation from others. `frontend_pid`: when it runs on this host. `agent_pid`: the parent that
        started `local_ranks` ranks on this host. `at_failure` is called on the control thread before this process ends for a
        failure."""
        self.rank = rank
        self.identity = secrets.randbits(63) if identity is None else identity
        self._address, self._curve_client = address, curve_client
        self._host, self._node, self._at_failure = host, node, at_failure
        self._frontend_pid, self._agent_pid, self._local_ranks = frontend_pid, agent_pid, local_ranks
        self._orders = Orders()
        self._heartbeat = HeartbeatState(rank, self._orders)
        self._telemetry = Telemetry(rank, self._orders)
        self._beside: Callable[[], None] = lambda: None
        self._nudge = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._live, name="control", daemon=True)
        self._left = False
        # the thread's own
        self._stopped_s, self._ends_s = 0.0, math.inf
        self._signalled_s: float | None = None
        self._away_s: float | None = time.monotonic()
        self._connected = False

    # The main thread's side: what to tell

    def start(self) -> None:
        """Begin to speak and listen."""
        if self._agent_pid is not None:
            die_with(self._agent_pid)
        take_over()
        self._thread.start()

    def nudge(self) -> None:
        """Have the thread speak at once."""
        with contextlib.suppress(OSError):  # it is closed: this incarnation has left
            os.eventfd_write(self._nudge, 1)

    def report_progress(self, phase: str, percent: int) -> None:
        """What the next heartbeats say of the start."""
        self._heartbeat.phase, self._heartbeat.percent = phase, percent

    def busy(self, what: str) -> None:
        """Long work that is no hang has begun inside a step; it ends with the step."""
        self._heartbeat.busy = what
        self.nudge()

    def report_step(self, step: int) -> None:
        """The last plan finished."""
        self._heartbeat.step, self._heartbeat.busy = step, ""

    def watch_step(self, due: tuple[int, float] | None) -> None:
        """Rank 0: the oldest plan in flight and when (monotonic) it is overdue; None when nothing is."""
        self._heartbeat.due = due

    def report_expert_load(self, layers: tuple[int, ...], read: Callable[[], bytes]) -> None:
        """From now on tell with the heartbeats what these layers' experts have had; `read` is called on the control thread."""
        self._telemetry.count(layers, read)

    def report_log(self, lines: Lines) -> None:
        """From now on tell with the heartbeats what this rank logs."""
        self._telemetry.repeat(lines)

    def beside(self, serve: Callable[[], None]) -> None:
        """From now on call `serve` several times a second on the control thread, whatever the main thread waits for."""
        self._beside = serve

    def report_fault(self, text: str) -> None:
        """Report what makes going on pointless, whatever the main thread does."""
        self._heartbeat.fail("engine", text)
        self.nudge()

    def hello(
        self,
        endpoints: dict[str, str],
        fingerprint: dict[str, str],
        traits: dict[str, str],
        stage: int = 0,
        processor: dict[str, str] | None = None,
    ) -> None:
        """Ask to take part."""
        self._orders.expected = True
        me = (self.rank, self.identity, os.getpid(), self._host)
        hello = Hello(*me, endpoints, fingerprint, self._node, traits, stage, processor or {})
        self._heartbeat.hello = hello
        self.nudge()

    def ready(self, ledger: MemoryLedger, facts: dict[str, int], numerics: Numerics | None = None) -> None:
        """The mesh stands and the shard is loaded."""
        self._heartbeat.busy = ""
        self._heartbeat.ready = Ready(self.rank, self._orders.epoch, ledger, facts, numerics)
        self.nudge()

    # The main thread's side: what was said

    @property
    def stop(self) -> Stop | None:
        """Stop, once it was said."""
        return self._orders.stop

    @property
    def draining(self) -> bool:
        """Whether Drain was said."""
        return self._orders.draining

    def fileno(self) -> int:
        """A descriptor that is readable while there is an order that `clear` has not taken note of."""
        return self._orders.fileno()

    def clear(self) -> None:
        """The main thread has looked at the orders."""
        self._orders.clear()

    def wait_start(self, timeout_s: float | None = None) -> Start:
        """Wait until all ranks are there. Raises Stopped, or EngineFailure when the time is over."""
        self._orders.wait(lambda: self._orders.start is not None, timeout_s, "the other ranks")
        assert self._orders.start is not None
        return self._orders.start

    def wait_run(self, timeout_s: float | None = None) -> int:
        """Wait until all ranks are up; returns the epoch. Raises Stopped, or EngineFailure when the time is over."""
        self._orders.wait(lambda: self._orders.run is not None, timeout_s, "the other ranks to load")
        return self._orders.epoch

    # The main thread's side: the end

    def fail(self, error: BaseException) -> int:
        """Report why this rank cannot go on and wait for the verdict; returns the exit code."""
        by_user = isinstance(error, UserError)
        self._heartbeat.fail("user" if by_user else "engine", str(error) if by_user else f"{type(error).__name__}: {error}")
        self.nudge()
        stop = self._orders.wait_stop(VERDICT_S)
        self.leave()
        return stop.code if stop is not None else (2 if by_user else 1)

    def leave(self) -> int:
        """The main thread is leaving: the process has `LEAVE_S` to end. Returns the exit code that Stop gave."""
        self.close()
        code = self.stop.code if self.stop is not None else 0
        timer = threading.Timer(LEAVE_S, os._exit, (code,))
        timer.daemon = True
        timer.start()
        return code

    def close(self) -> None:
        """End the thread; the process goes on (to take part again, as a new incarnation)."""
        if self._left:
            return
        self._left = True
        self.nudge()
        if self._thread.is_alive():
            self._thread.join()
        if self._signalled_s is not None and self.stop is None:
            os.kill(os.getpid(), signal.SIGTERM)  # it is for the next incarnation, then
        os.close(self._nudge)
        self._orders.close()

    # The thread's side

    def _live(self) -> None:
        """Until the main thread has left, or this thread ends the process."""
        socket = open_socket(zmq.DEALER, codec.COORDINATOR.max_bytes)
        socket.set(zmq.ROUTING_ID, f"{self.rank}.{self.identity}".encode())
        try:
            self._serve(socket)
        except Exception as error:  # the edge of the thread: a rank without it would neither send heartbeats nor obey
            self._end_for(socket, f"its control thread failed with {type(error).__name__}: {error}")
        finally:
            socket.close(linger=200)  # a last Fault is worth waiting for

    def _serve(self, socket: zmq.Socket[bytes]) -> None:
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        connect(socket, self._address, self._curve_client)
        watched = {open_pidfd(pid): name for pid, name in self._watched() if pid is not None}
        poller = zmq.Poller()
        for source in (socket, monitor, self._nudge, *(fd for fd in watched if fd is not None)):
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
                self._beside()
                if self._nudge in ready or now >= next_beat_s:
                    empty(self._nudge)
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

    def _watched(self) -> list[tuple[int | None, str]]:
        return [(self._frontend_pid, "the frontend"), (self._agent_pid, "the agent that started this rank")]

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
                self._end_for(socket, f"it does not understand the coordinator: {error}")
            for message in messages:
                if self._orders.take(message) and isinstance(message, Stop):
                    self._note_stop(message, now)

    def _note_stop(self, stop: Stop, now: float) -> None:
        self._stopped_s = now
        if stop.code:
            self._at_failure()
            if self._frontend_pid is None:
                log_error_from_thread(stop.reason)  # where the frontend runs, it says so itself

    def _note_connection(self, monitor: zmq.Socket[bytes], now: float) -> None:
        """Note whether the coordinator can be reached."""
        while monitor.poll(0):
            event = recv_monitor_message(monitor)["event"]
            self._away_s = None if event == zmq.EVENT_HANDSHAKE_SUCCEEDED else (self._away_s or now)
            self._connected = self._connected or self._away_s is None

    def _take_signal(self, now: float) -> None:
        if signal.sigtimedwait(SIGNALS, 0) is None:
            return
        if self._signalled_s is None:
            self._signalled_s = now
            self._heartbeat.asked_to_end = True
            if self._sibling_is_dead():  # who died, and why, is the news; the frontend tells it
                self._heartbeat.fail("sibling", "another rank of this node has ended")
                self._ends_s = now + SIBLING_REPORT_S
            self.nudge()
        elif now - self._signalled_s > SAME_SIGNAL_S and self._heartbeat.fault is None:
            self.report_fault("ended at once by a second signal")

    def _sibling_is_dead(self) -> bool:
        if self._agent_pid is None or self._local_ranks == 1:
            return False
        alive = live_children(self._agent_pid)
        return alive is not None and len(alive) < self._local_ranks

    def _discount_own_delay(self, now: float) -> None:
        """This thread was held up itself: what it has not seen since then says nothing of others."""
        if self._away_s is not None:
            self._away_s = now
        self._heartbeat.forgive(now + GONE_S)

    def _exit_if_due(self, gone: str, now: float) -> None:
        """End the process if the main thread will not, or must not go on."""
        stop = self.stop
        if stop is not None and now - self._stopped_s > (FAILED_GRACE_S if stop.code else GRACE_S):
            exit_now(stop.code)
        if now >= self._ends_s:
            exit_now(1)
        if stop is not None:
            return
        if gone:
            self._at_failure()
            exit_now(1, f"rank {self.rank} ends: {gone} is gone")
        if self._away_s is not None and now - self._away_s > (GONE_S if self._connected else CONNECT_S):
            exit_now(1, f"rank {self.rank} ends: the coordinator at {self._address} cannot be reached")

    def _end_for(self, socket: zmq.Socket[bytes], why: str) -> NoReturn:
        """End the process for an error of this thread's; the coordinator hears of it, and answers with Stop, if it still can."""
        log_error_from_thread(f"rank {self.rank} ends: {why}")
        with contextlib.suppress(Exception):
            socket.send(codec.RANK.encode([Fault(self.rank, self._orders.epoch, "engine", sendable(why))]), zmq.NOBLOCK)
        with contextlib.suppress(Exception):  # the log may be what the error is about
            socket.send(codec.RANK.encode(self._telemetry.log()), zmq.NOBLOCK)
        with contextlib.suppress(Exception):
            socket.poll(int(SIBLING_REPORT_S * 1000))
        exit_now(1)
