"""The connection between the frontend and rank 0's engine: a local socket, which loses nothing and keeps the order.

`SimulatedEngineServer` is `EngineServer` itself over a router that is a queue, so who is heard is decided by the real code.
"""

from collections import deque
from collections.abc import Callable
from random import Random

import zmq

from tests.simulation.events import EventQueue
from tpserve.types.messages import EngineInput, EngineOutput
from tpserve.wire import codec
from tpserve.wire.channels import Channel, EngineServer

_EMPTY = zmq.Again()


class QueueRouter:
    """A ROUTER socket: frames arrive late, in the order of their sender. What a dead sender has sent still arrives."""

    def __init__(self, events: EventQueue, random: Random, delay_s: float, on_frame: Callable[[], None]) -> None:
        self._events, self._random, self._delay_s, self._on_frame = events, random, delay_s, on_frame
        self._arrived: deque[list[bytes]] = deque()
        self.peers: dict[bytes, EngineSide] = {}

    @property
    def has_arrived(self) -> bool:
        return bool(self._arrived)

    def recv_multipart(self, flags: int = 0) -> list[bytes]:
        if not self._arrived:
            raise _EMPTY.with_traceback(None)
        return self._arrived.popleft()

    def send_multipart(self, frames: list[bytes], flags: int = 0) -> None:
        address, frame = frames
        peer = self.peers.get(address)
        if peer is None:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        peer.next_s = self._deliver(peer.next_s, peer.arrive, frame)

    def carry(self, side: "EngineSide", frame: bytes) -> None:
        """A frame of a rank 0 is under way."""
        side.sent_s = self._deliver(side.sent_s, self._arrive, side.address, frame)

    def _deliver(self, not_before_s: float, call: Callable[..., None], *arguments: bytes) -> float:
        at_s = max(not_before_s, self._events.now + self._random.random() * self._delay_s)
        self._events.at(at_s, call, *arguments)
        return at_s

    def _arrive(self, address: bytes, frame: bytes) -> None:
        self._arrived.append([address, frame])
        self._on_frame()


class SimulatedEngineServer(EngineServer):
    """The frontend's end."""

    def __init__(self, router: QueueRouter) -> None:
        Channel.__init__(self, router, "sim")  # type: ignore[arg-type]
        self._engine = b""
        self._connected: set[bytes] = set()
        self._unsent: list[bytes] = []


class EngineSide:
    """Rank 0's end, as `EngineLink` is."""

    def __init__(self, router: QueueRouter, identity: int, on_input: Callable[[], None]) -> None:
        self.address = b"engine-%d" % identity
        self.next_s = self.sent_s = 0.0
        self._router, self._on_input = router, on_input
        self._inbox: deque[bytes] = deque()
        router.peers[self.address] = self
        router.carry(self, codec.ENGINE_OUTPUT.encode([]))

    def arrive(self, frame: bytes) -> None:
        if self.address in self._router.peers:
            self._inbox.append(frame)
            self._on_input()

    def poll(self, timeout_s: float) -> list[EngineInput]:
        frames = list(self._inbox)
        self._inbox.clear()
        return [message for frame in frames for message in codec.ENGINE_INPUT.decode(frame)]

    def send(self, outputs: list[EngineOutput]) -> None:
        if outputs:
            self._router.carry(self, codec.ENGINE_OUTPUT.encode(outputs))

    def close(self) -> None:
        del self._router.peers[self.address]
