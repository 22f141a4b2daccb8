"""A rank's control thread: its voice to the coordinator, its ear for orders and signals, and the one that ends it.

Owns a DEALER socket, the signals and the decision to `os._exit`. Never touches the model, torch or the plan channels, so that it
goes on while the main thread is blocked in a collective.

    main thread   hello -> wait_start -> up -> wait_run -> look at `stop` and `draining` between plans -> leave
    this thread   repeats Hello until Start, Up until Run, Drain until Drain, Fault until Stop; beats every 0.5 s

Signals are blocked in all threads (`block_signals`, first thing in main) and taken here: a Python handler would wait for the main
thread to come back from C. The first one asks the coordinator to drain, unless a sibling is dead already (then the agent is
tearing the group down, and there is nothing to drain to). A second one ends the service at once.

A rank never outlives what it serves: it exits when the coordinator says Stop, when the frontend is gone, and when its agent is.
"""

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable

import zmq
from zmq.utils.monitor import recv_monitor_message

from tpserve.errors import EngineFailure, UserError
from tpserve.types.messages import (
    NOWHERE,
    Beat,
    CoordinatorMessage,
    Drain,
    Experts,
    Fault,
    Hello,
    MemoryLedger,
    Numerics,
    Place,
    RankMessage,
    Run,
    Said,
    Start,
    Stop,
    Up,
)
from tpserve.wire import codec
from tpserve.wire.auth import Key
from tpserve.wire.channels import connect, open_socket
from tpserve.wire.lifetime import die_with, exit_now, live_children, open_pidfd, tell
from tpserve.wire.signals import SAME_SIGNAL_S, SIGNALS, take_over

log = logging.getLogger(__name__)

BEAT_S = 0.5
POLL_MS = 100
"""How often signals are looked for."""
GRACE_S, FAILED_GRACE_S = 2.0, 0.5
"""How long after Stop the main thread may take to leave; after a failure it has nothing to finish."""
WORD_S = 0.5
"""How long a rank whose sibling has died may take to tell the frontend."""
LEAVE_S = 10.0
"""How long the process may take to end after it left: destructors of a broken mesh can hang."""
GONE_S = 5.0
"""A coordinator that cannot be reached again for this long is gone (a heartbeat of 5 s has found the link dead before)."""
CONNECT_S = 30.0
VERDICT_S = 3.0


class Stopped(Exception):
    """The coordinator said Stop while the main thread waited for something else."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason or "stopped")
        self.code = code
        self.reason = reason


class Control:
    """See the module docstring. One per incarnation; every method is for the main thread."""

    def __init__(
        self,
        rank: int,
        address: str,
        *,
        host: str,
        place: Place = NOWHERE,
        key: Key | None = None,
        incarnation: int | None = None,
        frontend_pid: int | None = None,
        agent_pid: int | None = None,
        local_ranks: int = 1,
        at_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """`address`: the coordinator's; `key`: to get in there over TCP. `incarnation`: by default the time, which grows.
        `frontend_pid`: when it runs on this host. `agent_pid`: the parent that started `local_ranks` ranks on this host.
        `at_failure` is called on the control thread before this process ends for a failure."""
        self.rank = rank
        self.incarnation = time.time_ns() if incarnation is None else incarnation
        self._address, self._key = address, key
        self._host, self._place, self._at_failure = host, place, at_failure
        self._frontend_pid, self._agent_pid, self._local_ranks = frontend_pid, agent_pid, local_ranks
        self._changed = threading.Condition()
        self._news = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._nudge = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._live, name="control", daemon=True)
        # said by the main thread
        self._hello: Hello | None = None
        self._up: Up | None = None
        self._fault: Fault | None = None
        self._phase, self._percent, self._step = "", 0, -1
        self._due: tuple[int, float] | None = None
        self._read_tally: Callable[[], bytes] | None = None
        self._expert_layers: tuple[int, ...] = ()
        self._read_log: Callable[[int], tuple[int, list[str]]] = lambda number: (number, [])
        self._left = False
        # said by the coordinator
        self._start: Start | None = None
        self._run: Run | None = None
        self.draining = False
        self.stop: Stop | None = None
        # the thread's own
        self._tally_told = b""
        self._lines_told = 0
        self._stopped_s, self._ends_s = 0.0, math.inf
        self._signalled_s: float | None = None
        self._away_s: float | None = time.monotonic()
        self._connected = False

    # The main thread's side

    def start(self) -> None:
        """Begin to speak and listen."""
        if self._agent_pid is not None:
            die_with(self._agent_pid)
        take_over()
        self._thread.start()

    def fileno(self) -> int:
        """A descriptor that is readable while there is news (Run, Drain, Stop) that `clear` has not taken note of."""
        return self._news

    def clear(self) -> None:
        """The main thread has looked at the news."""
        _empty(self._news)

    def progress(self, phase: str, percent: int) -> None:
        """What the next beats say of the start."""
        self._phase, self._percent = phase, percent

    def step(self, step: int) -> None:
        """The last plan finished."""
        self._step = step

    def expect(self, due: tuple[int, float] | None) -> None:
        """Rank 0: the oldest plan in flight and when (monotonic) it is overdue; None when nothing is. Overdue is a fault."""
        self._due = due

    def count(self, layers: tuple[int, ...], read: Callable[[], bytes]) -> None:
        """From now on tell with the beats what these layers' experts have had; `read` is called on the control thread."""
        self._expert_layers, self._read_tally = layers, read

    def repeat(self, read: Callable[[int], tuple[int, list[str]]]) -> None:
        """Tell with the beats what this rank logs. `read`: lines from a number on, and the number of the first."""
        self._read_log = read

    def complain(self, text: str) -> None:
        """Report what makes going on pointless, whatever the main thread does."""
        self._fault = self._fault or Fault(self.rank, self._epoch, "engine", text)
        os.eventfd_write(self._nudge, 1)

    def hello(
        self,
        endpoints: dict[str, str],
        fingerprint: dict[str, str],
        traits: dict[str, str],
        stage: int = 0,
        processor: dict[str, str] | None = None,
    ) -> None:
        """Ask to take part."""
        me = (self.rank, self.incarnation, os.getpid(), self._host)
        self._hello = Hello(*me, endpoints, fingerprint, self._place, traits, stage, processor or {})
        os.eventfd_write(self._nudge, 1)

    def wait_start(self, timeout_s: float | None = None) -> Start:
        """Wait until all ranks are there. Raises Stopped, or EngineFailure when the time is over."""
        self._wait(lambda: self._start is not None, timeout_s, "the other ranks")
        assert self._start is not None
        return self._start

    def up(self, ledger: MemoryLedger, facts: dict[str, int], numerics: Numerics | None = None) -> None:
        """The mesh stands and the shard is loaded."""
        assert self._start is not None
        self._up = Up(self.rank, self._start.epoch, ledger, facts, numerics)
        os.eventfd_write(self._nudge, 1)

    def wait_run(self, timeout_s: float | None = None) -> int:
        """Wait until all ranks are up; returns the epoch. Raises Stopped, or EngineFailure when the time is over."""
        self._wait(lambda: self._run is not None, timeout_s, "the other ranks to load")
        assert self._run is not None
        return self._run.epoch

    def fail(self, error: BaseException) -> int:
        """Report why this rank cannot go on and wait for the verdict; returns the exit code."""
        kind, text = ("user", str(error)) if isinstance(error, UserError) else ("engine", f"{type(error).__name__}: {error}")
        self._fault = Fault(self.rank, self._epoch, "user" if kind == "user" else "engine", text)
        os.eventfd_write(self._nudge, 1)
        with self._changed:
            self._changed.wait_for(lambda: self.stop is not None, VERDICT_S)
        self.leave()
        return self.stop.code if self.stop is not None else (2 if kind == "user" else 1)

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
        os.eventfd_write(self._nudge, 1)
        if self._thread.is_alive():
            self._thread.join()
        if self._signalled_s is not None and self.stop is None:
            os.kill(os.getpid(), signal.SIGTERM)  # it is for the next incarnation, then
        os.close(self._nudge)
        os.close(self._news)

    def _wait(self, condition: Callable[[], bool], timeout_s: float | None, what: str) -> None:
        with self._changed:
            in_time = self._changed.wait_for(lambda: self.stop is not None or condition(), timeout_s)
        if self.stop is not None:
            raise Stopped(self.stop.code, self.stop.reason)
        if not in_time:
            raise EngineFailure(f"waited {timeout_s:g} s for {what}")

    @property
    def _epoch(self) -> int:
        return self._start.epoch if self._start is not None else 0

    # The thread's side

    def _live(self) -> None:
        """A rank without this thread would neither beat nor obey: what fails here ends the process."""
        try:
            self._serve()
        except Exception as error:
            exit_now(1, f"rank {self.rank} ends: its control thread failed with {type(error).__name__}: {error}")

    def _serve(self) -> None:
        """Until the main thread has left, or this thread ends the process."""
        socket = open_socket(zmq.DEALER, codec.COORDINATOR.max_bytes)
        socket.set(zmq.ROUTING_ID, f"{self.rank}.{self.incarnation}".encode())
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        connect(socket, self._address, self._key)
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
                    self._forgive(now)
                if socket in ready:
                    self._hear(socket, now)
                if monitor in ready:
                    self._see(monitor, now)
                self._take_signal(now)
                self._see_whether_overdue(now)
                if self._nudge in ready or now >= next_beat_s:
                    _empty(self._nudge)
                    self._say(socket)
                    next_beat_s = now + BEAT_S
                gone = [name for fd, name in watched.items() if fd is None or fd in ready]
                self._judge(gone[0] if gone else "", now)
        finally:
            socket.disable_monitor()
            monitor.close(linger=0)
            socket.close(linger=200)  # a last Fault is worth waiting for
            for fd in watched:
                if fd is not None:
                    os.close(fd)

    def _watched(self) -> list[tuple[int | None, str]]:
        return [(self._frontend_pid, "the frontend"), (self._agent_pid, "the agent that started this rank")]

    def _say(self, socket: zmq.Socket[bytes]) -> None:
        try:
            socket.send(codec.RANK.encode(self._sayings()))
        except zmq.Again:
            exit_now(1, f"rank {self.rank} ends: the coordinator at {self._address} refuses its key, which is of another run")

    def _sayings(self) -> list[RankMessage]:
        """All that the coordinator has not answered yet, and a beat."""
        said: list[RankMessage] = []
        if self._hello is not None and self._start is None:
            said.append(self._hello)
        if self._up is not None and self._run is None:
            said.append(self._up)
        if self._signalled_s is not None and self._fault is None and not self.draining:
            said.append(Drain(self.rank))
        if self._run is not None and self._read_tally is not None and (tokens := self._read_tally()) != self._tally_told:
            self._tally_told = tokens
            said.append(Experts(self.rank, self._epoch, self._expert_layers, tokens))
        start, lines = self._read_log(self._lines_told)
        if lines:
            self._lines_told = start + len(lines)
            said.append(Said(self.rank, start, tuple(lines)))
        if self._fault is not None:
            said.append(self._fault)
        return [*said, Beat(self.rank, self._epoch, self._phase, self._percent, self._step)]

    def _hear(self, socket: zmq.Socket[bytes], now: float) -> None:
        while True:
            try:
                messages = codec.COORDINATOR.decode(socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            except EngineFailure as error:
                exit_now(1, f"rank {self.rank} does not understand the coordinator: {error}")
            with self._changed:
                for message in messages:
                    self._take(message, now)
                self._changed.notify_all()

    def _take(self, message: CoordinatorMessage, now: float) -> None:
        """Note an order; repeated ones change nothing."""
        match message:
            case Start() if self._start is None and self._hello is not None:
                self._start = message
            case Run(epoch) if self._run is None and epoch == self._epoch:
                self._run = message
            case Drain() if not self.draining:
                self.draining = True
            case Stop() if self.stop is None:
                self.stop, self._stopped_s = message, now
                if message.code:
                    self._at_failure()
                    if self._frontend_pid is None:
                        tell(message.reason)  # where the frontend runs, it says so itself
            case _:
                return
        os.eventfd_write(self._news, 1)

    def _see(self, monitor: zmq.Socket[bytes], now: float) -> None:
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
            if self._sibling_is_dead():  # who died, and why, is the news; the frontend tells it
                self._fault = self._fault or Fault(self.rank, self._epoch, "sibling", "another rank of this node has ended")
                self._ends_s = now + WORD_S
            os.eventfd_write(self._nudge, 1)
        elif now - self._signalled_s > SAME_SIGNAL_S and self._fault is None:
            self.complain("ended at once by a second signal")

    def _see_whether_overdue(self, now: float) -> None:
        if self._due is None or self._fault is not None or now < self._due[1]:
            return
        self.complain(f"step {self._due[0]} does not come back: a rank hangs")

    def _sibling_is_dead(self) -> bool:
        if self._agent_pid is None or self._local_ranks == 1:
            return False
        alive = live_children(self._agent_pid)
        return alive is not None and len(alive) < self._local_ranks

    def _forgive(self, now: float) -> None:
        """This thread was held up itself: what it has not seen since then says nothing of others."""
        if self._away_s is not None:
            self._away_s = now
        if self._due is not None:
            self._due = (self._due[0], max(self._due[1], now + GONE_S))

    def _judge(self, gone: str, now: float) -> None:
        """End the process if the main thread will not, or must not go on."""
        if self.stop is not None and now - self._stopped_s > (FAILED_GRACE_S if self.stop.code else GRACE_S):
            exit_now(self.stop.code)
        if now >= self._ends_s:
            exit_now(1)
        if self.stop is not None:
            return
        if gone:
            self._at_failure()
            exit_now(1, f"rank {self.rank} ends: {gone} is gone")
        if self._away_s is not None and now - self._away_s > (GONE_S if self._connected else CONNECT_S):
            exit_now(1, f"rank {self.rank} ends: the coordinator at {self._address} cannot be reached")


def _empty(eventfd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(eventfd)
