"""The I/O of the coordinator: the sockets to the ranks, the processes of the ranks on this host, and the clock.

Owns two ROUTER sockets (ipc for this node, TCP for others) and one pidfd for each rank on this host. Decides nothing: every event
goes into the coordinator, and the actions that it returns are carried out. Invariants: everything runs in one event loop, so the
coordinator has a single writer; the coordinator sees a death before its consequences, and the agent's death before its ranks'.
"""

import asyncio
import errno
import logging
import os
import signal
import time
from collections.abc import Callable

import zmq

from tpserve.coordinator.actions import Action, RankLost, SendMessage
from tpserve.coordinator.coordinator import Coordinator
from tpserve.coordinator.roster import Peer
from tpserve.errors import EngineFailure
from tpserve.process.process_utils import has_ended, open_pidfd
from tpserve.types.messages import CoordinatorMessage, Fault, Hello
from tpserve.wire import codec
from tpserve.wire.channels import TcpEndpoint, bind, open_socket

log = logging.getLogger(__name__)

TICK_S = 0.1
PROBE_S = 0.5
"""The interval at which dead processes and closed connections are looked for."""
SETTLE_S = 0.25
"""A fault of a rank waits for this long. A dying process closes its connections before it is dead, so the faults of its peers
arrive before its death does."""
CAUSE_S = 0.05
"""The kernel kills an agent's ranks a moment before it reports the agent's own end."""
SIBLING_S = 2.0
"""How long a fault of kind sibling waits for the agent of this host, which knows the rank that has ended and why."""
_UNEXPLAINED = "without a word: it was killed or it crashed"
KILLED_ADVICE = "look at the last lines of its node's log, and at `dmesg` there for a kernel that was out of memory"


class RankMonitor:
    """Runs a coordinator over real ranks. See the module."""

    def __init__(
        self,
        coordinator: Coordinator,
        local: str,
        remote: TcpEndpoint | None,
        on_action: Callable[[Action], None],
        check_agent: Callable[[], None] = lambda: None,
    ) -> None:
        """Bind `local` (an ipc:// endpoint) and, when ranks run on other nodes, `remote`.

        `on_action` gets every action but SendMessage and RankLost. `check_agent` fails the coordinator if the agent of this host,
        with which its ranks die, has ended. EngineFailure when a socket cannot be bound.
        """
        self.coordinator = coordinator
        self._on_action = on_action
        self._check_agent = check_agent
        self._waiting_for_agent: set[Peer] = set()
        self._pending_faults: dict[Peer, Fault] = {}
        """Faults that wait for `SETTLE_S` before the coordinator sees them."""
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
        """The socket for ranks of other nodes; None without any."""
        return self._sockets[1] if self.remote_endpoint else None

    async def run(self) -> None:
        """Receive messages and pass the time to the coordinator, until cancelled."""
        loop = asyncio.get_running_loop()
        for socket in self._sockets:
            loop.add_reader(_option(socket, zmq.FD), self._read)
        try:
            while True:
                self._read()  # the descriptor is edge-triggered, and a send may consume an edge
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
        """Carry out the coordinator's actions."""
        for action in actions:
            if isinstance(action, SendMessage):
                self._send(action.peer, [action.message])
            elif isinstance(action, RankLost):
                self._kill([action.peer])
            else:
                self._on_action(action)

    async def wait_exited(self, timeout_s: float) -> bool:
        """Wait for the ranks on this host to end; False when some have not. Their messages are still answered with Stop."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            self._read()
            if all(has_ended(pidfd) for pidfd in self._pidfds.values()):
                return True
            await asyncio.sleep(0.02)
        return False

    def kill(self) -> list[int]:
        """Kill the ranks on this host that still run; returns their numbers."""
        return self._kill(list(self._pidfds))

    def _kill(self, peers: list[Peer]) -> list[int]:
        living = [peer for peer in peers if peer in self._pidfds and not has_ended(self._pidfds[peer])]
        for peer in living:
            signal.pidfd_send_signal(self._pidfds[peer], signal.SIGKILL)
        return [peer.rank for peer in living]

    def close(self) -> None:
        """Close the sockets; messages already sent have half a second to arrive."""
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
                    log.warning("dropped a malformed frame: %s", error)
                    continue
                self._peers[peer] = socket
                for message in messages:
                    if isinstance(message, Fault) and message.kind != "user":
                        self._receive_later(peer, message, socket)
                        continue
                    if isinstance(message, Hello):  # it may come back because another rank has died
                        self._probe(peer, time.monotonic())
                    self.perform(self.coordinator.receive(peer, message, time.monotonic()))
                    if isinstance(message, Hello):
                        self._track(peer, message, socket)

    def _receive_later(self, peer: Peer, fault: Fault, socket: "zmq.Socket[bytes]") -> None:
        """Give the death that explains a fault time to be seen first."""
        if fault.kind == "sibling" and socket is self._local and not self.coordinator.restarts:
            if peer not in self._waiting_for_agent:
                self._waiting_for_agent.add(peer)
                asyncio.get_running_loop().call_later(SIBLING_S, self._deliver_fault, peer, fault)
            return
        if peer not in self._pending_faults:
            self._pending_faults[peer] = fault
            asyncio.get_running_loop().call_later(SETTLE_S, self._deliver_fault, peer, fault)

    def _deliver_fault(self, peer: Peer, fault: Fault) -> None:
        """Pass a fault on, after any death that explains it."""
        if not self._sockets:
            return
        self._pending_faults.pop(peer, None)
        now = time.monotonic()
        self._check_agent()
        self._probe(peer, now)
        self.perform(self.coordinator.receive(peer, fault, now))

    def _track(self, peer: Peer, hello: Hello, socket: "zmq.Socket[bytes]") -> None:
        """Forget older incarnations, and watch the process of a rank on this host."""
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
        asyncio.get_running_loop().add_reader(pidfd, self._on_exit, peer)

    def _on_exit(self, peer: Peer) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfds[peer])
        loop.call_later(CAUSE_S, self._after_exit, peer)

    def _after_exit(self, peer: Peer) -> None:
        if self._sockets:
            self._read()  # its last messages
            self._report_exit(peer)

    def _report_exit(self, peer: Peer) -> None:
        if peer in self._waiting_for_agent:
            return
        self._check_agent()
        self._lost(peer, "ended")

    def _lost(self, peer: Peer, how: str) -> None:
        """Report the end of a rank, after its own pending fault, which says more."""
        if (fault := self._pending_faults.pop(peer, None)) is not None:
            self.perform(self.coordinator.receive(peer, fault, time.monotonic()))
        self.perform(self.coordinator.lost(peer, how, time.monotonic(), KILLED_ADVICE, _UNEXPLAINED))

    def _forget(self, peer: Peer) -> None:
        del self._peers[peer]
        pidfd = self._pidfds.pop(peer, None)
        if pidfd is not None:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)

    def _probe(self, sender: Peer | None, now: float) -> None:
        """Report ranks that have died, before a message of `sender` that may be a consequence."""
        for peer, socket in list(self._peers.items()):
            if peer == sender:
                continue
            pidfd = self._pidfds.get(peer)
            if pidfd is not None and has_ended(pidfd):
                asyncio.get_running_loop().remove_reader(pidfd)
                self._report_exit(peer)
            elif socket is not self._local and not self._send(peer, []):
                self._lost(peer, "closed its connection")

    def _send(self, peer: Peer, messages: list[CoordinatorMessage]) -> bool:
        """False when the peer cannot be reached. An empty list of messages only tests that."""
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
    socket.set(zmq.ROUTER_HANDOVER, 1)  # a rank that reconnects keeps its address
    return socket


def _option(socket: "zmq.Socket[bytes]", option: int) -> int:
    value = socket.get(option)
    assert isinstance(value, int)
    return value
