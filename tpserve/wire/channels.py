"""ZeroMQ channels between processes, one class for each end.

    PlanBroadcaster  XPUB -> XSUB  PlanReceiver      rank 0 to all other ranks, one plan per step
    ResultSender     PUSH -> PULL  ResultReceiver    the sampling rank to rank 0
    EngineServer   ROUTER <> DEALER  EngineLink      the frontend and rank 0

Owns sockets, numbering and order. Never decides what is sent.

Invariants:
- A sender never blocks. There is no high-water mark, because the engine bounds what is in flight.
- Nothing is dropped silently. Plans are numbered (epoch, step). A receiver requests missing plans again, and rank 0's control
  thread resends them. A plan that stays missing, or a message of another epoch, raises `EngineFailure`.
"""

import contextlib
import math
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from socket import socket as Listener
from typing import NamedTuple, Protocol

import zmq

from tpserve.errors import EngineFailure, PeerLost, UserError
from tpserve.host.network import listen
from tpserve.types.messages import EngineInput, EngineOutput
from tpserve.types.plan import StepPlan, StepResult
from tpserve.wire import codec
from tpserve.wire.curve import CurveClient, CurveServer

HEARTBEAT_MS = 500
HEARTBEAT_TIMEOUT_MS = 5000
"""With 1.5 s, a network cut of 2 s loses plans; with 5 s it does not."""
RESEND_AFTER_S = 1.0
"""A receiver that gets nothing for this long requests the plans that it may have missed."""
BEGIN_POLL_S = 0.1
GAP_S = 5.0
"""A plan that is still missing this long after a later one arrived is lost."""

_SUBSCRIBE = b"\x01"
_RESEND = struct.Struct("<cqq")


class Waitable(Protocol):
    """An object with a file descriptor that becomes readable."""

    def fileno(self) -> int:
        """The file descriptor to poll."""


class TcpEndpoint(NamedTuple):
    """A TCP endpoint to bind for processes of other nodes, and the keys that may connect."""

    endpoint: str
    curve: CurveServer


class Channel:
    """An open socket and its endpoint. Subclasses give it a direction."""

    def __init__(self, socket: zmq.Socket[bytes], endpoint: str) -> None:
        self.socket = socket
        self.endpoint = endpoint

    def close(self) -> None:
        """Close at once and drop undelivered messages."""
        self.socket.close(linger=0)

    def wait(self, timeout_s: float, wake: Iterable[Waitable | int] = ()) -> bool:
        """Wait for a message. Returns False after `timeout_s`, or when a source in `wake` becomes readable first."""
        return self.socket in _poll(timeout_s, [self.socket, *wake])

    def _send(self, frame: bytes) -> None:
        """Send without blocking. Raises EngineFailure when the other end refused this process."""
        try:
            self.socket.send(frame)
        except zmq.Again as error:
            raise EngineFailure(f"{self.endpoint} refuses this process: its key is of another run or cluster") from error

    def _receive_available(self) -> Iterable[bytes]:
        """Yield the frames that have arrived, without blocking."""
        while True:
            try:
                yield self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return


def open_socket(kind: int, max_bytes: int) -> zmq.Socket[bytes]:
    """Open a socket with the options of all channels. `kind`: a zmq socket type. `max_bytes`: the largest frame accepted."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.SNDTIMEO, 0)  # without a high-water mark only a peer refused for its key would block, forever
    socket.set(zmq.RCVHWM, 0)
    socket.set(zmq.MAXMSGSIZE, max_bytes)
    socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.set(zmq.HANDSHAKE_IVL, HEARTBEAT_TIMEOUT_MS)
    socket.set(zmq.RECONNECT_IVL, 50)
    socket.set(zmq.RECONNECT_IVL_MAX, 500)
    return socket


def tcp(address: str, ports: tuple[int, int] = (0, 0)) -> str:
    """The endpoint string for `bind`: the first free port of the range `ports` (inclusive), or any free port for (0, 0)."""
    host, (first, last) = f"[{address}]" if ":" in address else address, ports
    return f"tcp://{host}:{first}-{last}" if last else f"tcp://{host}:0"


def connect(socket: zmq.Socket[bytes], endpoint: str, curve_client: CurveClient | None = None) -> None:
    """Connect now, or as soon as a peer listens there. TCP needs `curve_client`; ipc must not have one."""
    assert (curve_client is None) == endpoint.startswith("ipc:"), "TCP needs CURVE keys, and only TCP"
    if curve_client is not None:
        curve_client.apply(socket)
    socket.set(zmq.IPV6, int("[" in endpoint))
    socket.connect(endpoint)


def bind(socket: zmq.Socket[bytes], endpoint: str, curve_server: CurveServer | None = None) -> str:
    """Bind and return the real endpoint (`tcp://10.0.0.1:0` gets a port). TCP needs `curve_server`; ipc must not have one.

    Raises EngineFailure, and closes the socket, when the endpoint cannot be bound.
    """
    assert (curve_server is None) == endpoint.startswith("ipc:"), "TCP needs CURVE keys, and only TCP"
    if curve_server is not None:
        curve_server.apply(socket)
    socket.set(zmq.IPV6, int("[" in endpoint))
    try:
        if endpoint.startswith("tcp:"):
            listener = _listen(endpoint)
            address, port = listener.getsockname()[:2]
            endpoint = tcp(address, (port, port))
            socket.set(zmq.USE_FD, listener.detach())  # ZeroMQ owns it from here on
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
    """Listen on the first free port of an endpoint made by `tcp`."""
    host, _, ports = endpoint.removeprefix("tcp://").rpartition(":")
    first, _, last = ports.partition("-")
    listener = listen(host.strip("[]"), (int(first), int(last or first)))
    listener.setblocking(False)
    return listener


def wait(timeout_s: float, *sources: Channel | Waitable | int) -> None:
    """Wait until any source is readable: a channel, or an object with a file descriptor such as `RankAgent`."""
    _poll(timeout_s, [source.socket if isinstance(source, Channel) else source for source in sources])


def _poll(timeout_s: float, sources: list[object]) -> set[object]:
    """The readable ones of `sources`; empty after `timeout_s`."""
    poller = zmq.Poller()
    for source in sources:
        poller.register(source, zmq.POLLIN)
    return {source for source, _ in poller.poll(math.ceil(max(0.0, timeout_s) * 1000))}


class PlanBroadcaster(Channel):
    """Rank 0's end: sends every plan to every other rank. Bind before Hello; call `begin` once all ranks are ready.

    Call `resend_missed` on a thread that never blocks in a collective, which may wait for the rank that missed a plan.
    """

    def __init__(self, endpoint: str, remote: TcpEndpoint | None = None) -> None:
        socket = open_socket(zmq.XPUB, codec.PLAN.max_bytes)
        socket.set(zmq.XPUB_VERBOSE, 1)  # report every rank's subscription, though all are equal
        super().__init__(socket, bind(socket, endpoint))
        self.remote_endpoint = "" if remote is None else bind(socket, *remote)
        self._epoch = -1
        self._next = 0
        self._in_flight: deque[tuple[int, bytes]] = deque()
        self._lock = threading.Lock()
        """Guards the socket and `_in_flight` from `begin` on. Nothing blocks while it is locked."""

    def begin(self, epoch: int, num_subscribers: int, timeout_s: float, is_over: Callable[[], bool] = lambda: False) -> None:
        """Wait until all receivers have subscribed; an earlier plan would reach only some.

        PeerLost after `timeout_s`, or when the epoch `is_over`.
        """
        self._epoch = epoch
        deadline_s = time.monotonic() + timeout_s
        subscribed = 0
        while subscribed < num_subscribers:
            if self.wait(min(BEGIN_POLL_S, deadline_s - time.monotonic())):
                subscribed += self.socket.recv() == _SUBSCRIBE
            elif is_over() or time.monotonic() > deadline_s:
                raise PeerLost(f"{subscribed} of {num_subscribers} ranks listened for plans within {timeout_s:g} s")

    def send(self, plan: StepPlan) -> None:
        """Send the next plan to all receivers. It can be resent until `retire`."""
        assert (plan.epoch, plan.step) == (self._epoch, self._next), "plans are numbered from 0 in every epoch"
        frame = codec.PLAN.encode([plan])
        with self._lock:
            self._next += 1
            self._in_flight.append((plan.step, frame))
            self.socket.send(frame)

    def close(self) -> None:
        """Close at once. Thread-safe: a later `resend_missed` does nothing."""
        with self._lock:
            super().close()

    def retire(self, step: int) -> None:
        """Forget the plans up to `step`. Its result is applied, so every rank has received them."""
        with self._lock:
            while self._in_flight and self._in_flight[0][0] <= step:
                self._in_flight.popleft()

    def resend_missed(self) -> None:
        """Resend the plans that a receiver requests. All receivers get them and drop duplicates. Thread-safe, never blocks."""
        with self._lock:
            if self.socket.closed:
                return
            first_step = self._next
            for request in self._receive_available():
                if len(request) == _RESEND.size:
                    _, epoch, step = _RESEND.unpack(request)
                    first_step = min(first_step, step if epoch == self._epoch else self._next)
            for step, frame in self._in_flight:
                if step >= first_step:
                    self.socket.send(frame)


class PlanReceiver(Channel):
    """Another rank's end. Returns plans in order, each once."""

    def __init__(self, endpoint: str, epoch: int, curve_client: CurveClient | None = None) -> None:
        super().__init__(open_socket(zmq.XSUB, codec.PLAN.max_bytes), endpoint)
        connect(self.socket, endpoint, curve_client)
        self._send(_SUBSCRIBE)
        self._epoch = epoch
        self._next = 0
        self._ahead: dict[int, StepPlan] = {}
        self._last_s = time.monotonic()
        self._gap_since_s: float | None = None

    def receive(self, timeout_s: float, wake: Iterable[Waitable | int] = ()) -> StepPlan | None:
        """The next plan. None after `timeout_s`, or when a source in `wake` is readable first.

        Raises EngineFailure for a plan of another epoch and for a lost plan.
        """
        deadline_s = time.monotonic() + timeout_s
        while self._next not in self._ahead:
            now = time.monotonic()
            left_s = min(deadline_s, self._last_s + RESEND_AFTER_S) - now
            if self.wait(left_s, wake):
                self._read()
            elif time.monotonic() >= self._last_s + RESEND_AFTER_S:
                self._request_resend()
            else:
                return None
        plan = self._ahead.pop(self._next)
        self._next += 1
        return plan

    def _read(self) -> None:
        self._last_s = time.monotonic()
        for frame in self._receive_available():
            for plan in codec.PLAN.decode(frame):
                if plan.epoch != self._epoch:
                    raise EngineFailure(f"a plan of epoch {plan.epoch} arrived in epoch {self._epoch}")
                if plan.step >= self._next:
                    self._ahead[plan.step] = plan
        if not self._ahead or self._next in self._ahead:
            self._gap_since_s = None
        else:
            self._request_resend()

    def _request_resend(self) -> None:
        """Request all plans from the next one on. Rank 0 has every plan in flight, so only an old one stays missing."""
        self._last_s = time.monotonic()
        if self._ahead:
            self._gap_since_s = self._gap_since_s or self._last_s
            if self._last_s - self._gap_since_s > GAP_S:
                raise EngineFailure(f"plan {self._next} of epoch {self._epoch} is lost: plan {min(self._ahead)} came without it")
        self._send(_RESEND.pack(b"\x02", self._epoch, self._next))


class ResultSender(Channel):
    """The sampling rank's end: sends results to rank 0."""

    def __init__(self, endpoint: str, curve_client: CurveClient | None = None) -> None:
        super().__init__(open_socket(zmq.PUSH, codec.RESULT.max_bytes), endpoint)
        connect(self.socket, endpoint, curve_client)

    def send(self, result: StepResult) -> None:
        """Send one result. The caller sends results in step order."""
        self._send(codec.RESULT.encode([result]))


class ResultReceiver(Channel):
    """Rank 0's end: receives results. Bind before Hello."""

    def __init__(self, endpoint: str, remote: TcpEndpoint | None = None) -> None:
        socket = open_socket(zmq.PULL, codec.RESULT.max_bytes)
        super().__init__(socket, bind(socket, endpoint))
        self.remote_endpoint = "" if remote is None else bind(socket, *remote)
        self._epoch = -1
        self._next = 0

    def begin(self, epoch: int) -> None:
        """Expect the results of `epoch`, from step 0."""
        self._epoch = epoch

    def receive(self, timeout_s: float, wake: Iterable[Waitable | int] = ()) -> list[StepResult]:
        """The results so far, in step order; empty after `timeout_s`. Raises EngineFailure for another epoch or a gap."""
        if not self.wait(timeout_s, wake):
            return []
        results = [result for frame in self._receive_available() for result in codec.RESULT.decode(frame)]
        for result in results:
            if (result.epoch, result.step) != (self._epoch, self._next):
                raise EngineFailure(
                    f"the result of step {result.step} of epoch {result.epoch} arrived, "
                    f"that of step {self._next} of epoch {self._epoch} was next"
                )
            self._next += 1
        return results


class EngineLink(Channel):
    """Rank 0's end of the connection to the frontend. Its routing id is made of the identity in rank 0's `Hello`."""

    def __init__(self, endpoint: str, identity: int) -> None:
        super().__init__(open_socket(zmq.DEALER, codec.ENGINE_INPUT.max_bytes), endpoint)
        self.socket.set(zmq.ROUTING_ID, _routing_id(identity))
        connect(self.socket, endpoint)
        self._send(codec.ENGINE_OUTPUT.encode([]))  # the frontend learns the routing id from it

    def poll(self, timeout_s: float, wake: Iterable[Waitable | int] = ()) -> list[EngineInput]:
        """The frontend's messages; empty after `timeout_s`, or when a source in `wake` is readable first."""
        if not self.wait(timeout_s, wake):
            return []
        return [message for frame in self._receive_available() for message in codec.ENGINE_INPUT.decode(frame)]

    def send(self, outputs: list[EngineOutput]) -> None:
        """Send outputs to the frontend, in one frame."""
        if outputs:
            self._send(codec.ENGINE_OUTPUT.encode(outputs))


class EngineUnreachable(EngineFailure):
    """Rank 0 has ended, or its connection has. The coordinator learns that by itself."""


class EngineServer(Channel):
    """The frontend's end. Talks to the engine of the running epoch only and drops messages of others."""

    def __init__(self, endpoint: str) -> None:
        socket = open_socket(zmq.ROUTER, codec.ENGINE_OUTPUT.max_bytes)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        super().__init__(socket, bind(socket, endpoint))
        self._engine = b""
        self._connected: set[bytes] = set()
        self._unsent: list[bytes] = []

    def attach(self, identity: int) -> None:
        """Make rank 0's incarnation with this identity the engine. Unsent messages to an earlier one are dropped."""
        self._engine = _routing_id(identity)
        self._connected &= {self._engine}
        self._unsent.clear()

    def detach(self) -> None:
        """The epoch is over: what is sent from now on is dropped, and what its engine has still sent is not received."""
        self._engine = b""
        self._unsent.clear()

    def send(self, inputs: list[EngineInput]) -> None:
        """Send inputs to the engine, in one frame if they fit. They wait here until the engine has connected.

        Raises EngineUnreachable when the engine is gone. FrameTooLarge for an input that fits no frame; nothing is sent then.
        """
        if inputs:
            frames = codec.ENGINE_INPUT.frames(inputs)
            self._unsent += frames if self._engine else []
            self._flush()

    def receive(self) -> list[EngineOutput]:
        """The engine's messages that have arrived. Never blocks. Raises EngineFailure for what cannot be read."""
        outputs: list[EngineOutput] = []
        while True:
            try:
                address, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return outputs
            self._connected.add(address)
            if address == self._engine:
                with contextlib.suppress(EngineUnreachable):  # it has ended since; what it has sent still counts
                    self._flush()
                outputs += [message for frame in frames for message in codec.ENGINE_OUTPUT.decode(frame)]

    def _flush(self) -> None:
        if self._engine not in self._connected:
            return
        for frame in self._unsent:
            try:
                self.socket.send_multipart([self._engine, frame])
            except zmq.ZMQError as error:
                raise EngineUnreachable(f"rank 0's engine cannot be reached: {error.strerror}") from error
        self._unsent.clear()


def _routing_id(identity: int) -> bytes:
    """The ZeroMQ routing id of rank 0's incarnation."""
    return b"engine-%d" % identity
