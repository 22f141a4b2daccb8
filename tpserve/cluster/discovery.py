"""How a rank finds the frontend, and how one comes to be: the runtime directory and what stands in it.

    RUNTIME_DIR/            mode 0700, ours; named after the run id and the agent of node 0, or given by `tpserve serve`
        lock                held (flock) by the frontend for as long as it lives: the kernel lets go of it when it dies
        agent.json          why the agent of `tpserve serve` has ended
        frontend.json       written once its sockets are bound, or with the error that kept it from that
        control, engine     its ZeroMQ sockets; plan-*, result-* those of rank 0

Runs before torch is imported and needs none of it. Ranks of node 0 find the directory by its name; those of other nodes are told
the coordinator's TCP address over torchrun's store, of which only `get` and `set` are used here.
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

from tpserve.cluster.retry_log import RetryLog
from tpserve.config.env import RankEnv
from tpserve.config.schema import EngineConfig
from tpserve.errors import EngineFailure, UserError
from tpserve.host.network import host_id, interfaces, os_error_text
from tpserve.wire.curve import ConnectInfo, CurveClient, Keyring

logger = logging.getLogger(__name__)

_KEY, _MACHINE = "tpserve/control", "tpserve/machine"
_POLL_S, _RETRY_S = 0.02, 0.2
_MAX_PATH = 70
"""A socket's path has 107 bytes at most; this leaves room for its name."""


class FrontendRecord(Struct, frozen=True):
    """frontend.json: where a frontend can be reached, or why it could not start (`error`, with the exit code it deserves)."""

    pid: int
    control: str = ""
    remote: ConnectInfo | None = None
    engine: str = ""
    http: str = ""
    error: str = ""
    code: int = 0


class AgentFailure(Struct, frozen=True):
    """agent.json: why the agent of node 0 has ended, for the frontend to tell."""

    code: int
    why: str
    advice: str = ""


class Store(Protocol):
    """The two words of torch's stores that are needed here."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...


@dataclass(frozen=True)
class FrontendAddress:
    """How a rank reaches the frontend. `address`: this host's on the cluster interface, loopback on a single node.

    `keyring`: the cluster's keys, where there are several nodes. `runtime_dir`: on the frontend's own node.
    """

    control: str
    address: str
    keyring: Keyring | None = None
    connect_info: ConnectInfo | None = None
    engine: str = ""
    frontend_pid: int | None = None
    runtime_dir: Path | None = None

    def endpoint(self, name: str) -> str:
        """What rank 0 binds for ranks of its node to connect to; a new address each time."""
        return f"ipc://{self.runtime_dir}/{name}-{time.time_ns():x}"

    def curve_client(self, rank: int, server: str) -> CurveClient | None:
        """What `rank` needs to connect to `server`; None where it is on the same node."""
        return None if self.keyring is None or self.runtime_dir is not None else self.keyring.curve_client(rank, server)


def find_frontend(env: RankEnv, config: EngineConfig, address: str, timeout_s: float, *, start: bool = True) -> FrontendAddress:
    """For ranks of node 0: find the frontend. With `start` (bare torchrun) rank 0 starts one when none lives, in a session of its
    own, so that it survives the restart of the rank group. Raises what kept the frontend from starting."""
    where = runtime_dir(env)
    deadline_s = time.monotonic() + timeout_s
    child: subprocess.Popen[bytes] | None = None
    if env.rank == 0 and start:
        make_runtime_dir(where)
        while is_alive(where) and read_frontend(where) is None and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)  # it is starting, or ending after a fault
        if not is_alive(where):
            make_runtime_dir(where)  # again: one that ended has taken it away
            child = spawn(where, config, env.agent_pid, env.nnodes, address)
    found = wait_ready(where, child, deadline_s - time.monotonic())
    keyring = None if found.remote is None else found.remote.accept(config.cluster_secret_file)
    return FrontendAddress(found.control, address, keyring, found.remote, found.engine, found.pid, where)


def publish_frontend(env: RankEnv, frontend_address: FrontendAddress, store: Store) -> None:
    """For rank 0: tell the ranks of other nodes where the coordinator is."""
    store.set(_MACHINE + env.job, host_id())
    store.set(_KEY + env.job, msgspec.json.encode(frontend_address.connect_info).decode())


def find_remote_frontend(
    env: RankEnv, store: Store, address: str, timeout_s: float, secret_file: str | None = None
) -> FrontendAddress:
    """For ranks of other nodes: wait until rank 0 has told where the coordinator is, and until somebody listens there.

    UserError when this node's secret is not node 0's, or when node 0's address is of no use here.
    """
    retry_log = RetryLog(timeout_s, logger)
    known = "rank 0 has not told where it is"
    while not retry_log.timed_out:
        try:
            connect_info = msgspec.json.decode(store.get(_KEY + env.job), type=ConnectInfo)
        except RuntimeError:  # nothing was told within the store's own timeout
            continue
        host, _, port = connect_info.endpoint.removeprefix("tcp://").rpartition(":")
        _check_address(host.strip("[]"), store.get(_MACHINE + env.job).decode())
        try:
            socket.create_connection((host.strip("[]"), int(port)), retry_log.connect_s).close()
        except OSError as error:  # a closed port; or the frontend has gone, and the next one's address follows
            known = f"nobody answers at {connect_info.endpoint}: {os_error_text(error)}"
            retry_log.log_if_due(f"the frontend at {connect_info.endpoint}", os_error_text(error))
            time.sleep(_RETRY_S)
            continue
        return FrontendAddress(connect_info.endpoint, address, connect_info.accept(secret_file))
    raise EngineFailure(f"rank {env.rank} waited {timeout_s:g} s for the frontend at {env.master_addr}: {known}")


def _check_address(told: str, machine: str) -> None:
    """UserError when the address by which node 0 calls itself leads back here, though it is another machine."""
    mine = next((own for own in interfaces() if own.address == told), None)
    if mine is not None and machine != host_id():
        raise UserError(
            f"node 0 calls itself {told}, which on this node is {mine.name}: pass --interface with a network that they share, "
            "such as --interface 10.0.0.0/24",
            param="interface",
        )


# The runtime directory


def runtime_dir(env: RankEnv) -> Path:
    """The one given, or one that only the ranks of this agent can mean."""
    if env.runtime_dir is not None:
        return Path(env.runtime_dir)
    run = "".join(c if c.isalnum() else "_" for c in env.run_id)[:16]
    pid_namespace = Path("/proc/self/ns/pid").stat().st_ino
    return Path(tempfile.gettempdir(), f"tpserve-{os.getuid()}-{run}-{env.agent_pid}-{pid_namespace:x}")


def make_runtime_dir(where: Path) -> None:
    """Make it ours alone, or see that it is. UserError when somebody else's stands in its place."""
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
    """Take it away whole, in one step for those who look, so that a successor's is never touched."""
    aside = where.with_name(f"{where.name}.{os.getpid()}")
    try:
        where.rename(aside)
    except OSError:
        return
    shutil.rmtree(aside, ignore_errors=True)


def hold_lock(where: Path) -> int:
    """For the frontend: be the one that lives here, until the process ends. BlockingIOError when another does."""
    descriptor = os.open(where / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def is_alive(where: Path) -> bool:
    """Does a frontend live here?"""
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
    """Write frontend.json in one step."""
    draft = where / f"frontend.{os.getpid()}"
    draft.write_bytes(msgspec.json.encode(record))
    draft.rename(where / "frontend.json")


def read_frontend(where: Path) -> FrontendRecord | None:
    """What frontend.json says; None when there is none."""
    try:
        return msgspec.json.decode((where / "frontend.json").read_bytes(), type=FrontendRecord)
    except FileNotFoundError:
        return None


def write_failure(where: Path, failure: AgentFailure) -> None:
    """Write agent.json, before the agent ends; the first reason counts, and there may be no directory any more."""
    with contextlib.suppress(OSError), (where / "agent.json").open("xb") as file:
        file.write(msgspec.json.encode(failure))


def read_failure(where: Path) -> AgentFailure | None:
    """What agent.json says; None when there is none."""
    try:
        return msgspec.json.decode((where / "agent.json").read_bytes(), type=AgentFailure)
    except FileNotFoundError:
        return None


# The frontend as a child


def spawn(where: Path, config: EngineConfig, watch_pid: int, nnodes: int, address: str) -> "subprocess.Popen[bytes]":
    """Start a frontend in a session of its own. It ends when the process `watch_pid` does."""
    (where / "frontend.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "tpserve.frontend", str(where), str(watch_pid), str(nnodes), address]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert child.stdin is not None
    try:
        with child.stdin:
            child.stdin.write(msgspec.json.encode(config))
    except BrokenPipeError:
        pass  # it ended at once; wait_ready tells why
    return child


def wait_ready(where: Path, child: "subprocess.Popen[bytes] | None", timeout_s: float) -> FrontendRecord:
    """Wait until the frontend's sockets are bound. UserError or EngineFailure with what it says when it cannot start."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        ended = child is not None and child.poll() is not None  # before reading: what it wrote last counts
        record = read_frontend(where)
        if child is not None and record is not None and record.error:
            child.wait()
            remove_runtime_dir(where)
            raise UserError(record.error) if record.code == 2 else EngineFailure(record.error)
        if ended:
            assert child is not None
            if not is_alive(where):  # else another one lives there, in whose way ours was
                remove_runtime_dir(where)
            raise EngineFailure(f"the frontend ended with exit code {child.returncode} before it was ready")
        if record is not None and not record.error and is_alive(where):
            return record
        time.sleep(_POLL_S)
    raise EngineFailure(f"the frontend was not ready within {timeout_s:g} s (see {where})")
