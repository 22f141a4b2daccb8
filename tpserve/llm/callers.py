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
from tpserve.wire.auth import Key
from tpserve.wire.channels import Door, bind, connect, open_socket
from tpserve.wire.codec import MIB, Codec

log = logging.getLogger(__name__)

ASK_S = 1.0
"""How often a follower repeats what it waits for."""
POLL_S = 0.1


class Want(Message, frozen=True):
    """A follower has everything before `call`."""

    rank: int
    call: int


class Leave(Message, frozen=True):
    """A follower takes no further part: it was closed, or `text` says why it cannot."""

    rank: int
    text: str


class Answer(Message, frozen=True):
    """What rank 0's script returned."""

    call: int
    outputs: list[RequestOutput]


class Trouble(Message, frozen=True):
    """What rank 0's script raised."""

    call: int
    kind: Literal["user", "engine"]
    text: str


_QUESTIONS: Codec[Want | Leave] = Codec(Want | Leave, MIB, "follower-to-caller")
_ANSWERS: Codec[Answer | Trouble] = Codec(Answer | Trouble, 2048 * MIB, "caller-to-follower")


def trouble(call: int, error: BaseException) -> Trouble:
    """What the others raise when rank 0 raises `error`."""
    if isinstance(error, UserError):
        return Trouble(call, "user", str(error))
    text = str(error) if isinstance(error, EngineFailure) else f"rank 0's script raised {type(error).__name__}: {error}"
    return Trouble(call, "engine", text)


class Callers:
    """Rank 0's side. Used inside its event loop only."""

    def __init__(self, num_followers: int, local: str, remote: Door | None) -> None:
        """Bind for followers on this host and, at `remote`, for those of other nodes."""
        self._sockets = [_router()]
        bind(self._sockets[0], local)
        self.remote_endpoint = ""
        if remote is not None:
            self._sockets.append(_router())
            self.remote_endpoint = bind(self._sockets[1], *remote)
        self._num_followers = num_followers
        self._wanted: dict[int, int] = {}
        self._ways: dict[int, tuple[zmq.Socket[bytes], bytes]] = {}
        self._kept: dict[int, bytes] = {}
        self._last = -1
        self._end: tuple[Literal["user", "engine"], str] | None = None
        self.left: Leave | None = None
        """Of the follower that left first."""

    def answer(self, message: Answer | Trouble) -> None:
        """Keep an answer, and send it to those who wait for it."""
        self._kept[message.call] = _ANSWERS.encode([message])
        self._last = max(self._last, message.call)
        for rank, call in self._wanted.items():
            if call == message.call:
                self._send(rank)

    def end(self, kind: Literal["user", "engine"], text: str) -> None:
        """No more answers: every call from now on is told this."""
        self._end = (kind, text)
        for rank in self._wanted:
            self._send(rank)

    def read(self) -> None:
        """Hear what the followers want."""
        for socket in self._sockets:
            while socket.poll(0):
                address, frame = socket.recv_multipart()
                try:
                    messages = _QUESTIONS.decode(frame)
                except EngineFailure as error:
                    log.warning("dropped a frame that no follower of ours sends: %s", error)
                    continue
                self._ways |= {message.rank: (socket, address) for message in messages}
                for message in messages:
                    self._take(message)
        if len(self._wanted) == self._num_followers:
            for call in [call for call in self._kept if call < min(self._wanted.values())]:
                del self._kept[call]

    async def all_told(self, timeout_s: float) -> None:
        """Give the followers time to fetch the last answer."""
        deadline_s = time.monotonic() + timeout_s
        while (self._kept or len(self._wanted) < self._num_followers) and time.monotonic() < deadline_s:
            self.read()
            await asyncio.sleep(POLL_S / 10)

    def close(self) -> None:
        """Close the sockets; what was just sent still has half a second to arrive."""
        for socket in self._sockets:
            socket.close(linger=500)

    def _take(self, message: Want | Leave) -> None:
        if isinstance(message, Leave):
            self.left = self.left or message
            self._wanted[message.rank] = self._last + 1
        else:
            self._wanted[message.rank] = message.call
            self._send(message.rank)

    def _send(self, rank: int) -> None:
        call = self._wanted[rank]
        frame = self._kept.get(call)
        if frame is None and self._end is not None and call > self._last:
            frame = _ANSWERS.encode([Trouble(call, *self._end)])
        if frame is not None:
            socket, address = self._ways[rank]
            socket.send_multipart([address, frame])  # to one who is away for a moment it gets lost: it asks again


class Link:
    """A follower's side."""

    def __init__(self, rank: int, endpoint: str, key: Key | None = None) -> None:
        self._rank = rank
        self._socket = open_socket(zmq.DEALER, _ANSWERS.max_bytes)
        self._socket.set(zmq.ROUTING_ID, b"caller-%d" % rank)
        connect(self._socket, endpoint, key)

    def ask(self, call: int) -> None:
        """Say that everything before `call` has come."""
        self._socket.send(_QUESTIONS.encode([Want(self._rank, call)]))

    def hear(self, call: int) -> Answer | Trouble | None:
        """Wait a moment for the answer to `call`."""
        while self._socket.poll(int(POLL_S * 1000)):
            for message in _ANSWERS.decode(self._socket.recv()):
                if message.call == call:
                    return message
        return None

    def leave(self, text: str) -> None:
        """Take no further part."""
        self._socket.send(_QUESTIONS.encode([Leave(self._rank, text)]))

    def close(self) -> None:
        """Close; a last word has half a second to arrive."""
        self._socket.close(linger=500)


def _router() -> "zmq.Socket[bytes]":
    socket = open_socket(zmq.ROUTER, _QUESTIONS.max_bytes)
    socket.set(zmq.ROUTER_HANDOVER, 1)  # a follower that lost its connection comes back under its name
    return socket
