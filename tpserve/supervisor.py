"""`tpserve serve`: one command per node. Starts the ranks' agent and, on node 0, the HTTP frontend; forwards signals; ends last.

    supervisor          this process; imports no torch
      agent             its own session; dies with the supervisor
        rank, rank ...  their own sessions; die with the agent
      frontend          its own session; ends when the agent is gone

Owns the lifetime of the children and the exit code. Never touches a request.

Invariants:
- Wrong input is refused before a child starts.
- When this process has ended, none of its descendants is alive (it adopts orphans), and the runtime directory, which only node 0
  has, is deleted.
- After SIGKILL of this process the kernel ends the agent and the ranks; the frontend then ends by itself and deletes the
  directory.
- A child stopped by SIGSTOP is killed. The agent does the same to this process.

    SIGINT, SIGTERM, SIGHUP   drain: open requests finish, new ones are refused; exit code 0
                              before the server is ready there are no requests: everything is killed at once
    a second one              everything is killed at once; exit code 128 + signal

Other exit codes: 2 for an error that the user can fix, 1 for a failure.
"""

import contextlib
import ctypes
import http.client
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from types import FrameType

import msgspec
from msgspec.structs import replace

from tpserve.agent import AGENT_COMMAND, AgentJob
from tpserve.cli import server_flags
from tpserve.cluster.discovery import AgentFailure, spawn_frontend, wait_ready, write_failure
from tpserve.cluster.retry_log import RetryLog
from tpserve.config import env
from tpserve.config.resolve import num_all_ranks, num_local_ranks, resolve
from tpserve.config.schema import EngineConfig, Flags
from tpserve.errors import EngineFailure, UserError
from tpserve.host.launch import node_interface, rendezvous_address
from tpserve.host.network import LOOPBACK, Interface, listen, os_error_text
from tpserve.host.resources import available_cores, visible_gpus
from tpserve.process.process_utils import kill_stopped_in_background
from tpserve.process.signals import SAME_SIGNAL_S
from tpserve.types.machine import Machine
from tpserve.types.model_files import ModelFiles
from tpserve.types.model_spec import ModelSpec
from tpserve.wire.curve import Keyring

logger = logging.getLogger("tpserve.supervisor")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FOLLOW_S = 6.0
"""How long one child may outlive the other. The frontend gives its ranks four seconds to exit."""
READY_POLL_S = 0.5
_PR_SET_CHILD_SUBREAPER = 36


def serve(flags: Flags, files: ModelFiles, spec: ModelSpec) -> int:
    """Serve until a signal or a failure; returns the exit code. Raises UserError for an error that the user can fix."""
    num_gpus = visible_gpus()
    nproc = num_local_ranks(flags, num_gpus)
    machine = Machine(num_all_ranks(flags, nproc), nproc, flags.nnodes, num_gpus, available_cores(), "serve")
    config = resolve(flags, files, spec, machine)
    _wait_for_master_name(flags)
    interface = node_interface(flags)
    is_head = flags.nnodes > 1 and flags.node_rank == 0
    listener = listen(rendezvous_address(flags, interface), (flags.master_port, flags.master_port)) if is_head else None
    if flags.node_rank == 0:
        runtime_dir = Path(tempfile.mkdtemp(prefix="tpserve-"))
    else:  # only a unique name, by which the ranks of this node find each other
        runtime_dir = Path(f"/nowhere/tpserve-{uuid.uuid4().hex}")
    try:
        return _Supervisor(flags, config, nproc, runtime_dir, interface, listener).run()
    finally:
        for directory in (runtime_dir, *runtime_dir.parent.glob(f"{runtime_dir.name}.*")):
            shutil.rmtree(directory, ignore_errors=True)


def _wait_for_master_name(flags: Flags) -> None:
    """Wait until --master-addr resolves: with containers, a node's name appears when the node starts. Raises UserError."""
    retry_log, name = RetryLog(flags.start_timeout, logger), flags.master_addr
    while flags.nnodes > 1:
        try:
            socket.getaddrinfo(name, flags.master_port)
            return
        except socket.gaierror as error:
            if retry_log.timed_out:
                raise UserError(f"--master-addr {name}: {os_error_text(error)}", param="master_addr") from error
            retry_log.log_if_due(f"the name {name}", os_error_text(error))
        time.sleep(READY_POLL_S)


class _ExitNow(BaseException):
    """Raised by the signal handler at any point: kill every child and exit with `code`."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _Supervisor:
    """Starts and watches the children of one node."""

    def __init__(
        self,
        flags: Flags,
        config: EngineConfig,
        nproc: int,
        runtime_dir: Path,
        interface: Interface,
        listener: socket.socket | None,
    ) -> None:
        """`listener`: on node 0 of several, the socket to which the other nodes connect; else None."""
        self._flags = flags
        self._config = config
        self._nproc = nproc
        self._runtime_dir = runtime_dir
        self._interface = interface
        self._listener = listener
        self._signalled_s: list[float] = []
        self._stopped: dict[int, str] = {}
        self._starting = True
        self._forwarded = False
        self._wake, self._wake_writer = socket.socketpair()
        self._agent: subprocess.Popen[bytes] | None = None
        self._frontend: subprocess.Popen[bytes] | None = None
        self._url = ""

    def run(self) -> int:
        """Start the children, watch them and end them; returns the exit code."""
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._wake_writer.setblocking(False)
        signal.set_wakeup_fd(self._wake_writer.fileno())
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._on_signal)
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # a stopped process is killed, and Ctrl-Z must not do that
        kill_stopped_in_background(self._children, self._log_stopped)
        try:
            self._start()
            return self._watch()
        except _ExitNow as now:
            return now.code
        except EngineFailure as error:
            logger.error("%s", error)
            return 1
        finally:
            _end_all_children()

    def _start(self) -> None:
        """Start the agent first, since the frontend watches it, and torch then loads while the frontend opens its port."""
        flags, config = self._flags, self._config
        self._agent = self._spawn_agent()
        if flags.node_rank > 0:
            logger.info("node %d of %d: %d headless ranks", flags.node_rank, flags.nnodes, self._nproc)
            self._starting = False
            return
        self._frontend = spawn_frontend(self._runtime_dir, config, self._agent.pid, flags.nnodes, self._interface.address)
        try:
            self._url = wait_ready(self._runtime_dir, self._frontend, config.start_timeout).http
        except EngineFailure:
            if self._agent.poll() is None or self._frontend.poll() is None:
                raise
            # both have ended and logged the reason
        self._starting = False

    def _spawn_agent(self) -> "subprocess.Popen[bytes]":
        flags, config = self._flags, self._config
        key = b"" if flags.cluster_secret_file is None else Keyring.read(flags.cluster_secret_file).rendezvous_key
        job = AgentJob(
            supervisor_pid=os.getpid(),
            monitor_supervisor=True,
            nnodes=flags.nnodes,
            node_rank=flags.node_rank,
            nproc=self._nproc,
            master_addr=flags.master_addr or LOOPBACK,
            master_port=flags.master_port,
            listener=-1 if self._listener is None else self._listener.fileno(),
            address=self._interface.address,
            address_derived=flags.interface is None,
            rendezvous_key=key.hex(),
            port_range=config.port_range,
            world_size=config.layout.world_size,
            run_id=f"tpserve-{flags.master_port}" if flags.nnodes > 1 else uuid.uuid4().hex,
            start_timeout_s=config.start_timeout,
            runtime_dir=str(self._runtime_dir),
            log_level=config.log_level,
            argv=server_flags.to_argv(replace(flags, port=config.port)),
        )
        environ = env.for_ranks(str(self._runtime_dir), quiet=config.log_level != "debug")
        pass_fds = () if self._listener is None else (self._listener.fileno(),)
        agent = subprocess.Popen(AGENT_COMMAND, stdin=subprocess.PIPE, env=environ, start_new_session=True, pass_fds=pass_fds)
        if self._listener is not None:
            self._listener.close()  # the agent has its own descriptor
        assert agent.stdin is not None
        with contextlib.suppress(BrokenPipeError), agent.stdin:
            agent.stdin.write(msgspec.json.encode(job))
        return agent

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Record the signal for `_watch`. Ignores a repeat at once: a terminal and a parent may both send one Ctrl-C."""
        now = time.monotonic()
        if self._signalled_s and now - self._signalled_s[-1] <= SAME_SIGNAL_S:
            return
        self._signalled_s.append(now)
        if len(self._signalled_s) == 2:  # a third signal must not interrupt the killing
            raise _ExitNow(128 + number)
        if self._starting and len(self._signalled_s) == 1:
            raise _ExitNow(0)

    def _watch(self) -> int:
        """Wait until the children have ended; returns the exit code."""
        children = [child for child in (self._frontend, self._agent) if child is not None]
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for child in children:
            if child.poll() is None:  # not waited for yet, so the pid is still its own
                poll.register(os.pidfd_open(child.pid), select.POLLIN)
        ended_s: float | None = None
        while any(child.poll() is None for child in children):
            if self._signalled_s and not self._forwarded:
                self._forward_signal()
            if ended_s is None and any(child.poll() is not None for child in children):
                ended_s = time.monotonic()
                poll = select.poll()  # a dead child's descriptor stays readable
                poll.register(self._wake, select.POLLIN)
            if ended_s is not None and (time.monotonic() - ended_s > FOLLOW_S or self._is_killed(self._frontend)):
                break  # the remaining child does not notice that the frontend was killed
            waiting = self._url or ended_s is not None
            poll.poll(READY_POLL_S * 1000 if waiting else None)
            with contextlib.suppress(BlockingIOError):
                self._wake.recv(4096, socket.MSG_DONTWAIT)
            if self._url and not self._signalled_s and ended_s is None and self._is_ready():
                self._print_curl()
        code = self._exit_code()
        _end_all_children()  # first, so that the final reason is the last log line
        self._log_final_reason()
        return code

    @staticmethod
    def _is_killed(child: "subprocess.Popen[bytes] | None") -> bool:
        return child is not None and (child.returncode or 0) < 0

    def _children(self) -> dict[int, str]:
        """The children that have not ended: pid -> name."""
        children = {"the frontend": self._frontend, f"the agent of node {self._flags.node_rank}": self._agent}
        return {child.pid: name for name, child in children.items() if child is not None and child.returncode is None}

    def _log_stopped(self, pid: int, what: str) -> None:
        logger.error("%s: killing it", what)
        self._stopped[pid] = what
        if self._frontend is not None and pid != self._frontend.pid:
            write_failure(self._runtime_dir, AgentFailure(1, what))

    def _log_final_reason(self) -> None:
        """Log that the frontend (on other nodes the agent) was killed. Otherwise it has logged the final reason itself."""
        name, last = ("the frontend", self._frontend) if self._frontend is not None else ("the agent", self._agent)
        if last is not None and self._is_killed(last) and not (self._forwarded and last.returncode == -signal.SIGTERM):
            killer = signal.Signals(-last.returncode).name
            killed = f"{name} (pid {last.pid}) was killed by {killer}; look at `dmesg` for a kernel that was out of memory"
            logger.error("ended: %s", self._stopped.get(last.pid, killed))

    def _forward_signal(self) -> None:
        """Forward the first signal to the frontend (on other nodes the agent), which drains."""
        self._forwarded = True
        if self._url and self._flags.nnodes == 1 and not self._is_ready():
            raise _ExitNow(0)  # not ready: no request is open, and there is no other node to inform
        first = self._agent if self._frontend is None else self._frontend
        assert first is not None
        first.terminate()

    def _is_ready(self) -> bool:
        host, _, port = self._url.removeprefix("http://").rpartition(":")
        connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=READY_POLL_S)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def _print_curl(self) -> None:
        """Print a first request once, when the server is ready."""
        with contextlib.suppress(OSError):  # stdout is closed
            sys.stdout.write(curl_line(self._url, keyed=self._config.api_key is not None) + "\n")
            sys.stdout.flush()
        self._url = ""

    def _exit_code(self) -> int:
        """The frontend's exit code decides; on other nodes the agent's."""
        assert self._agent is not None
        agent = self._agent.poll()
        frontend = agent if self._frontend is None else self._frontend.poll()
        if frontend == 0 or (self._forwarded and frontend in (0, -signal.SIGTERM)):
            return 0
        return 2 if 2 in (frontend, agent) else 1


def curl_line(url: str, keyed: bool) -> str:
    """A first request as a curl command. `keyed`: the server needs an API key."""
    key = ' -H "Authorization: Bearer $TPSERVE_API_KEY"' if keyed else ""
    body = """{"prompt": "Once upon a time", "max_tokens": 60}"""
    return f"curl {url}/v1/completions -H 'Content-Type: application/json'{key} -d '{body}'"


def _end_all_children() -> None:
    """Kill all descendants. Orphans become children of this process, so the loop ends when it has none left."""
    while True:
        with contextlib.suppress(ProcessLookupError):
            for pid in _children():
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    me, found = str(os.getpid()), []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[1] == me and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found
