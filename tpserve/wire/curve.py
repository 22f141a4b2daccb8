"""Keys for TCP sockets: CurveZMQ (ZeroMQ RFC 26) and a ZAP authenticator (ZeroMQ RFC 27).

    secret    from --cluster-secret-file, or drawn by the frontend for one run and shared through torch's store
    key pair  one per role, "frontend" or "rank 3": private = HKDF-SHA256(secret, role), so a restarted rank has the same keys

Owns the keys and the decision which keys may connect. Never reads messages. Sockets inside a host (ipc, in a directory of mode
0700) need no keys.

Invariants: `channels.bind` and `connect` open no TCP socket without a `CurveServer` or `CurveClient`. Nothing is read from a
refused connection, and each kind of refusal is logged once.
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
_REFUSED_EVENTS = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL  # not the event of a peer that leaves before it has sent anything


def rank_role(rank: int) -> str:
    """The role of a rank, for `key_pair` and `curve_client`."""
    return f"rank {rank}"


class KeyPair(NamedTuple):
    """A CURVE key pair in Z85, the text form that libzmq expects."""

    public: bytes
    private: bytes


class Keyring:
    """All keys of a cluster. Every key is derived from one secret."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @staticmethod
    def open(path: str | None) -> "Keyring":
        """The keyring of a secret file, or of a new random secret when `path` is None. Raises UserError as `read` does."""
        return Keyring(secrets.token_bytes(SECRET_BYTES)) if path is None else Keyring.read(path)

    @staticmethod
    def read(path: str) -> "Keyring":
        """Read a file that `tpserve secret` made. Raises UserError when it is unreadable, not private, or has no good secret."""
        file = Path(path)

        def refuse(text: str) -> UserError:
            return UserError(f"--cluster-secret-file {path} {text}", param="cluster_secret_file")

        try:
            kind = file.stat().st_mode
            if not stat.S_ISREG(kind):  # only the first process could read a pipe
                raise refuse("is no file: every rank of the node reads it")
            mode, text = stat.S_IMODE(kind), file.read_bytes()
            secret = base64.b64decode(text.strip(), validate=True)
        except OSError as error:
            raise refuse(f"cannot be read: {error.strerror}") from error
        except binascii.Error as error:
            raise refuse(f"holds no secret: make one with `tpserve secret {path}`") from error
        if mode & 0o027:  # the group may read: Kubernetes gives the files of a Secret to the pod's group
            raise refuse(f"can be read or changed by others (mode {mode:04o}): run `chmod 600 {path}`")
        if len(secret) < SECRET_BYTES:
            raise refuse(f"holds {len(secret)} bytes and needs {SECRET_BYTES}: make one with `tpserve secret {path}`")
        if len(set(secret)) < SECRET_BYTES // 2:  # random bytes fail this once in 10**17 times
            raise refuse(f"holds a secret that can be guessed: make one with `tpserve secret {path}`")
        return Keyring(secret)

    def connect_info(self, endpoint: str, *, with_secret: bool) -> "ConnectInfo":
        """What a process of another node needs to connect to `endpoint`. `with_secret`: the nodes share no secret file."""
        return ConnectInfo(endpoint, self.proof, self._secret.hex() if with_secret else "")

    @property
    def proof(self) -> str:
        """A digest, equal for equal secrets. It does not reveal the secret, which is 32 random bytes."""
        return self._derive("proof").hex()

    @property
    def rendezvous_key(self) -> bytes:
        """The HMAC key with which nodes prove to each other that they know the secret (`cluster.rendezvous`)."""
        return self._derive("meeting")

    def curve_server(self, role: str, world_size: int) -> "CurveServer":
        """The server side of a process that listens as `role`. All ranks below `world_size` may connect."""
        return CurveServer(self.key_pair(role), frozenset(self.key_pair(rank_role(rank)).public for rank in range(world_size)))

    def curve_client(self, rank: int, server: str) -> "CurveClient":
        """The client side of `rank` for sockets of the role `server`."""
        return CurveClient(self.key_pair(rank_role(rank)), self.key_pair(server).public)

    def key_pair(self, role: str) -> KeyPair:
        """The key pair of a role."""
        private = z85.encode(self._derive(f"curve {role}"))
        return KeyPair(zmq.curve_public(private), private)

    def _derive(self, purpose: str) -> bytes:
        """HKDF-SHA256 (RFC 5869), one block."""
        extracted = hmac.digest(b"tpserve", self._secret, "sha256")
        return hmac.digest(extracted, purpose.encode() + b"\x01", "sha256")


class ConnectInfo(Struct, frozen=True):
    """What a process of another node needs to connect. It travels through torch's store.

    `proof`: `Keyring.proof` of node 0, to compare secret files. `secret`: in hex, only when the nodes share no secret file.
    """

    endpoint: str
    proof: str
    secret: str = ""

    def keyring(self, path: str | None) -> Keyring:
        """The cluster's keys. `path`: this node's --cluster-secret-file. Raises UserError when its secret is not node 0's."""
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
    """Write a new secret to a new file of mode 0600. Raises UserError when the file exists or cannot be written."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise UserError(f"{path} is there already, and a cluster may use it: remove it first, or name another file") from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(base64.b64encode(secrets.token_bytes(SECRET_BYTES)) + b"\n")


class CurveClient(NamedTuple):
    """The CURVE options of a connecting socket: its own keys and the server's public key."""

    own: KeyPair
    server: bytes

    def apply(self, socket: "zmq.Socket[bytes]") -> None:
        """Set the options on a socket, before it connects."""
        socket.set(zmq.CURVE_PUBLICKEY, self.own.public)
        socket.set(zmq.CURVE_SECRETKEY, self.own.private)
        socket.set(zmq.CURVE_SERVERKEY, self.server)


class CurveServer(NamedTuple):
    """The CURVE options of a listening socket. No client can connect while the process has no `ZapAuthenticator`."""

    own: KeyPair
    allowed: frozenset[bytes]

    def apply(self, socket: "zmq.Socket[bytes]") -> None:
        """Set the options on a socket, before it is bound to TCP. Addresses bound earlier stay without keys."""
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_PUBLICKEY, self.own.public)
        socket.set(zmq.CURVE_SECRETKEY, self.own.private)
        socket.set(zmq.ZAP_DOMAIN, _DOMAIN)


class ZapAuthenticator:
    """Decides for libzmq which keys may connect to the CURVE sockets of this process. One per process.

    It runs on a thread of its own, because the threads that own the sockets may be busy for long.
    """

    def __init__(self, allowed: frozenset[bytes]) -> None:
        """`allowed`: public keys, as in `CurveServer`. Raises UserError when the process already has a ZAP authenticator."""
        self._allowed = {z85.decode(public) for public in allowed}
        self._zap: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.REP)
        self._zap.set(zmq.LINGER, 0)
        try:
            self._zap.bind(_ZAP)
        except zmq.ZMQError as error:
            self._zap.close()
            raise UserError("this script has an LLM over several nodes already: close that one first") from error
        self._monitors: list[zmq.Socket[bytes]] = []
        self._logged: set[str] = set()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="zap authenticator", daemon=True)
        self._thread.start()

    def log_refusals_of(self, socket: "zmq.Socket[bytes]") -> None:
        """Also log connections to `socket` that fail before they present a key."""
        self._monitors.append(socket.get_monitor_socket(_REFUSED_EVENTS))

    def close(self) -> None:
        """Stop admitting connections. Call it before the sockets are closed."""
        self._closed.set()
        self._thread.join()
        self._zap.unbind(_ZAP)  # at once: close() unbinds later, and a successor may bind before that
        for socket in (self._zap, *self._monitors):
            socket.close(linger=0)

    def _serve(self) -> None:
        while not self._closed.is_set():
            poller = zmq.Poller()
            for socket in (self._zap, *self._monitors):
                poller.register(socket, zmq.POLLIN)
            for source, _ in poller.poll(_POLL_MS):
                if source is self._zap:
                    self._authenticate()
                elif source in self._monitors:
                    recv_monitor_message(source)
                    self._log_refusal(": it speaks another protocol, or knows no key of ours")

    def _authenticate(self) -> None:
        version, request, _domain, address, _identity, mechanism, *credentials = self._zap.recv_multipart()
        allowed = mechanism == b"CURVE" and any(hmac.compare_digest(key, credentials[0]) for key in self._allowed)
        if not allowed:
            self._log_refusal(f" from {address.decode(errors='replace')}: its key is not of this cluster")
        self._zap.send_multipart([version, request, *((b"200", b"OK") if allowed else (b"400", b"unknown key")), b"", b""])

    def _log_refusal(self, why: str) -> None:
        if why not in self._logged and len(self._logged) < 100:
            self._logged.add(why)
            log.warning("refused a connection%s; logged once", why)
