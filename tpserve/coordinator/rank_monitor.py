"""The coordinator's hands and eyes: the sockets to the ranks, the processes of the ranks on this host, and the clock.

Owns two ROUTER sockets (ipc for this node, TCP for others) and one pidfd for each rank on this host. Decides nothing: whatever is
seen goes into the coordinator, whatever it answers is carried out. Invariants: all of it runs in one event loop, so that the
coordinator has a single writer; a death that has been seen is told before what it caused, the agent's before its ranks'.
"""

import asyncio
import errno
import logging
import os
import signal
import time
from collections.abc import Callable

import zmq

from tpserve.coordinator.coordinator import Action, Coordinator, RankLost, SendMessage
from tpserve.coordinator.roster import Peer
from tpserve.errors import EngineFailure
from tpserve.process.process_utils import has_ended, open_pidfd
from tpserve.types.messages import CoordinatorMessage, Fault, Hello
from tpserve.wire import codec
from tpserve.wire.channels import TcpEndpoint, bind, open_socket

log = logging.getLogger(__name__)

TICK_S = 0.1
PROBE_S = 0.5
SETTLE_S = 0.25
"""A dying process closes its connections before it is dead: its peers' complaints arrive first and are kept for this long."""
CAUSE_S = 0.05
"""The kernel ends an agent's ranks a moment before it tells of the agent's own end."""
SIBLING_S = 2.0
"""How long the agent of this host may take to tell which rank has ended, when another one knows only that one has; it is the
last thing to be told where a fault ends the service."""
_WORDLESS = "without a word: it was killed or it crashed"
KILLED_ADVICE = "look at the last lines of its node's log, and at `dmesg` there for a kernel that was out of memory"


class RankMonitor:
    """Runs a coordinator over real ranks. `on_action` gets every action that is not a Send."""

    def __init__(
        self,
        coordinator: Coordinator,
        local: str,
        remote: TcpEndpoint | None,
        on_action: Callable[[Action], None],
        look_at_agent: Callable[[], None] = lambda: None,
    ) -> None:
        """Bind `local` (ipc) and, when ranks run on other nodes, `remote`. `look_at_agent` tells the coordinator if the process
        that ranks of this host die with has ended."""
        self.coordinator = coordinator
        self._on_action = on_action
        self._look_at_agent = look_at_agent
        self._delayed_deaths: set[Peer] = set()
        self._complaints: dict[Peer, Fault] = {}
        """What ranks have complained of and the coordinator has not heard yet."""
        self._local = _router()
        self.local_endpoint = bind(self._local, local)
        self._sockets = [self._local]
        self.remote_endpoint = ""
        if remote is not None:
            self._sockets.append(_router())
            self.remote_endpoint = bind(self._sockets[1], *remote)
        self._peers: dict[Peer, zmq.Socket[bytes]] = {}
        self._pidfds: dict[Peer, int] = {}
        self._probed_s = 0.0

    @property
    def remote_socket(self) -> "zmq.Socket[bytes] | None":
        """What ranks of other nodes connect to."""
        return self._sockets[1] if self.remote_endpoint else None

    async def run(self) -> None:
        """Until cancelled: pass on what comes, and the time."""
        loop = asyncio.get_running_loop()
        for socket in self._sockets:
            loop.add_reader(_option(socket, zmq.FD), self._read)
        try:
            while True:
                self._read()  # a socket's descriptor tells of changes, and sending may have swallowed one
                now = time.monotonic()
                if now - self._probed_s > PROBE_S:
                    self._probed_s = now
                    self._probe(None, now)
                self.perform(self.coordinator.tick(now))
                await asyncio.sleep(TICK_S)
        finally:
            for socket in self._sockets:
                loop.remove_reader(_option(socket, zmq.FD))
            for pidfd in self._pidfds.values():
                loop.remove_reader(pidfd)

    def perform(self, actions: list[Action]) -> None:
        """Do what the coordinator wants."""
        for action in actions:
            if isinstance(action, SendMessage):
                self._send(action.peer, [action.message])
            elif isinstance(action, RankLost):
                self._kill([action.peer])
            else:
                self._on_action(action)

    async def all_gone(self, timeout_s: float) -> bool:
        """Wait for the ranks on this host to end; False when some have not. Heartbeats of those who remain are answered with
        Stop."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            self._read()
            if all(has_ended(pidfd) for pidfd in self._pidfds.values()):
                return True
            await asyncio.sleep(0.02)
        return False

    def kill(self) -> list[int]:
        """End the ranks on this host that do not end themselves; returns which."""
        return self._kill(list(self._pidfds))

    def _kill(self, peers: list[Peer]) -> list[int]:
        living = [peer for peer in peers if peer in self._pidfds and not has_ended(self._pidfds[peer])]
        for peer in living:
            signal.pidfd_send_signal(self._pidfds[peer], signal.SIGKILL)
        return [peer.rank for peer in living]

    def close(self) -> None:
        """Close the sockets; what was just sent still has half a second to arrive."""
        for socket in self._sockets:
            socket.close(linger=500)
        self._sockets.clear()
        for pidfd in self._pidfds.values():
            os.close(pidfd)
        self._pidfds.clear()

    def _read(self) -> None:
        for socket in self._sockets:
            while _option(socket, zmq.EVENTS) & zmq.POLLIN:
                address, *frames = socket.recv_multipart()
                try:
                    peer = Peer(*(int(part) for part in address.decode().split(".")))
                    messages = [message for frame in frames for message in codec.RANK.decode(frame)]
                except (ValueError, TypeError, EngineFailure) as error:
                    log.warning("dropped a frame that no rank of ours sends: %s", error)
                    continue
                self._peers[peer] = socket
                for message in messages:
                    if isinstance(message, Fault) and message.kind != "user":
                        self._receive_later(peer, message, socket)
                        continue
                    if isinstance(message, Hello):  # of one who comes back, perhaps, because another one has died
                        self._probe(peer, time.monotonic())
                    self.perform(self.coordinator.receive(peer, message, time.monotonic()))
                    if isinstance(message, Hello):
                        self._watch(peer, message, socket)

    def _receive_later(self, peer: Peer, fault: Fault, socket: "zmq.Socket[bytes]") -> None:
        if fault.kind == "sibling" and socket is self._local and not self.coordinator.survives_faults:
            if peer not in self._delayed_deaths:
                self._delayed_deaths.add(peer)
                asyncio.get_running_loop().call_later(SIBLING_S, self._complaint, peer, fault)
            return
        if peer not in self._complaints:
            self._complaints[peer] = fault
            asyncio.get_running_loop().call_later(SETTLE_S, self._complaint, peer, fault)

    def _complaint(self, peer: Peer, fault: Fault) -> None:
        """Hear what a rank complains of, unless somebody's death has explained it meanwhile, or all is over."""
        if not self._sockets:
            return
        self._complaints.pop(peer, None)
        now = time.monotonic()
        self._look_at_agent()
        self._probe(peer, now)
        self.perform(self.coordinator.receive(peer, fault, now))

    def _watch(self, peer: Peer, hello: Hello, socket: "zmq.Socket[bytes]") -> None:
        """Forget who came before, and learn of the death of a rank on this host at once."""
        if not self.coordinator.is_current(peer):
            return
        for old in [other for other in self._peers if other.rank == peer.rank and other != peer]:
            self._forget(old)
        if socket is not self._local or peer in self._pidfds:
            return
        pidfd = open_pidfd(hello.pid)
        if pidfd is None:
            self._lost(peer, "ended")
            return
        self._pidfds[peer] = pidfd
        asyncio.get_running_loop().add_reader(pidfd, self._died, peer)

    def _died(self, peer: Peer) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfds[peer])
        loop.call_later(CAUSE_S, self._after_death, peer)

    def _after_death(self, peer: Peer) -> None:
        if self._sockets:
            self._read()  # its last words
            self._tell_death(peer)

    def _tell_death(self, peer: Peer) -> None:
        if peer in self._delayed_deaths:
            return
        self._look_at_agent()
        self._lost(peer, "ended")

    def _lost(self, peer: Peer, how: str) -> None:
        """Tell of an end; what the rank itself has said just before says more."""
        if (fault := self._complaints.pop(peer, None)) is not None:
            self.perform(self.coordinator.receive(peer, fault, time.monotonic()))
        self.perform(self.coordinator.lost(peer, how, time.monotonic(), KILLED_ADVICE, _WORDLESS))

    def _forget(self, peer: Peer) -> None:
        del self._peers[peer]
        pidfd = self._pidfds.pop(peer, None)
        if pidfd is not None:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)

    def _probe(self, teller: Peer | None, now: float) -> None:
        """Look who is dead, before the complaint of `teller` about it is heard."""
        for peer, socket in list(self._peers.items()):
            if peer == teller:
                continue
            pidfd = self._pidfds.get(peer)
            if pidfd is not None and has_ended(pidfd):
                asyncio.get_running_loop().remove_reader(pidfd)
                self._tell_death(peer)
            elif socket is not self._local and not self._send(peer, []):
                self._lost(peer, "closed its connection")

    def _send(self, peer: Peer, messages: list[CoordinatorMessage]) -> bool:
        """False when the peer cannot be reached; an empty frame asks just that."""
        socket = self._peers.get(peer)
        if socket is None:
            return False
        try:
            socket.send_multipart([f"{peer.rank}.{peer.identity}".encode(), codec.COORDINATOR.encode(messages)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (errno.EHOSTUNREACH, errno.EAGAIN):
                raise
            return False
        return True


def _router() -> "zmq.Socket[bytes]":
    socket = open_socket(zmq.ROUTER, codec.RANK.max_bytes)
    socket.set(zmq.ROUTER_MANDATORY, 1)
    socket.set(zmq.ROUTER_HANDOVER, 1)  # a rank that lost its connection comes back under its name
    return socket


def _option(socket: "zmq.Socket[bytes]", option: int) -> int:
    value = socket.get(option)
    assert isinstance(value, int)
    return value
