"""The scripts of one torchrun job among themselves: rank 0's script has the answers, the others fetch them.

    Callers   ROUTER, rank 0's side, in the event loop of its session
    Link      DEALER, a follower's side, in whatever thread calls

Owns the numbering: every call of a script's LLM has a number, 0 is its making, and the scripts make the same calls in the same
order. A follower asks for number k until it has it, so nothing depends on a message arriving; an answer is kept until every
follower has asked for a later one. Typed and bounded msgpack as on all wires, never pickled.
"""

import asyncio
import logging
import time
from typing import Literal

import zmq

from tpserve.errors import EngineFailure, UserError
from tpserve.llm.outputs import RequestOutput
from tpserve.types.messages import Message
from tpserve.wire.channels import TcpEndpoint, bind, connect, open_socket
from tpserve.wire.codec import MIB, Codec
from tpserve.wire.curve import CurveClient

log = logging.getLogger(__name__)

ASK_S = 1.0
"""How often a follower repeats what it waits for."""
POLL_S = 0.1


class RpcPoll(Message, frozen=True):
    """A follower has everything before `call`."""

    rank: int
    call: int


class RpcClose(Message, frozen=True):
    """A follower takes no further part: it was closed, or `text` says why it cannot."""

    rank: int
    text: str


class RpcReply(Message, frozen=True):
    """What rank 0's script returned."""

    call: int
    outputs: list[RequestOutput]


class RpcError(Message, frozen=True):
    """What rank 0's script raised."""

    call: int
    kind: Literal["user", "engine"]
    text: str


_REQUESTS: Codec[RpcPoll | RpcClose] = Codec(RpcPoll | RpcClose, MIB, "follower-to-caller")
_REPLIES: Codec[RpcReply | RpcError] = Codec(RpcReply | RpcError, 2048 * MIB, "caller-to-follower")


def rpc_error(call: int, error: BaseException) -> RpcError:
    """What the others raise when rank 0 raises `error`."""
    if isinstance(error, UserError):
        return RpcError(call, "user", str(error))
    text = str(error) if isinstance(error, EngineFailure) else f"rank 0's script raised {type(error).__name__}: {error}"
    return RpcError(call, "engine", text)


class RpcServer:
    """Rank 0's side. Used inside its event loop only."""

    def __init__(self, num_followers: int, local: str, remote: TcpEndpoint | None) -> None:
        """Bind for followers on this host and, at `remote`, for those of other nodes."""
        self._sockets = [_router()]
        bind(self._sockets[0], local)
        self.remote_endpoint = ""
        if remote is not None:
            self._sockets.append(_router())
            self.remote_endpoint = bind(self._sockets[1], *remote)
        self._num_followers = num_followers
        self._polled: dict[int, int] = {}
        self._ways: dict[int, tuple[zmq.Socket[bytes], bytes]] = {}
        self._replies: dict[int, bytes] = {}
        self._last = -1
        self._end: tuple[Literal["user", "engine"], str] | None = None
        self.left: RpcClose | None = None
        """Of the follower that left first."""

    def reply(self, message: RpcReply | RpcError) -> None:
        """Keep an answer, and send it to those who wait for it."""
        self._replies[message.call] = _REPLIES.encode([message])
        self._last = max(self._last, message.call)
        for rank, call in self._polled.items():
            if call == message.call:
                self._send(rank)

    def end(self, kind: Literal["user", "engine"], text: str) -> None:
        """No more answers: every call from now on is told this."""
        self._end = (kind, text)
        for rank in self._polled:
            self._send(rank)

    def read(self) -> None:
        """Hear what the followers want."""
        for socket in self._sockets:
            while socket.poll(0):
                address, frame = socket.recv_multipart()
                try:
                    messages = _REQUESTS.decode(frame)
                except EngineFailure as error:
                    log.warning("dropped a frame that no follower of ours sends: %s", error)
                    continue
                self._ways |= {message.rank: (socket, address) for message in messages}
                for message in messages:
                    self._take(message)
        if len(self._polled) == self._num_followers:
            for call in [call for call in self._replies if call < min(self._polled.values())]:
                del self._replies[call]

    async def wait_delivered(self, timeout_s: float) -> None:
        """Give the followers time to fetch the last answer."""
        deadline_s = time.monotonic() + timeout_s
        while (self._replies or len(self._polled) < self._num_followers) and time.monotonic() < deadline_s:
            self.read()
            await asyncio.sleep(POLL_S / 10)

    def close(self) -> None:
        """Close the sockets; what was just sent still has half a second to arrive."""
        for socket in self._sockets:
            socket.close(linger=500)

    def _take(self, message: RpcPoll | RpcClose) -> None:
        if isinstance(message, RpcClose):
            self.left = self.left or message
            self._polled[message.rank] = self._last + 1
        else:
            self._polled[message.rank] = message.call
            self._send(message.rank)

    def _send(self, rank: int) -> None:
        call = self._polled[rank]
        frame = self._replies.get(call)
        if frame is None and self._end is not None and call > self._last:
            frame = _REPLIES.encode([RpcError(call, *self._end)])
        if frame is not None:
            socket, address = self._ways[rank]
            socket.send_multipart([address, frame])  # to one who is away for a moment it gets lost: it asks again


class RpcConnection:
    """A follower's side."""

    def __init__(self, rank: int, endpoint: str, curve_client: CurveClient | None = None) -> None:
        self._rank = rank
        self._socket = open_socket(zmq.DEALER, _REPLIES.max_bytes)
        self._socket.set(zmq.ROUTING_ID, b"caller-%d" % rank)
        connect(self._socket, endpoint, curve_client)

    def poll(self, call: int) -> None:
        """Say that everything before `call` has come."""
        self._socket.send(_REQUESTS.encode([RpcPoll(self._rank, call)]))

    def receive(self, call: int) -> RpcReply | RpcError | None:
        """Wait a moment for the answer to `call`."""
        while self._socket.poll(int(POLL_S * 1000)):
            for message in _REPLIES.decode(self._socket.recv()):
                if message.call == call:
                    return message
        return None

    def leave(self, text: str) -> None:
        """Take no further part."""
        self._socket.send(_REQUESTS.encode([RpcClose(self._rank, text)]))

    def close(self) -> None:
        """Close; a last word has half a second to arrive."""
        self._socket.close(linger=500)


def _router() -> "zmq.Socket[bytes]":
    socket = open_socket(zmq.ROUTER, _REQUESTS.max_bytes)
    socket.set(zmq.ROUTER_HANDOVER, 1)  # a follower that lost its connection comes back under its name
    return socket
