"""The rendezvous of the nodes of `tpserve serve`, before torch is loaded.

    node 0 listens at the master address     -> Challenge       a nonce, to every new connection
                                             <- JoinRequest     each other node, repeated until node 0 admits it
                                             -> StillWaiting    the missing nodes, every two seconds
                                             -> Refused         an error, such as another version or a node rank in use
                                             -> RendezvousInfo  all nodes have joined; the address of the agents' store

Each message is one line of JSON. The connections stay open afterwards, so that each side sees the other's end (`node_monitor`).
Node 0 goes on listening: a node that comes back is told the present store at once. Owns the sockets of the rendezvous and its log
lines. Knows the number of ranks, but no ranks.

Invariants:
- Node 0 admits each node rank once, and with a secret only nodes that know it. JoinRequest and RendezvousInfo carry an
  HMAC-SHA256 of the message and the other side's nonce. HKDF derives its key from a secret of 32 random bytes. So recorded
  traffic cannot be replayed, and does not reveal the secret.
- A node that leaves, or is silent for five seconds, is missing again, and nothing else: before all have joined node 0 waits for
  it, later it may come back at any time. It comes back with as many ranks, and without a secret from the same address.
- No side waits longer than `--start-timeout`, for node 0's return no longer than `--recovery-timeout`. A connection that sends
  anything else is closed.
- Once all have met, nothing that another node sends ends node 0.
"""

import hmac
import ipaddress
import logging
import secrets
import select
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from tpserve.cluster.node_monitor import JoinRequest, enable_keepalive, head_exit
from tpserve.cluster.retry_log import CONNECT_S, RETRY_S, RetryLog, connect_with_retry, missing_ranks, name_nodes
from tpserve.errors import EngineFailure, UserError
from tpserve.host.network import host_port, os_error_text

logger = logging.getLogger("tpserve.rendezvous")

REPORT_S = 2.0
"""How often node 0 sends StillWaiting."""
SILENT_S = 10.0
"""A node reconnects after this long without a message from node 0."""
MAX_LINE_BYTES = 1 << 16
MAX_UNJOINED = 64
"""The most connections without a JoinRequest. The oldest are closed first."""


class Challenge(Struct, frozen=True, tag=True):
    """Node 0's first message. `nonce`: the node signs its JoinRequest with it."""

    nonce: str


class StillWaiting(Struct, frozen=True, tag=True):
    """Some nodes have not joined. `nodes`: their node ranks."""

    nodes: list[int]


class Refused(Struct, frozen=True, tag=True):
    """The rendezvous failed for this node. `code`: the exit code, 2 for an error that the user can fix."""

    code: int
    why: str


class RendezvousInfo(Struct, frozen=True, tag=True):
    """All nodes have joined. `host`, `port`: the address of the agents' store. `first_rank`: of the node that gets this."""

    host: str
    port: int
    first_rank: int = 0
    proof: str = ""


RendezvousReply = Challenge | StillWaiting | Refused | RendezvousInfo
_JOIN = msgspec.json.Decoder(JoinRequest)
_REPLY: msgspec.json.Decoder[RendezvousReply] = msgspec.json.Decoder(RendezvousReply)


def new_nonce() -> str:
    """A random number for one connection, in hex."""
    return secrets.token_hex(16)


def sign(key: bytes, nonce: str, message: JoinRequest | RendezvousInfo) -> str:
    """The HMAC-SHA256 of `nonce` and `message`, in hex: it proves that the sender knows the secret. Empty without a key."""
    signed = nonce.encode() + msgspec.json.encode(replace(message, proof=""))
    return hmac.digest(key, signed, "sha256").hex() if key else ""


def is_signed(key: bytes, nonce: str, message: JoinRequest | RendezvousInfo) -> bool:
    """Whether the proof in `message` is the one that `sign` gives."""
    return hmac.compare_digest(message.proof.encode(), sign(key, nonce, message).encode())


@dataclass
class _PeerConnection:
    """A non-blocking connection that carries lines. `join`: set once the node is admitted."""

    socket: socket.socket
    address: str
    unread: bytearray = field(default_factory=bytearray)
    join: JoinRequest | None = None
    nonce: str = field(default_factory=new_nonce)

    def send(self, message: RendezvousReply | JoinRequest) -> None:
        """Send a message. Errors are ignored, because the peer reconnects."""
        with suppress(OSError):
            self.socket.sendall(msgspec.json.encode(message) + b"\n")

    def read(self) -> list[bytes] | None:
        """The lines that have arrived. None when the connection is closed, or a line is too long."""
        try:
            data = self.socket.recv(MAX_LINE_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            return None
        self.unread += data
        *lines, rest = bytes(self.unread).split(b"\n")
        self.unread = bytearray(rest)
        return None if not data or len(rest) > MAX_LINE_BYTES else lines


class Rendezvous:
    """Node 0's side of the rendezvous."""

    def __init__(
        self,
        me: JoinRequest,
        listener: socket.socket,
        world_size: int,
        timeout_s: float,
        key: bytes,
        began_s: float | None = None,
    ) -> None:
        """`me`: node 0. `listener`: listens at the master address; `close` closes it. `world_size`: the ranks of all nodes.

        `key`: `Keyring.rendezvous_key`; empty without a secret. `began_s`: since when the wait takes (`RetryLog`).
        """
        self._me = me
        self._key = key
        self._world_size = world_size
        self._retry_log = RetryLog(timeout_s, logger, began_s)
        self._timeout_s = timeout_s
        self._listener = listener
        self._address = host_port(*listener.getsockname()[:2])
        self._peers: list[_PeerConnection] = []
        self._warned: set[str] = set()
        self._met: dict[int, JoinRequest] = {}
        """The other nodes, once all have met; each as it came last."""
        self._store = ("", 0)

    def wait_for_all(self) -> None:
        """Wait until all nodes have joined. Sends a UserError or EngineFailure to all connections before it raises it."""
        try:
            next_s = 0.0
            while missing := self._missing():
                if self._retry_log.timed_out and next_s:  # who waits already is let in first
                    ranks = missing_ranks(missing, self._sizes(), self._world_size, self._me.nnodes)
                    raise EngineFailure(
                        f"{name_nodes(missing, self._me.nnodes)} did not come to {self._address} within {self._timeout_s:g} s, "
                        f"so {ranks} missing: see its log, and whether its --master-addr and --master-port lead here"
                    )
                self._retry_log.log_if_due(f"{name_nodes(missing, self._me.nnodes)} at {self._address}")
                if (now := time.monotonic()) >= next_s:
                    next_s = now + REPORT_S
                    self._broadcast(StillWaiting(missing))
                self._read(min(1.0, REPORT_S / 4))
        except (UserError, EngineFailure) as error:
            for peer in self._peers:  # also those without a join: one of them may be the cause
                peer.send(Refused(2 if isinstance(error, UserError) else 1, str(error)))
            self.close()
            raise

    def send_store(self, host: str, port: int) -> None:
        """All have met: send the store's address to all nodes. Their connections stay open, without further messages."""
        self._met = {peer.join.node: peer.join for peer in self._peers if peer.join is not None}
        self._store = host, port
        for peer in list(self._peers):
            if peer.join is None:
                self._drop(peer)
            else:
                self._send_info(peer)

    def serve(self) -> NoReturn:
        """After `send_store`: let nodes that come back in, for ever."""
        while True:
            self._read(1.0)

    def close(self) -> None:
        """Close all connections and the listener."""
        for peer in self._peers:
            peer.socket.close()
        self._listener.close()

    def _send_info(self, peer: _PeerConnection) -> None:
        if peer.join is not None:
            first_rank = self._me.nproc + sum(join.nproc for node, join in self._met.items() if node < peer.join.node)
            info = RendezvousInfo(*self._store, first_rank)
            peer.send(replace(info, proof=sign(self._key, peer.join.nonce, info)))

    def _sizes(self) -> dict[int, int]:
        return {self._me.node: self._me.nproc} | {peer.join.node: peer.join.nproc for peer in self._peers if peer.join}

    def _missing(self) -> list[int]:
        joined = self._sizes()
        return [node for node in range(self._me.nnodes) if node not in joined]

    def _broadcast(self, message: RendezvousReply) -> None:
        for peer in self._peers:
            if peer.join is not None:
                peer.send(message)

    def _read(self, timeout_s: float) -> None:
        ready, _, _ = select.select([self._listener, *(peer.socket for peer in self._peers)], [], [], timeout_s)
        for peer in list(self._peers):
            if peer.socket in ready:
                self._receive(peer)
        if self._listener in ready:
            with suppress(OSError):
                connection, address = self._listener.accept()
                connection.setblocking(False)
                peer = _PeerConnection(connection, str(address[0]))
                peer.send(Challenge(peer.nonce))
                self._peers.append(peer)
                unjoined = [peer for peer in self._peers if peer.join is None]
                for peer in unjoined[:-MAX_UNJOINED]:
                    peer.socket.close()
                    self._peers.remove(peer)

    def _receive(self, peer: _PeerConnection) -> None:
        lines = peer.read()
        try:
            for text in lines or ():
                self._admit(peer, _JOIN.decode(text))
        except UserError as error:
            if not self._met:
                raise
            logger.warning("%s", error)
            peer.send(Refused(2, str(error)))
        except msgspec.DecodeError:
            if peer.address not in self._warned:
                self._warned.add(peer.address)
                logger.warning("%s speaks to %s and is no node of tpserve", peer.address, self._address)
            lines = None
        if lines is None:
            if peer.join is not None:
                logger.info("node %d (%s) has gone", peer.join.node, peer.join.host)
            self._drop(peer)

    def _drop(self, peer: _PeerConnection) -> None:
        peer.socket.close()
        self._peers.remove(peer)

    def _admit(self, peer: _PeerConnection, join: JoinRequest) -> None:
        """Admit a node, or refuse it alone. Raises UserError for an error that waiting cannot fix: it ends the rendezvous."""
        if not is_signed(self._key, peer.nonce, join):
            who = f"node {join.node} ({join.host}) has another --cluster-secret-file than node 0 ({self._me.host})"
            self._reject(peer, join, f"{who}, or one of them has none: give every node the same")
            return
        me, who, head = self._me, f"node {join.node} ({join.host}, {join.address})", f"node 0 ({self._me.host})"
        if join.version != me.version:
            raise UserError(f"{who} runs tpserve {join.version}, {head} runs {me.version}: install the same on every node")
        if join.nnodes != me.nnodes:
            raise UserError(f"{who} was started with --nnodes {join.nnodes}, {head} with --nnodes {me.nnodes}")
        if ipaddress.ip_address(join.address).is_loopback and join.machine != me.machine:
            raise UserError(f"{who} calls itself by a loopback address, and {head} is another machine: see its --interface")
        if self._met:
            self._check_return(join, who)
        if (taken := next((one for one in self._joined() if one.node == join.node), None)) is not None:
            why = f"--node-rank {join.node} is taken by {taken.host} ({taken.address}): "
            self._reject(peer, join, f"{why}give each node its own, from 0 to {me.nnodes - 1}")
            return
        for one in self._joined():
            if one.address == join.address and one.machine != join.machine:
                raise UserError(
                    f"{who} and node {one.node} ({one.host}) both call themselves {join.address}: "
                    "pass --interface with a network that they share, such as --interface 10.0.0.0/24"
                )
        if join.derived and join.address != peer.address and join.machine != me.machine:
            raise UserError(
                f"{who} reaches node 0 as {peer.address}: there is address translation between them, which gloo and NCCL cannot "
                "cross: use the hosts' own network (Docker: --network host)"
            )
        peer.join = join
        enable_keepalive(peer.socket)  # a node that vanishes silently must free its node rank for its successor
        if not self._met:
            peer.send(StillWaiting(self._missing()))
            return
        logger.info("%s is back", who)
        self._met[join.node] = join
        self._send_info(peer)

    def _check_return(self, join: JoinRequest, who: str) -> None:
        """Raise UserError for a node that differs from the one that was here; else make room for it on the same machine."""
        known = self._met.get(join.node)
        if known is not None and join.nproc != known.nproc:
            raise UserError(f"{who} comes back with {join.nproc} ranks, and had {known.nproc}: see its --nproc-per-node")
        if known is not None and join.address != known.address and not self._key:
            raise UserError(
                f"{who} comes back, and was at {known.address}: a node may change its address where all nodes share a "
                "--cluster-secret-file (`tpserve secret FILE` makes one)"
            )
        for peer in list(self._peers):
            if peer.join is not None and (peer.join.node, peer.join.machine) == (join.node, join.machine):
                self._drop(peer)  # of an agent that has ended, or from before a cut of the network

    def _reject(self, peer: _PeerConnection, join: JoinRequest, why: str) -> None:
        logger.warning("%s (%s) wants in, but %s", join.host, join.address, why)
        peer.send(Refused(2, why))

    def _joined(self) -> Iterable[JoinRequest]:
        return [self._me, *(peer.join for peer in self._peers if peer.join is not None)]


def join_rendezvous(
    me: JoinRequest,
    master_addr: str,
    port: int,
    world_size: int,
    timeout_s: float,
    key: bytes,
    *,
    again: bool = False,
    began_s: float | None = None,
) -> tuple[RendezvousInfo, socket.socket]:
    """Another node's side: wait until all nodes have joined and the agents' store accepts a connection.

    Returns the store's address and the open connection to node 0 (for `wait_head_exit`). Raises UserError or EngineFailure with
    node 0's reason, and EngineFailure after `timeout_s`. With `again` node 0's agent was lost: its supervisor, as long as it
    lives, listens, so that a refused connection is its end.
    """
    retry_log, where = RetryLog(timeout_s, logger, began_s), host_port(master_addr, port)
    why = ""
    while not (why and retry_log.timed_out):  # once at least
        try:
            connection = socket.create_connection((master_addr, port), retry_log.connect_s)
        except OSError as error:
            if again and isinstance(error, ConnectionRefusedError):
                raise EngineFailure("node 0 has ended") from error
            why = os_error_text(error)
            retry_log.log_if_due(f"node 0 of {me.nnodes} at {where}", why)
            time.sleep(RETRY_S)
            continue
        answer = _wait_for_reply(_PeerConnection(connection, where), me, retry_log, where, key)
        if isinstance(answer, RendezvousInfo):
            enable_keepalive(connection)
            give_up = partial(head_exit, connection)
            try:
                connect_with_retry(answer.host, answer.port, "node 0's store", timeout_s - retry_log.waited_s, logger, give_up)
                return answer, connection
            except EngineFailure:
                connection.close()
                if not again or retry_log.timed_out:
                    raise
            time.sleep(RETRY_S)
            continue
        connection.close()
        if answer is not None:
            raise UserError(answer.why) if answer.code == 2 else EngineFailure(answer.why)
        why = "it closed the connection"
        time.sleep(RETRY_S)
    ranks = missing_ranks([0], {me.node: me.nproc}, world_size, me.nnodes)
    raise EngineFailure(
        f"node 0 did not answer at {where} within {timeout_s:g} s ({why}), so {ranks} missing: "
        "check --master-addr and --master-port, that tpserve runs there, and firewalls"
    )


def _wait_for_reply(
    peer: _PeerConnection, me: JoinRequest, retry_log: RetryLog, where: str, key: bytes
) -> Refused | RendezvousInfo | None:
    """Node 0's final reply. None when the connection ends or stays silent, so that the caller reconnects."""
    peer.socket.settimeout(CONNECT_S)
    me = replace(me, nonce=peer.nonce)
    last_s = time.monotonic()
    while time.monotonic() - last_s < SILENT_S and not retry_log.timed_out:
        if not select.select([peer.socket], [], [], 1.0)[0]:
            continue
        lines = peer.read()
        if lines is None:
            return None
        last_s = time.monotonic()
        for text in lines:
            try:
                answer = _REPLY.decode(text)
            except msgspec.DecodeError:
                raise UserError(f"what answers at {where} is no node of tpserve: check --master-port") from None
            match answer:
                case Challenge(nonce):
                    peer.send(replace(me, proof=sign(key, nonce, me)))
                case StillWaiting(nodes) if nodes:
                    retry_log.log_if_due(f"{name_nodes(nodes, me.nnodes)} at {where}")
                case RendezvousInfo() if not is_signed(key, me.nonce, answer):
                    raise UserError(
                        f"what answers at {where} does not know the secret of --cluster-secret-file: see --master-addr"
                    )
                case Refused() | RendezvousInfo():
                    return answer
    return None
