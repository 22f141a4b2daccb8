"""How the nodes of `tpserve serve` find each other, before torch is loaded: who is there, which nodes or ranks are missing, who
cannot be had.

    node 0   listens at the master address        -> Challenge a number used once, to whoever connects
                                                  <- Join      each other node, again and again until it is let in
                                                  -> Waiting   every two seconds, until all are there
                                                  -> Refused   what cannot heal: another version, a place that is taken
                                                  -> Meet      all are there: where the agents' store listens

One line of JSON a message. Afterwards each connection stays open, for both to see the other's end (`nodes`).
Owns the sockets of the meeting and the lines that tell of it; knows no ranks but their number.
Invariants: node 0 lets each node in once, and with a secret nobody who does not know it: Join and Meet carry an HMAC-SHA256 over
themselves and the other side's number, of a key that HKDF gives of a secret of 32 random bytes, so that nothing that was heard on
the network is of use later, nor to find the secret. A node that leaves, or is silent for five seconds, before all are there is
waited for again; nobody waits longer than `--start-timeout`. Whoever connects and says nothing sensible is dropped.
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

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from tpserve.cluster.node_monitor import JoinRequest, enable_keepalive, head_exit
from tpserve.cluster.retry_log import CONNECT_S, RETRY_S, RetryLog, connect_with_retry, missing_ranks, name_nodes
from tpserve.errors import EngineFailure, UserError
from tpserve.host.network import host_port, os_error_text

logger = logging.getLogger("tpserve.muster")

EVERY_S = 2.0
SILENT_S = 10.0
"""A node 0 that was not heard for this long is sought anew."""
MOST_BYTES = 1 << 16
MAX_UNJOINED = 64
"""Connections that have not said who they are; of more than these the oldest are closed."""


class Challenge(Struct, frozen=True, tag=True):
    """Node 0's first word."""

    nonce: str


class StillWaiting(Struct, frozen=True, tag=True):
    """Not all are there."""

    nodes: list[int]


class Refused(Struct, frozen=True, tag=True):
    """It will not be. `code`: 2 for what the user can mend."""

    code: int
    why: str


class RendezvousInfo(Struct, frozen=True, tag=True):
    """All are there; the agents' store listens here."""

    host: str
    port: int
    proof: str = ""


RendezvousReply = Challenge | StillWaiting | Refused | RendezvousInfo
_JOIN = msgspec.json.Decoder(JoinRequest)
_REPLY: msgspec.json.Decoder[RendezvousReply] = msgspec.json.Decoder(RendezvousReply)


def new_nonce() -> str:
    """A number used once."""
    return secrets.token_hex(16)


def sign(key: bytes, nonce: str, message: JoinRequest | RendezvousInfo) -> str:
    """Shows who gave `nonce` that the sender of `message` knows the secret; empty without one."""
    said = nonce.encode() + msgspec.json.encode(replace(message, proof=""))
    return hmac.digest(key, said, "sha256").hex() if key else ""


def is_signed(key: bytes, nonce: str, message: JoinRequest | RendezvousInfo) -> bool:
    """Whether `message` came with that."""
    return hmac.compare_digest(message.proof.encode(), sign(key, nonce, message).encode())


@dataclass
class _PeerConnection:
    """A connection that speaks lines."""

    socket: socket.socket
    peer: str
    unread: bytearray = field(default_factory=bytearray)
    join: JoinRequest | None = None
    nonce: str = field(default_factory=new_nonce)

    def send(self, message: RendezvousReply | JoinRequest) -> None:
        """Best effort: who does not hear it asks again."""
        with suppress(OSError):
            self.socket.sendall(msgspec.json.encode(message) + b"\n")

    def read(self) -> list[bytes] | None:
        """The lines that are here; None when the other side has gone, or says too much."""
        try:
            part = self.socket.recv(MOST_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            return None
        self.unread += part
        *lines, rest = bytes(self.unread).split(b"\n")
        self.unread = bytearray(rest)
        return None if not part or len(rest) > MOST_BYTES else lines


class Rendezvous:
    """Node 0's side. `me` is itself; `world_size` the ranks of all nodes together."""

    def __init__(self, me: JoinRequest, listener: socket.socket, world_size: int, timeout_s: float, key: bytes) -> None:
        """`listener`: from `listen`, at the master address; ours from now on. `key`: of the secret; empty without one."""
        self._me = me
        self._key = key
        self._world_size = world_size
        self._retry_log = RetryLog(timeout_s, logger)
        self._timeout_s = timeout_s
        self._listener = listener
        self._address = host_port(*listener.getsockname()[:2])
        self._lines: list[_PeerConnection] = []
        self._warned: set[str] = set()

    def wait_for_all(self) -> None:
        """Until all nodes are there. UserError and EngineFailure are told to those that are."""
        try:
            next_s = 0.0
            while missing := self._missing():
                if self._retry_log.timed_out:
                    ranks = missing_ranks(missing, self._sizes(), self._world_size, self._me.nnodes)
                    raise EngineFailure(
                        f"{name_nodes(missing, self._me.nnodes)} did not come to {self._address} within {self._timeout_s:g} s, "
                        f"so {ranks} missing: see what it says there, and whether its --master-addr and --master-port lead here"
                    )
                self._retry_log.log_if_due(f"{name_nodes(missing, self._me.nnodes)} at {self._address}")
                if (now := time.monotonic()) >= next_s:
                    next_s = now + EVERY_S
                    self._to_all(StillWaiting(missing))
                self._read(min(1.0, EVERY_S / 4))
        except (UserError, EngineFailure) as error:
            for line in self._lines:  # who is not let in yet may be the very reason
                line.send(Refused(2 if isinstance(error, UserError) else 1, str(error)))
            self.close()
            raise

    def send_store(self, host: str, port: int) -> None:
        """Send all of them to the store. Their connections stay open as long as this process lives, and hear no more."""
        meet = RendezvousInfo(host, port)
        self._listener.close()
        for line in self._lines:
            if line.join is None:
                line.socket.close()
            else:
                line.send(replace(meet, proof=sign(self._key, line.join.nonce, meet)))

    @property
    def joined(self) -> dict[socket.socket, JoinRequest]:
        """The other nodes that are in, by their connections."""
        return {line.socket: line.join for line in self._lines if line.join is not None}

    def close(self) -> None:
        """Hear nobody any more."""
        for line in self._lines:
            line.socket.close()
        self._listener.close()

    def _sizes(self) -> dict[int, int]:
        return {self._me.node: self._me.nproc} | {line.join.node: line.join.nproc for line in self._lines if line.join}

    def _missing(self) -> list[int]:
        there = self._sizes()
        return [node for node in range(self._me.nnodes) if node not in there]

    def _to_all(self, message: RendezvousReply) -> None:
        for line in self._lines:
            if line.join is not None:
                line.send(message)

    def _read(self, timeout_s: float) -> None:
        ready, _, _ = select.select([self._listener, *(line.socket for line in self._lines)], [], [], timeout_s)
        for line in list(self._lines):
            if line.socket in ready:
                self._receive(line)
        if self._listener in ready:
            with suppress(OSError):
                connection, address = self._listener.accept()
                connection.setblocking(False)
                line = _PeerConnection(connection, str(address[0]))
                line.send(Challenge(line.nonce))
                self._lines.append(line)
                strangers = [line for line in self._lines if line.join is None]
                for line in strangers[:-MAX_UNJOINED]:
                    line.socket.close()
                    self._lines.remove(line)

    def _receive(self, line: _PeerConnection) -> None:
        said = line.read()
        try:
            for text in said or ():
                self._admit(line, _JOIN.decode(text))
        except msgspec.DecodeError:
            if line.peer not in self._warned:
                self._warned.add(line.peer)
                logger.warning("%s speaks to %s and is no node of tpserve", line.peer, self._address)
            said = None
        if said is None:
            if line.join is not None:
                logger.info("node %d (%s) has gone", line.join.node, line.join.host)
            line.socket.close()
            self._lines.remove(line)

    def _admit(self, line: _PeerConnection, join: JoinRequest) -> None:
        """Raises UserError for what cannot heal and ends all; who only takes another's place is turned away alone."""
        if not is_signed(self._key, line.nonce, join):
            who = f"node {join.node} ({join.host}) has another --cluster-secret-file than node 0 ({self._me.host})"
            self._reject(line, join, f"{who}, or one of them has none: give every node the same")
            return
        me, who, head = self._me, f"node {join.node} ({join.host}, {join.address})", f"node 0 ({self._me.host})"
        if join.version != me.version:
            raise UserError(f"{who} runs tpserve {join.version}, {head} runs {me.version}: install the same on every node")
        if join.nnodes != me.nnodes:
            raise UserError(f"{who} was started with --nnodes {join.nnodes}, {head} with --nnodes {me.nnodes}")
        if ipaddress.ip_address(join.address).is_loopback and join.machine != me.machine:
            raise UserError(f"{who} calls itself by a loopback address, and {head} is another machine: see its --interface")
        if (taken := next((one for one in self._joined() if one.node == join.node), None)) is not None:
            why = f"--node-rank {join.node} is taken by {taken.host} ({taken.address}): "
            self._reject(line, join, f"{why}give each node its own, from 0 to {me.nnodes - 1}")
            return
        for one in self._joined():
            if one.address == join.address and one.machine != join.machine:
                raise UserError(
                    f"{who} and node {one.node} ({one.host}) both call themselves {join.address}: "
                    "pass --interface with a network that they share, such as --interface 10.0.0.0/24"
                )
        if join.derived and join.address != line.peer and join.machine != me.machine:
            raise UserError(
                f"{who} reaches node 0 as {line.peer}: there is address translation between them, which gloo and NCCL cannot "
                "cross: use the hosts' own network (Docker: --network host)"
            )
        line.join = join
        enable_keepalive(line.socket)  # a node that vanishes without a word must not hold the place of its successor
        line.send(StillWaiting(self._missing()))

    def _reject(self, line: _PeerConnection, join: JoinRequest, why: str) -> None:
        logger.warning("%s (%s) wants in, but %s", join.host, join.address, why)
        line.send(Refused(2, why))

    def _joined(self) -> Iterable[JoinRequest]:
        return [self._me, *(line.join for line in self._lines if line.join is not None)]


def join_rendezvous(
    me: JoinRequest, master_addr: str, port: int, world_size: int, timeout_s: float, key: bytes
) -> tuple[RendezvousInfo, socket.socket]:
    """Another node's side: until all are there, and the store that they meet at can be reached. The socket tells of node 0's end
    (`wait_head_exit`).

    UserError or EngineFailure with node 0's reason, or when the time is over."""
    retry_log, where = RetryLog(timeout_s, logger), host_port(master_addr, port)
    why = ""
    while not retry_log.timed_out:
        try:
            connection = socket.create_connection((master_addr, port), retry_log.connect_s)
        except OSError as error:
            why = os_error_text(error)
            retry_log.log_if_due(f"node 0 of {me.nnodes} at {where}", why)
            time.sleep(RETRY_S)
            continue
        answer = _wait_in(_PeerConnection(connection, where), me, retry_log, where, key)
        if isinstance(answer, RendezvousInfo):
            enable_keepalive(connection)
            vain = partial(head_exit, connection)
            connect_with_retry(answer.host, answer.port, "node 0's store", timeout_s - retry_log.waited_s, logger, vain)
            return answer, connection
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


def _wait_in(
    line: _PeerConnection, me: JoinRequest, retry_log: RetryLog, where: str, key: bytes
) -> Refused | RendezvousInfo | None:
    """Node 0's last word; None when it has none, so that it must be sought again."""
    line.socket.settimeout(CONNECT_S)
    me = replace(me, nonce=line.nonce)
    heard_s = time.monotonic()
    while time.monotonic() - heard_s < SILENT_S and not retry_log.timed_out:
        if not select.select([line.socket], [], [], 1.0)[0]:
            continue
        lines = line.read()
        if lines is None:
            return None
        heard_s = time.monotonic()
        for text in lines:
            try:
                answer = _REPLY.decode(text)
            except msgspec.DecodeError:
                raise UserError(f"what answers at {where} is no node of tpserve: check --master-port") from None
            match answer:
                case Challenge(nonce):
                    line.send(replace(me, proof=sign(key, nonce, me)))
                case StillWaiting(nodes) if nodes:
                    retry_log.log_if_due(f"{name_nodes(nodes, me.nnodes)} at {where}")
                case RendezvousInfo() if not is_signed(key, me.nonce, answer):
                    raise UserError(
                        f"what answers at {where} does not know the secret of --cluster-secret-file: see --master-addr"
                    )
                case Refused() | RendezvousInfo():
                    return answer
    return None
