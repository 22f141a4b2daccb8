"""How a rank finds the frontend or starts one, and the runtime directory that both use.

    RUNTIME_DIR/            mode 0700, of this user; named after the run id and node 0's agent, or set by `tpserve serve`
        lock                locked (flock) by the frontend while it lives; the kernel releases it when the frontend dies
        agent.json          why the agent of `tpserve serve` has ended, or a rank that it starts again
        agent-ended         the agent has ended and is not started again
        frontend.json       the frontend's endpoints, once its sockets are bound, or why it could not start
        control, engine     the frontend's ZeroMQ sockets; plan-*, result-* are rank 0's

Owns the runtime directory and its files. Never imports torch. Ranks of node 0 find the directory by its name. Ranks of other
nodes read the coordinator's TCP address from torchrun's store, of which this module uses only `get` and `set`.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
from msgspec import Struct

from tpserve.cluster.retry_log import RETRY_S, RetryLog
from tpserve.config.engine_config import EngineConfig
from tpserve.config.env import RankEnv
from tpserve.errors import EngineFailure, PeerLost, UserError
from tpserve.host.network import host_id, host_port, interfaces, os_error_text
from tpserve.wire.curve import ConnectInfo, CurveClient, Keyring

logger = logging.getLogger(__name__)

_KEY, _MACHINE = "tpserve/control", "tpserve/machine"
_POLL_S = 0.02
_MAX_PATH = 70
"""A UNIX socket's path has at most 107 bytes; this leaves room for the file name."""


class FrontendRecord(Struct, frozen=True):
    """frontend.json: the frontend's endpoints, or the `error` that prevented its start and the exit `code` for it."""

    pid: int
    control: str = ""
    remote: ConnectInfo | None = None
    engine: str = ""
    http: str = ""
    error: str = ""
    code: int = 0


class AgentFailure(Struct, frozen=True):
    """agent.json: why the agent of node 0 has ended. The frontend reports it, if no other agent is started."""

    code: int
    why: str
    advice: str = ""


class Store(Protocol):
    """The part of torch's `Store` that this module uses."""

    def set(self, key: str, value: str, /) -> None:
        """As in torch."""

    def get(self, key: str, /) -> bytes:
        """As in torch: waits, and raises RuntimeError after the store's own timeout, or at once when the store is gone."""


@dataclass(frozen=True)
class FrontendAddress:
    """How a rank reaches the frontend.

    `control`: the coordinator's endpoint. `address`: this host's address on the cluster interface; loopback on a single node.
    `keyring`, `connect_info`: with several nodes only. `engine`, `frontend_pid`, `runtime_dir`: on the frontend's node only.
    """

    control: str
    address: str
    keyring: Keyring | None = None
    connect_info: ConnectInfo | None = None
    engine: str = ""
    frontend_pid: int | None = None
    runtime_dir: Path | None = None

    def endpoint(self, name: str) -> str:
        """A new ipc endpoint that rank 0 binds for the ranks of its node."""
        return f"ipc://{self.runtime_dir}/{name}-{time.time_ns():x}"

    def curve_client(self, rank: int, server: str) -> CurveClient | None:
        """The keys with which `rank` connects to the role `server`. None on the frontend's own node."""
        return None if self.keyring is None or self.runtime_dir is not None else self.keyring.curve_client(rank, server)


def find_frontend(env: RankEnv, config: EngineConfig, address: str, timeout_s: float, *, start: bool = True) -> FrontendAddress:
    """On node 0: wait until the frontend is ready. With `start` (bare torchrun) rank 0 starts one when none is alive.

    The frontend gets its own session, so that it survives a restart of the rank group. Raises UserError or EngineFailure with the
    frontend's reason when it cannot start.
    """
    where = runtime_dir(env)
    deadline_s = time.monotonic() + timeout_s
    child: subprocess.Popen[bytes] | None = None
    if env.rank == 0 and start:
        make_runtime_dir(where)
        while is_frontend_alive(where) and read_frontend(where) is None and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)  # it is starting, or ending after an error
        if not is_frontend_alive(where):
            make_runtime_dir(where)  # a frontend that ended removed it
            child = spawn_frontend(where, config, env.agent_pid, env.nnodes, address)
    found = wait_ready(where, child, deadline_s - time.monotonic())
    keyring = None if found.remote is None else found.remote.keyring(config.cluster_secret_file)
    return FrontendAddress(found.control, address, keyring, found.remote, found.engine, found.pid, where)


def publish_frontend(env: RankEnv, frontend_address: FrontendAddress, store: Store) -> None:
    """On rank 0: publish the coordinator's address to the ranks of other nodes."""
    store.set(_MACHINE + env.job, host_id())
    store.set(_KEY + env.job, msgspec.json.encode(frontend_address.connect_info).decode())


def find_remote_frontend(
    env: RankEnv, store: Store, address: str, timeout_s: float, secret_file: str | None = None
) -> FrontendAddress:
    """On other nodes: wait until rank 0 has published the coordinator's address and the coordinator accepts a connection.

    Raises UserError when this node's secret differs from node 0's, or node 0's address is unusable here. EngineFailure after
    `timeout_s`, which is the store's own timeout, too; PeerLost when the store is gone: that of node 0's next agent is another.
    """
    retry_log = RetryLog(timeout_s, logger)
    status = "rank 0 has not published its address"
    while not retry_log.timed_out:
        try:
            connect_info = msgspec.json.decode(store.get(_KEY + env.job), type=ConnectInfo)
            machine = store.get(_MACHINE + env.job).decode()
        except RuntimeError as error:
            if retry_log.timed_out:
                break
            raise PeerLost(f"the agents' store at {host_port(env.master_addr, env.master_port)} is gone") from error
        host, _, port = connect_info.endpoint.removeprefix("tcp://").rpartition(":")
        _check_address(host.strip("[]"), machine)
        try:
            socket.create_connection((host.strip("[]"), int(port)), retry_log.connect_s).close()
        except OSError as error:  # a closed port; or the frontend has gone, and the next one's address follows
            status = f"nobody answers at {connect_info.endpoint}: {os_error_text(error)}"
            retry_log.log_if_due(f"the frontend at {connect_info.endpoint}", os_error_text(error))
            time.sleep(RETRY_S)
            continue
        return FrontendAddress(connect_info.endpoint, address, connect_info.keyring(secret_file))
    raise EngineFailure(f"rank {env.rank} waited {timeout_s:g} s for the frontend at {env.master_addr}: {status}")


def _check_address(reported: str, machine: str) -> None:
    """Raise UserError when node 0's address is also an address of this host, though node 0 is another machine."""
    local = next((interface for interface in interfaces() if interface.address == reported), None)
    if local is not None and machine != host_id():
        raise UserError(
            f"node 0 calls itself {reported}, which on this node is {local.name}: pass --interface with a network that they "
            "share, such as --interface 10.0.0.0/24",
            param="interface",
        )


# The runtime directory


def runtime_dir(env: RankEnv) -> Path:
    """The runtime directory of `env`, or by default a name that is unique to the ranks of this agent."""
    if env.runtime_dir is not None:
        return Path(env.runtime_dir)
    run = "".join(c if c.isalnum() else "_" for c in env.run_id)[:16]
    pid_namespace = Path("/proc/self/ns/pid").stat().st_ino
    return Path(tempfile.gettempdir(), f"tpserve-{os.getuid()}-{run}-{env.agent_pid}-{pid_namespace:x}")


def make_runtime_dir(where: Path) -> None:
    """Create the directory with mode 0700, or check an existing one. Raises UserError when it is not private to this user."""
    if len(os.fsencode(where)) > _MAX_PATH:
        raise UserError(f"the runtime directory {where} has too long a name for sockets: set TMPDIR to a shorter path")
    try:
        where.mkdir(mode=0o700)
    except FileExistsError:
        facts = where.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) != 0o700:
            raise UserError(f"{where} is in the way and is not a directory of mode 0700 of this user: remove it") from None
    except OSError as error:
        raise UserError(f"cannot make the runtime directory {where}: {error.strerror}") from error


def remove_runtime_dir(where: Path) -> None:
    """Remove the directory. It is renamed first, so that no other process sees a part of it, or loses a successor's."""
    aside = where.with_name(f"{where.name}.{os.getpid()}")
    try:
        where.rename(aside)
    except OSError:
        return
    shutil.rmtree(aside, ignore_errors=True)


def acquire_lock(where: Path) -> int:
    """In the frontend: take the directory's lock until the process ends. Raises BlockingIOError when another process has it."""
    descriptor = os.open(where / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def is_frontend_alive(where: Path) -> bool:
    """Whether a live frontend has the directory's lock."""
    try:
        descriptor = os.open(where / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def write_frontend(where: Path, record: FrontendRecord) -> None:
    """Write frontend.json atomically."""
    draft = where / f"frontend.{os.getpid()}"
    draft.write_bytes(msgspec.json.encode(record))
    draft.rename(where / "frontend.json")


def read_frontend(where: Path) -> FrontendRecord | None:
    """Read frontend.json; None when there is none."""
    try:
        return msgspec.json.decode((where / "frontend.json").read_bytes(), type=FrontendRecord)
    except FileNotFoundError:
        return None


def write_failure(where: Path, failure: AgentFailure) -> None:
    """Write agent.json before the agent ends. The first failure is kept. A missing directory is ignored."""
    with contextlib.suppress(OSError), (where / "agent.json").open("xb") as file:
        file.write(msgspec.json.encode(failure))


def read_failure(where: Path) -> AgentFailure | None:
    """Read agent.json; None when there is none."""
    try:
        return msgspec.json.decode((where / "agent.json").read_bytes(), type=AgentFailure)
    except FileNotFoundError:
        return None


def clear_failure(where: Path) -> None:
    """Remove agent.json: the failure has not lasted."""
    (where / "agent.json").unlink(missing_ok=True)


def announce_agent_end(where: Path) -> None:
    """Tell the frontend that the agent of node 0 has ended for good."""
    with contextlib.suppress(OSError):
        (where / "agent-ended").touch()


def has_agent_ended(where: Path) -> bool:
    """Whether the agent of node 0 has ended for good."""
    return (where / "agent-ended").exists()


# The frontend as a child


def spawn_frontend(
    where: Path, config: EngineConfig, watch_pid: int, nnodes: int, address: str, listener: socket.socket | None = None
) -> "subprocess.Popen[bytes]":
    """Start a frontend in its own session. It ends when the process `watch_pid` ends.

    `listener`: the HTTP socket of `tpserve serve`, which stays open there; None under bare torchrun.
    """
    (where / "frontend.json").unlink(missing_ok=True)
    inherited = [] if listener is None else [listener.fileno()]
    command = [sys.executable, "-m", "tpserve.frontend", str(where), str(watch_pid), str(nnodes), address, *map(str, inherited)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, pass_fds=inherited)
    assert child.stdin is not None
    try:
        with child.stdin:
            child.stdin.write(msgspec.json.encode(config))
    except BrokenPipeError:
        pass  # it ended at once; its record has the reason
    return child


def wait_ready(where: Path, child: "subprocess.Popen[bytes] | None", timeout_s: float) -> FrontendRecord:
    """Wait until the frontend's sockets are bound. Raises UserError or EngineFailure with its reason when it cannot start."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        ended = child is not None and child.poll() is not None  # checked before reading, so that its last record is seen
        record = read_frontend(where)
        if child is not None and record is not None and record.error:
            child.wait()
            remove_runtime_dir(where)
            raise UserError(record.error) if record.code == 2 else EngineFailure(record.error)
        if ended:
            assert child is not None
            if not is_frontend_alive(where):  # otherwise the directory belongs to another, live frontend
                remove_runtime_dir(where)
            raise EngineFailure(f"the frontend ended with exit code {child.returncode} before it was ready")
        if record is not None and not record.error and is_frontend_alive(where):
            return record
        time.sleep(_POLL_S)
    raise EngineFailure(f"the frontend was not ready within {timeout_s:g} s (see {where})")
