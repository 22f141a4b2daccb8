"""The ZeroMQ channels between processes, one small class for each end.

    PlanBroadcaster  XPUB -> XSUB  PlanReceiver      rank 0 to all other ranks, one plan a step
    ResultSender     PUSH -> PULL  ResultReceiver    the sampling rank to rank 0
    EngineServer   ROUTER <> DEALER  EngineLink      the frontend and rank 0

Owns sockets, numbering and order; decides nothing about what is sent. Invariants: a sender never blocks (no high-water mark:
what is in flight is bounded by the engine) and nothing is dropped silently: plans are numbered (epoch, step), and a receiver asks
again for a gap, which rank 0's control thread fills while the plan is kept. A gap that cannot be filled, or a message of another
epoch, is an `EngineFailure`.
"""

import math
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable
from socket import socket as Listener
from typing import NamedTuple, Protocol

import zmq

from tpserve.errors import EngineFailure, UserError
from tpserve.host.network import listen
from tpserve.types.messages import EngineInput, EngineOutput
from tpserve.types.plan import StepPlan, StepResult
from tpserve.wire import codec
from tpserve.wire.curve import CurveClient, CurveServer

HEARTBEAT_MS = 500
HEARTBEAT_TIMEOUT_MS = 5000
"""At 1.5 s a link cut of 2 s loses plans; at 5 s none."""
RESEND_AFTER_S = 1.0
"""A receiver that heard nothing for this long asks for what it may have missed."""
GAP_S = 5.0
"""A plan that is still missing this long after a later one arrived is lost for good."""

_SUBSCRIBE = b"\x01"
_RESEND = struct.Struct("<cqq")


class Waitable(Protocol):
    """Something to wait for: a file descriptor that becomes readable."""

    def fileno(self) -> int: ...


class TcpEndpoint(NamedTuple):
    """Where processes of other nodes come in: the TCP endpoint to bind, and who may."""

    endpoint: str
    curve: CurveServer


class Channel:
    """An open socket and the address to reach it at. Subclasses give it a direction."""

    def __init__(self, socket: zmq.Socket[bytes], endpoint: str) -> None:
        self.socket = socket
        self.endpoint = endpoint

    def close(self) -> None:
        """Close at once; what is not delivered yet is dropped."""
        self.socket.close(linger=0)

    def wait(self, timeout_s: float, wake: Iterable[Waitable | int] = ()) -> bool:
        """Sleep until a message is here (True), or the time is over or a `wake` is readable (False)."""
        return self.socket in _poll(timeout_s, [self.socket, *wake])

    def _send(self, frame: bytes) -> None:
        """Send, which never waits. EngineFailure when the other end has refused this process."""
        try:
            self.socket.send(frame)
        except zmq.Again as error:
            raise EngineFailure(f"{self.endpoint} refuses this process: its key is of another run or cluster") from error

    def _frames(self) -> Iterable[bytes]:
        """The frames that are here now."""
        while True:
            try:
                yield self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return


def open_socket(kind: int, max_bytes: int) -> zmq.Socket[bytes]:
    """A socket with the settings that all of ours share."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.SNDTIMEO, 0)  # without a mark nothing waits but who was refused for its key, and would for ever
    socket.set(zmq.RCVHWM, 0)
    socket.set(zmq.MAXMSGSIZE, max_bytes)
    socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.set(zmq.HANDSHAKE_IVL, HEARTBEAT_TIMEOUT_MS)
    socket.set(zmq.RECONNECT_IVL, 50)
    socket.set(zmq.RECONNECT_IVL_MAX, 500)
    return socket


def tcp(address: str, ports: tuple[int, int] = (0, 0)) -> str:
    """The endpoint to bind: on the first free one of `ports`, or on a port of the kernel's choice."""
    host, (first, last) = f"[{address}]" if ":" in address else address, ports
    return f"tcp://{host}:{first}-{last}" if last else f"tcp://{host}:0"


def connect(socket: zmq.Socket[bytes], endpoint: str, curve_client: CurveClient | None = None) -> None:
    """Connect, now or as soon as somebody listens there. `curve_client`: for TCP."""
    assert (curve_client is None) == endpoint.startswith("ipc:"), "TCP needs a key, and only TCP"
    if curve_client is not None:
        curve_client.apply(socket)
    socket.set(zmq.IPV6, int("[" in endpoint))
    socket.connect(endpoint)


def bind(socket: zmq.Socket[bytes], endpoint: str, curve_server: CurveServer | None = None) -> str:
    """Bind, and return the address that came of it (`tcp://10.0.0.1:0` becomes a real port). `lock`: for TCP."""
    assert (curve_server is None) == endpoint.startswith("ipc:"), "TCP needs a lock, and only TCP"
    if curve_server is not None:
        curve_server.apply(socket)
    socket.set(zmq.IPV6, int("[" in endpoint))
    try:
        if endpoint.startswith("tcp:"):
            listener = _listen(endpoint)
            address, port = listener.getsockname()[:2]
            endpoint = tcp(address, (port, port))
            socket.set(zmq.USE_FD, listener.detach())  # ZeroMQ's from here on
        socket.bind(endpoint)
        socket.set(zmq.USE_FD, -1)
    except UserError as error:
        socket.close()
        raise EngineFailure(str(error)) from error
    except zmq.ZMQError as error:
        socket.close()
        raise EngineFailure(f"cannot listen at {endpoint}: {error.strerror}") from error
    return str(socket.get_string(zmq.LAST_ENDPOINT)).rstrip("\0")


def _listen(endpoint: str) -> Listener:
    """A socket on the first free port of an endpoint of `tcp`."""
    host, _, ports = endpoint.removeprefix("tcp://").rpartition(":")
    first, _, last = ports.partition("-")
    listener = listen(host.strip("[]"), (int(first), int(last or first)))
    listener.setblocking(False)
    return listener


def wait(timeout_s: float, *sources: Channel | Waitable | int) -> None:
    """Sleep until any source is readable. Channels, and anything with a file descriptor (a `Control`)."""
    _poll(timeout_s, [source.socket if isinstance(source, Channel) else source for source in sources])


def _poll(timeout_s: float, sources: list[object]) -> set[object]:
    poller = zmq.Poller()
    for source in sources:
        poller.register(source, zmq.POLLIN)
    return {source for source, _ in poller.poll(math.ceil(max(0.0, timeout_s) * 1000))}


class PlanBroadcaster(Channel):
    """Rank 0's end: every plan to every other rank. Bind before Hello; `begin` once all ranks are up.

    `serve` is for a thread that is never blocked in a collective: the rank that missed a plan may be what a collective waits for.
    """

    def __init__(self, endpoint: str, remote: TcpEndpoint | None = None) -> None:
        socket = open_socket(zmq.XPUB, codec.PLAN.max_bytes)
        socket.set(zmq.XPUB_VERBOSE, 1)  # every rank's subscription is passed up, though they are all the same
        super().__init__(socket, bind(socket, endpoint))
        self.remote_endpoint = "" if remote is None else bind(socket, *remote)
        self._epoch = -1
        self._next = 0
        self._kept: deque[tuple[int, bytes]] = deque()
        self._lock = threading.Lock()
        """Of the socket and what is kept, from `begin` on; nobody waits for long, since nothing under it blocks."""

    def begin(self, epoch: int, num_subscribers: int, timeout_s: float) -> None:
        """Wait until all receivers have subscribed: a plan sent earlier would reach only some."""
        self._epoch = epoch
        deadline_s = time.monotonic() + timeout_s
        seen = 0
        while seen < num_subscribers:
            if not self.wait(deadline_s - time.monotonic()):
                raise EngineFailure(f"{seen} of {num_subscribers} ranks listened for plans within {timeout_s:g} s")
            seen += self.socket.recv() == _SUBSCRIBE

    def send(self, plan: StepPlan) -> None:
        """Send the next plan to all, and keep it until it is retired."""
        assert (plan.epoch, plan.step) == (self._epoch, self._next), "plans are numbered from 0 in every epoch"
        frame = codec.PLAN.encode([plan])
        with self._lock:
            self._next += 1
            self._kept.append((plan.step, frame))
            self.socket.send(frame)

    def retire(self, step: int) -> None:
        """The result of `step` is applied, so every rank has had the plan: forget it and those before."""
        with self._lock:
            while self._kept and self._kept[0][0] <= step:
                self._kept.popleft()

    def serve(self) -> None:
        """Send again what a receiver missed. All receivers get it; those that had it drop it. On any thread, never waits."""
        with self._lock:
            wanted = self._next
            for request in self._frames():
                if len(request) == _RESEND.size:
                    _, epoch, step = _RESEND.unpack(request)
                    wanted = min(wanted, step if epoch == self._epoch else self._next)
            for step, frame in self._kept:
                if step >= wanted:
                    self.socket.send(frame)


class PlanReceiver(Channel):
    """Another rank's end. Hands out plans in order, each once."""

    def __init__(self, endpoint: str, epoch: int, curve_client: CurveClient | None = None) -> None:
        super().__init__(open_socket(zmq.XSUB, codec.PLAN.max_bytes), endpoint)
        connect(self.socket, endpoint, curve_client)
        self._send(_SUBSCRIBE)
        self._epoch = epoch
        self._next = 0
        self._ahead: dict[int, StepPlan] = {}
        self._heard_s = time.monotonic()
        self._gap_s: float | None = None

    def receive(self, timeout_s: float, wake: Iterable[Waitable | int] = ()) -> StepPlan | None:
        """The next plan; None when none came in time or a `wake` is readable. EngineFailure: a foreign epoch, a lost plan."""
        deadline_s = time.monotonic() + timeout_s
        while self._next not in self._ahead:
            now = time.monotonic()
            left_s = min(deadline_s, self._heard_s + RESEND_AFTER_S) - now
            if self.wait(left_s, wake):
                self._read()
            elif time.monotonic() >= self._heard_s + RESEND_AFTER_S:
                self._ask()
            else:
                return None
        plan = self._ahead.pop(self._next)
        self._next += 1
        return plan

    def _read(self) -> None:
        self._heard_s = time.monotonic()
        for frame in self._frames():
            for plan in codec.PLAN.decode(frame):
                if plan.epoch != self._epoch:
                    raise EngineFailure(f"a plan of epoch {plan.epoch} arrived in epoch {self._epoch}")
                if plan.step >= self._next:
                    self._ahead[plan.step] = plan
        if not self._ahead or self._next in self._ahead:
            self._gap_s = None
        else:
            self._ask()

    def _ask(self) -> None:
        """Ask for everything from the next plan on. Rank 0 keeps what is in flight, so only a plan of long ago stays missing."""
        self._heard_s = time.monotonic()
        if self._ahead:
            self._gap_s = self._gap_s or self._heard_s
            if self._heard_s - self._gap_s > GAP_S:
                raise EngineFailure(f"plan {self._next} of epoch {self._epoch} is lost: plan {min(self._ahead)} came without it")
        self._send(_RESEND.pack(b"\x02", self._epoch, self._next))


class ResultSender(Channel):
    """The sampling rank's end."""

    def __init__(self, endpoint: str, curve_client: CurveClient | None = None) -> None:
        super().__init__(open_socket(zmq.PUSH, codec.RESULT.max_bytes), endpoint)
        connect(self.socket, endpoint, curve_client)

    def send(self, result: StepResult) -> None:
        """Send one result; results are sent in step order."""
        self._send(codec.RESULT.encode([result]))


class ResultReceiver(Channel):
    """Rank 0's end. Bind before Hello."""

    def __init__(self, endpoint: str, remote: TcpEndpoint | None = None) -> None:
        socket = open_socket(zmq.PULL, codec.RESULT.max_bytes)
        super().__init__(socket, bind(socket, endpoint))
        self.remote_endpoint = "" if remote is None else bind(socket, *remote)
        self._epoch = -1
        self._next = 0

    def begin(self, epoch: int) -> None:
        """Results of `epoch` follow, from step 0."""
        self._epoch = epoch

    def receive(self, timeout_s: float, wake: Iterable[Waitable | int] = ()) -> list[StepResult]:
        """What has come, in step order; empty when nothing did in time. EngineFailure: a foreign epoch or a gap."""
        if not self.wait(timeout_s, wake):
            return []
        results = [result for frame in self._frames() for result in codec.RESULT.decode(frame)]
        for result in results:
            if (result.epoch, result.step) != (self._epoch, self._next):
                raise EngineFailure(
                    f"the result of step {result.step} of epoch {result.epoch} arrived, "
                    f"that of step {self._next} of epoch {self._epoch} was next"
                )
            self._next += 1
        return results


class EngineLink(Channel):
    """Rank 0's end of the link with the frontend. Its address there is rank 0's identity (`Hello`)."""

    def __init__(self, endpoint: str, identity: int) -> None:
        super().__init__(open_socket(zmq.DEALER, codec.ENGINE_INPUT.max_bytes), endpoint)
        self.socket.set(zmq.ROUTING_ID, _address(identity))
        connect(self.socket, endpoint)
        self._send(codec.ENGINE_OUTPUT.encode([]))  # the frontend may answer from now on

    def poll(self, timeout_s: float, wake: Iterable[Waitable | int] = ()) -> list[EngineInput]:
        """What the frontend asks for; empty when nothing came in time."""
        if not self.wait(timeout_s, wake):
            return []
        return [message for frame in self._frames() for message in codec.ENGINE_INPUT.decode(frame)]

    def send(self, outputs: list[EngineOutput]) -> None:
        """Hand outputs to the frontend, in one frame."""
        if outputs:
            self._send(codec.ENGINE_OUTPUT.encode(outputs))


class EngineServer(Channel):
    """The frontend's end. Speaks with the engine of the running epoch only; what others say is dropped."""

    def __init__(self, endpoint: str) -> None:
        socket = open_socket(zmq.ROUTER, codec.ENGINE_OUTPUT.max_bytes)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        super().__init__(socket, bind(socket, endpoint))
        self._engine = b""
        self._heard: set[bytes] = set()
        self._held: list[bytes] = []

    def attach(self, identity: int) -> None:
        """From now on the engine is rank 0's incarnation of this identity. What was held for an earlier one is dropped."""
        self._engine = _address(identity)
        self._heard &= {self._engine}
        self._held.clear()

    def send(self, inputs: list[EngineInput]) -> None:
        """Hand inputs to the engine, in one frame if they fit; held back until it has connected.

        EngineFailure when it is gone. What cannot be encoded raises, and nothing is sent.
        """
        if inputs:
            self._held += codec.ENGINE_INPUT.frames(inputs)
            self._deliver()

    def receive(self) -> list[EngineOutput]:
        """What the engine has said so far; never waits."""
        outputs: list[EngineOutput] = []
        while True:
            try:
                address, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return outputs
            self._heard.add(address)
            if address == self._engine:
                self._deliver()
                outputs += [message for frame in frames for message in codec.ENGINE_OUTPUT.decode(frame)]

    def _deliver(self) -> None:
        if self._engine not in self._heard:
            return
        for frame in self._held:
            try:
                self.socket.send_multipart([self._engine, frame])
            except zmq.ZMQError as error:
                raise EngineFailure(f"rank 0's engine cannot be reached: {error.strerror}") from error
        self._held.clear()


def _address(identity: int) -> bytes:
    return b"engine-%d" % identity
