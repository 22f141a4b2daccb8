"""Who may speak on TCP: CurveZMQ (RFC 26) between processes that know one secret, and a ZAP authenticator (RFC 27) that knows
them.

    secret    of --cluster-secret-file, or drawn by the frontend and told over torch's store
    key pair  of a role, "frontend" or "rank 3": private = HKDF-SHA256(secret, role), so a restarted rank has the same one

Owns the keys and the refusal of strangers; decides nothing about messages. Sockets inside a host (ipc, in a directory of
this user alone) need no keys. Invariants: `channels.bind` and `connect` open no TCP socket without a `CurveServer` or
`CurveClient`; a
refusal is logged once, and whoever is refused is never read from.
"""

import base64
import binascii
import hmac
import logging
import os
import secrets
import stat
import threading
from pathlib import Path
from typing import NamedTuple

import zmq
from msgspec import Struct
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from tpserve.errors import UserError

log = logging.getLogger(__name__)

SECRET_BYTES = 32
FRONTEND = "frontend"
_DOMAIN = b"tpserve"
_ZAP = "inproc://zeromq.zap.01"
_POLL_MS = 500
_STRANGERS = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL  # who goes before he has said anything is not worth a word


def rank_role(rank: int) -> str:
    """What a rank's keys are called."""
    return f"rank {rank}"


class KeyPair(NamedTuple):
    """In Z85, as libzmq takes them."""

    public: bytes
    private: bytes


class Keyring:
    """Every key of a cluster, derived from its secret."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @staticmethod
    def open(path: str | None) -> "Keyring":
        """Of the secret in a file, or else of one that is drawn for this run alone. UserError as for `read`."""
        return Keyring(secrets.token_bytes(SECRET_BYTES)) if path is None else Keyring.read(path)

    @staticmethod
    def read(path: str) -> "Keyring":
        """The secret of a file that `tpserve secret` made. UserError when it cannot be read, or others can."""
        file = Path(path)

        def refuse(text: str) -> UserError:
            return UserError(f"--cluster-secret-file {path} {text}", param="cluster_secret_file")

        try:
            kind = file.stat().st_mode
            if not stat.S_ISREG(kind):  # of a pipe only the first process that asks would have it
                raise refuse("is no file: every rank of the node reads it")
            mode, text = stat.S_IMODE(kind), file.read_bytes()
            secret = base64.b64decode(text.strip(), validate=True)
        except OSError as error:
            raise refuse(f"cannot be read: {error.strerror}") from error
        except binascii.Error as error:
            raise refuse(f"holds no secret: make one with `tpserve secret {path}`") from error
        if mode & 0o027:  # a group may read it: Kubernetes gives files of a Secret to the pod's
            raise refuse(f"can be read or changed by others (mode {mode:04o}): run `chmod 600 {path}`")
        if len(secret) < SECRET_BYTES:
            raise refuse(f"holds {len(secret)} bytes and needs {SECRET_BYTES}: make one with `tpserve secret {path}`")
        if len(set(secret)) < SECRET_BYTES // 2:  # of 32 random bytes fewer differ once in 10**17 times
            raise refuse(f"holds a secret that can be guessed: make one with `tpserve secret {path}`")
        return Keyring(secret)

    def connect_info(self, endpoint: str, *, with_secret: bool) -> "ConnectInfo":
        """For processes of other nodes, to `endpoint`."""
        return ConnectInfo(endpoint, self.proof, self._secret.hex() if with_secret else "")

    @property
    def proof(self) -> str:
        """Equal for equal secrets, and tells nothing of them, which are 32 random bytes and cannot be guessed."""
        return self._derive("proof").hex()

    @property
    def rendezvous_key(self) -> bytes:
        """With what nodes that meet prove that they know the secret (`rendezvous`)."""
        return self._derive("meeting")

    def curve_server(self, role: str, world_size: int) -> "CurveServer":
        """For a process that listens as `role`: it lets the ranks of the world in."""
        return CurveServer(self.pair(role), frozenset(self.pair(rank_role(rank)).public for rank in range(world_size)))

    def curve_client(self, rank: int, server: str) -> "CurveClient":
        """For a rank that connects to the sockets of `server`."""
        return CurveClient(self.pair(rank_role(rank)), self.pair(server).public)

    def pair(self, role: str) -> KeyPair:
        """The keys of a role."""
        private = z85.encode(self._derive(f"curve {role}"))
        return KeyPair(zmq.curve_public(private), private)

    def _derive(self, purpose: str) -> bytes:
        """HKDF-SHA256 (RFC 5869), one block."""
        extracted = hmac.digest(b"tpserve", self._secret, "sha256")
        return hmac.digest(extracted, purpose.encode() + b"\x01", "sha256")


class ConnectInfo(Struct, frozen=True):
    """What a process of another node must know to connect; it travels over torch's store.

    `secret`: of this run, where the nodes share no file. `proof` shows that a file of theirs holds the same secret.
    """

    endpoint: str
    proof: str
    secret: str = ""

    def accept(self, path: str | None) -> Keyring:
        """The cluster's keys. `path`: of this node's --cluster-secret-file. UserError when it is not node 0's secret."""
        name = "--cluster-secret-file"
        if self.secret:
            if path is not None:
                raise UserError(f"{name} was given here and not on node 0: give it on every node", param="cluster_secret_file")
            return Keyring(bytes.fromhex(self.secret))
        if path is None:
            raise UserError(f"{name} was given on node 0 and not here: give it on every node", param="cluster_secret_file")
        keyring = Keyring.read(path)
        if not hmac.compare_digest(keyring.proof, self.proof):
            raise UserError(f"{name} {path} holds another secret than node 0's: copy its file", param="cluster_secret_file")
        return keyring


def write_secret(path: str) -> None:
    """A new secret in a new file of this user alone. UserError when the file is there already or cannot be made."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise UserError(f"{path} is there already, and a cluster may use it: remove it first, or name another file") from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(base64.b64encode(secrets.token_bytes(SECRET_BYTES)) + b"\n")


class CurveClient(NamedTuple):
    """What a socket needs to connect: its own keys and the public one of whom it will speak to."""

    own: KeyPair
    server: bytes

    def apply(self, socket: "zmq.Socket[bytes]") -> None:
        """On a socket that will connect."""
        socket.set(zmq.CURVE_PUBLICKEY, self.own.public)
        socket.set(zmq.CURVE_SECRETKEY, self.own.private)
        socket.set(zmq.CURVE_SERVERKEY, self.server)


class CurveServer(NamedTuple):
    """What a socket needs to listen. Nobody gets in while the process has no `ZapAuthenticator`."""

    own: KeyPair
    allowed: frozenset[bytes]

    def apply(self, socket: "zmq.Socket[bytes]") -> None:
        """On a socket, before it is bound to TCP; addresses that it has been bound to already stay open."""
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_PUBLICKEY, self.own.public)
        socket.set(zmq.CURVE_SECRETKEY, self.own.private)
        socket.set(zmq.ZAP_DOMAIN, _DOMAIN)


class ZapAuthenticator:
    """Answers libzmq's question whether a key may enter, for all locked sockets of this process; one a process.

    A thread of its own, because the threads that own the sockets may be busy for long.
    """

    def __init__(self, allowed: frozenset[bytes]) -> None:
        """`allowed`: public keys, as in the locks. UserError when the process has a ZAP authenticator."""
        self._allowed = {z85.decode(public) for public in allowed}
        self._zap: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.REP)
        self._zap.set(zmq.LINGER, 0)
        try:
            self._zap.bind(_ZAP)
        except zmq.ZMQError as error:
            self._zap.close()
            raise UserError("this script has an LLM over several nodes already: close that one first") from error
        self._monitors: list[zmq.Socket[bytes]] = []
        self._refused: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="doorkeeper", daemon=True)
        self._thread.start()

    def log_refusals_of(self, locked: "zmq.Socket[bytes]") -> None:
        """Tell who is turned away from a socket before he has shown any key."""
        self._monitors.append(locked.get_monitor_socket(_STRANGERS))

    def close(self) -> None:
        """Let nobody in any more. Before the sockets are closed."""
        self._ended.set()
        self._thread.join()
        self._zap.unbind(_ZAP)  # now; closing does it some time later, and a successor may come at once
        for socket in (self._zap, *self._monitors):
            socket.close(linger=0)

    def _serve(self) -> None:
        while not self._ended.is_set():
            poller = zmq.Poller()
            for socket in (self._zap, *self._monitors):
                poller.register(socket, zmq.POLLIN)
            for source, _ in poller.poll(_POLL_MS):
                if source is self._zap:
                    self._answer()
                elif source in self._monitors:
                    recv_monitor_message(source)
                    self._refuse(": it speaks another protocol, or knows no key of ours")

    def _answer(self) -> None:
        version, request, _domain, address, _identity, mechanism, *credentials = self._zap.recv_multipart()
        known = mechanism == b"CURVE" and any(hmac.compare_digest(key, credentials[0]) for key in self._allowed)
        if not known:
            self._refuse(f" from {address.decode(errors='replace')}: its key is not of this cluster")
        self._zap.send_multipart([version, request, *((b"200", b"OK") if known else (b"400", b"unknown key")), b"", b""])

    def _refuse(self, why: str) -> None:
        if why not in self._refused and len(self._refused) < 100:
            self._refused.add(why)
            log.warning("refused a connection%s; this is said once", why)
