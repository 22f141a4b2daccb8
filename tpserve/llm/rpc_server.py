"""The connection between the scripts of one torchrun job: rank 0's script holds the replies, the other scripts (followers) poll.

    RpcServer       ROUTER, in rank 0's script, on the event loop of its session
    RpcConnection   DEALER, in a follower's script, on the calling thread

Owns the numbering of calls. Call 0 is the construction of the LLM, and all scripts make the same calls in the same order. A
follower polls for call k until it has the reply, so a lost message costs only time. A reply is stored until every follower has
polled for a later call. Messages are typed, bounded msgpack as on all wires, never pickled.
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

REPOLL_S = 1.0
"""Interval at which a follower sends its poll again."""
RECEIVE_S = 0.1
"""Longest wait of one `RpcConnection.receive`."""


class RpcPoll(Message, frozen=True):
    """A follower waits for the reply to `call`, and has all earlier ones."""

    rank: int
    call: int


class RpcClose(Message, frozen=True):
    """A follower leaves; `text` is the reason."""

    rank: int
    text: str


class RpcReply(Message, frozen=True):
    """The outputs that a call returned in rank 0's script."""

    call: int
    outputs: list[RequestOutput]


class RpcError(Message, frozen=True):
    """The error that a call raised in rank 0's script: `kind` "user" for UserError, "engine" for EngineFailure."""

    call: int
    kind: Literal["user", "engine"]
    text: str


_REQUESTS: Codec[RpcPoll | RpcClose] = Codec(RpcPoll | RpcClose, MIB, "follower-to-caller")
_REPLIES: Codec[RpcReply | RpcError] = Codec(RpcReply | RpcError, 2048 * MIB, "caller-to-follower")


def rpc_error(call: int, error: BaseException) -> RpcError:
    """The error that the followers raise when rank 0's script raises `error`."""
    if isinstance(error, UserError):
        return RpcError(call, "user", str(error))
    text = str(error) if isinstance(error, EngineFailure) else f"rank 0's script raised {type(error).__name__}: {error}"
    return RpcError(call, "engine", text)


class RpcServer:
    """Rank 0's side. Methods are for the session's event loop only."""

    def __init__(self, num_followers: int, local: str, remote: TcpEndpoint | None) -> None:
        """Bind `local` for followers on this host and `remote` for followers on other nodes."""
        self._sockets = [_router()]
        bind(self._sockets[0], local)
        self.remote_endpoint = ""
        if remote is not None:
            self._sockets.append(_router())
            self.remote_endpoint = bind(self._sockets[1], *remote)
        self._num_followers = num_followers
        self._polled: dict[int, int] = {}
        self._routes: dict[int, tuple[zmq.Socket[bytes], bytes]] = {}
        self._replies: dict[int, bytes] = {}
        self._last = -1
        self._end: tuple[Literal["user", "engine"], str] | None = None
        self.first_close: RpcClose | None = None
        """The message of the follower that left first."""

    def reply(self, message: RpcReply | RpcError) -> None:
        """Store a reply, and send it to the followers that wait for it."""
        self._replies[message.call] = _REPLIES.encode([message])
        self._last = max(self._last, message.call)
        for rank, call in self._polled.items():
            if call == message.call:
                self._send(rank)

    def end(self, kind: Literal["user", "engine"], text: str) -> None:
        """Answer every further call with this error."""
        self._end = (kind, text)
        for rank in self._polled:
            self._send(rank)

    def read(self) -> None:
        """Handle the messages that followers have sent."""
        for socket in self._sockets:
            while socket.poll(0):
                address, frame = socket.recv_multipart()
                try:
                    messages = _REQUESTS.decode(frame)
                except EngineFailure as error:
                    log.warning("dropped an invalid frame of a follower: %s", error)
                    continue
                self._routes |= {message.rank: (socket, address) for message in messages}
                for message in messages:
                    self._handle(message)
        if len(self._polled) == self._num_followers:
            for call in [call for call in self._replies if call < min(self._polled.values())]:
                del self._replies[call]

    async def wait_delivered(self, timeout_s: float) -> None:
        """Wait until all followers have the last reply, at most `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while (self._replies or len(self._polled) < self._num_followers) and time.monotonic() < deadline_s:
            self.read()
            await asyncio.sleep(RECEIVE_S / 10)

    def close(self) -> None:
        """Close the sockets. Messages in the send queue have half a second to leave."""
        for socket in self._sockets:
            socket.close(linger=500)

    def _handle(self, message: RpcPoll | RpcClose) -> None:
        if isinstance(message, RpcClose):
            self.first_close = self.first_close or message
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
            socket, address = self._routes[rank]
            socket.send_multipart(
                [address, frame]
            )  # ZeroMQ drops it while the follower is disconnected; the follower polls again


class RpcConnection:
    """A follower's side. Methods are for one thread."""

    def __init__(self, rank: int, endpoint: str, curve_client: CurveClient | None = None) -> None:
        self._rank = rank
        self._socket = open_socket(zmq.DEALER, _REPLIES.max_bytes)
        self._socket.set(zmq.ROUTING_ID, b"caller-%d" % rank)
        connect(self._socket, endpoint, curve_client)

    def poll(self, call: int) -> None:
        """Ask for the reply to `call`. Confirms that all earlier replies have arrived."""
        self._socket.send(_REQUESTS.encode([RpcPoll(self._rank, call)]))

    def receive(self, call: int) -> RpcReply | RpcError | None:
        """Wait up to `RECEIVE_S` for the reply to `call`; None when there is none yet."""
        while self._socket.poll(int(RECEIVE_S * 1000)):
            for message in _REPLIES.decode(self._socket.recv()):
                if message.call == call:
                    return message
        return None

    def leave(self, text: str) -> None:
        """Tell rank 0's script that this follower leaves; `text` is the reason."""
        self._socket.send(_REQUESTS.encode([RpcClose(self._rank, text)]))

    def close(self) -> None:
        """Close the socket. Messages in the send queue have half a second to leave."""
        self._socket.close(linger=500)


def _router() -> "zmq.Socket[bytes]":
    socket = open_socket(zmq.ROUTER, _REQUESTS.max_bytes)
    socket.set(zmq.ROUTER_HANDOVER, 1)  # a follower that reconnects takes over its routing id
    return socket
