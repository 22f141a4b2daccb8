"""`tpserve serve`: one command a node. Starts the ranks' agent and, on node 0, the HTTP frontend; passes signals on; ends last.

    supervisor          this process; imports no torch
      agent             its own session; dies with the supervisor
        rank, rank ...  their own sessions; die with the agent
      frontend          its own session; ends when the agent is gone

Owns the children's lives and the exit code. Never touches a request. Invariants: whatever can be refused is refused before a
child is started; when this process has ended, none of its descendants lives (it adopts those whose parent died) and the
runtime directory is gone, which only node 0 has. After SIGKILL of this process the kernel ends the agent and the ranks, and the
frontend follows, which takes the directory away. A child that was stopped is killed, and so is this process by the agent.

    SIGINT, SIGTERM, SIGHUP   drain: open requests finish, new ones are refused; exit code 0
                              before the server is ready, there being none: everything is killed at once
    a second one              everything is killed at once; exit code 128 + signal

Exit codes otherwise: 2 for what the user can mend, 1 for failures.
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
from tpserve.cluster.discovery import AgentFailure, spawn, wait_ready, write_failure
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
"""How long one child may go on when the other has ended. The frontend gives its ranks four seconds to leave."""
READY_POLL_S = 0.5
_PR_SET_CHILD_SUBREAPER = 36


def serve(flags: Flags, files: ModelFiles, spec: ModelSpec) -> int:
    """Serve until told to end; returns the exit code. UserError for anything the user can mend."""
    num_gpus = visible_gpus()
    nproc = num_local_ranks(flags, num_gpus)
    machine = Machine(num_all_ranks(flags, nproc), nproc, flags.nnodes, num_gpus, available_cores(), "serve")
    config = resolve(flags, files, spec, machine)
    _await_name(flags)
    interface = node_interface(flags)
    leads = flags.nnodes > 1 and flags.node_rank == 0
    listener = listen(rendezvous_address(flags, interface), (flags.master_port, flags.master_port)) if leads else None
    nowhere = f"/nowhere/tpserve-{uuid.uuid4().hex}"  # elsewhere it is but a name, by which a node's ranks find each other
    runtime_dir = Path(tempfile.mkdtemp(prefix="tpserve-") if flags.node_rank == 0 else nowhere)
    try:
        return _Supervisor(flags, config, nproc, runtime_dir, interface, listener).run()
    finally:
        for left in (runtime_dir, *runtime_dir.parent.glob(f"{runtime_dir.name}.*")):
            shutil.rmtree(left, ignore_errors=True)


def _await_name(flags: Flags) -> None:
    """Wait until the master address means something: where nodes are containers, names come with the nodes. Raises UserError."""
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
    """Raised by the signal handler, wherever this process is: leave, kill every child, exit with `code`."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _Supervisor:
    """One node's children, from their start to their end."""

    def __init__(
        self,
        flags: Flags,
        config: EngineConfig,
        nproc: int,
        runtime_dir: Path,
        interface: Interface,
        listener: socket.socket | None,
    ) -> None:
        """`listener`: of node 0, where the others come to."""
        self._flags = flags
        self._config = config
        self._nproc = nproc
        self._runtime_dir = runtime_dir
        self._interface = interface
        self._listener = listener
        self._signalled_s: list[float] = []
        self._stopped: dict[int, str] = {}
        self._starting = True
        self._passed_on = False
        self._wake, self._wake_writer = socket.socketpair()
        self._agent: subprocess.Popen[bytes] | None = None
        self._frontend: subprocess.Popen[bytes] | None = None
        self._url = ""

    def run(self) -> int:
        """Start, watch, end."""
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._wake_writer.setblocking(False)
        signal.set_wakeup_fd(self._wake_writer.fileno())
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup means it
                signal.signal(number, self._note)
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # who is stopped is ended, and a Ctrl-Z does not mean that
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
        """The agent first: the frontend watches it. torch loads while the frontend opens its port."""
        flags, config = self._flags, self._config
        self._agent = self._spawn_agent()
        if flags.node_rank > 0:
            logger.info("node %d of %d: %d headless ranks", flags.node_rank, flags.nnodes, self._nproc)
            self._starting = False
            return
        self._frontend = spawn(self._runtime_dir, config, self._agent.pid, flags.nnodes, self._interface.address)
        try:
            self._url = wait_ready(self._runtime_dir, self._frontend, config.start_timeout).http
        except EngineFailure:
            if self._agent.poll() is None or self._frontend.poll() is None:
                raise
            # both have ended, and have said why
        self._starting = False

    def _spawn_agent(self) -> "subprocess.Popen[bytes]":
        flags, config = self._flags, self._config
        job = AgentJob(
            supervisor_pid=os.getpid(),
            mutual=True,
            nnodes=flags.nnodes,
            node_rank=flags.node_rank,
            nproc=self._nproc,
            master_addr=flags.master_addr or LOOPBACK,
            master_port=flags.master_port,
            listener=-1 if self._listener is None else self._listener.fileno(),
            address=self._interface.address,
            derived=flags.interface is None,
            rendezvous_key=""
            if flags.cluster_secret_file is None
            else Keyring.read(flags.cluster_secret_file).rendezvous_key.hex(),
            port_range=config.port_range,
            world_size=config.layout.world_size,
            run_id=f"tpserve-{flags.master_port}" if flags.nnodes > 1 else uuid.uuid4().hex,
            start_timeout_s=config.start_timeout,
            runtime_dir=str(self._runtime_dir),
            log_level=config.log_level,
            argv=server_flags.to_argv(replace(flags, port=config.port)),
        )
        environ = env.for_ranks(str(self._runtime_dir), quiet=config.log_level != "debug")
        passed = () if self._listener is None else (self._listener.fileno(),)
        agent = subprocess.Popen(AGENT_COMMAND, stdin=subprocess.PIPE, env=environ, start_new_session=True, pass_fds=passed)
        if self._listener is not None:
            self._listener.close()  # the agent's now
        assert agent.stdin is not None
        with contextlib.suppress(BrokenPipeError), agent.stdin:
            agent.stdin.write(msgspec.json.encode(job))
        return agent

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The first signal is for `_watch`. A terminal and a parent may both send what is one Ctrl-C."""
        now = time.monotonic()
        if self._signalled_s and now - self._signalled_s[-1] <= SAME_SIGNAL_S:
            return
        self._signalled_s.append(now)
        if len(self._signalled_s) == 2:  # a third one must not disturb the killing
            raise _ExitNow(128 + number)
        if self._starting and len(self._signalled_s) == 1:
            raise _ExitNow(0)

    def _watch(self) -> int:
        """Until the children have ended."""
        children = [child for child in (self._frontend, self._agent) if child is not None]
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for child in children:
            if child.poll() is None:  # ours and not waited for: it exists
                poll.register(os.pidfd_open(child.pid), select.POLLIN)
        ended_s: float | None = None
        while any(child.poll() is None for child in children):
            if self._signalled_s and not self._passed_on:
                self._pass_on()
            if ended_s is None and any(child.poll() is not None for child in children):
                ended_s = time.monotonic()
                poll = select.poll()  # a dead child's descriptor would be readable for ever
                poll.register(self._wake, select.POLLIN)
            if ended_s is not None and (time.monotonic() - ended_s > FOLLOW_S or self._is_killed(self._frontend)):
                break  # without a frontend, who is left has nobody to follow
            waiting = self._url or ended_s is not None
            poll.poll(READY_POLL_S * 1000 if waiting else None)
            with contextlib.suppress(BlockingIOError):
                self._wake.recv(4096, socket.MSG_DONTWAIT)
            if self._url and not self._signalled_s and ended_s is None and self._is_ready():
                self._print_curl()
        code = self._verdict()
        _end_all_children()  # before the last word, for it to be that
        self._log_final_reason()
        return code

    @staticmethod
    def _is_killed(child: "subprocess.Popen[bytes] | None") -> bool:
        return child is not None and (child.returncode or 0) < 0

    def _children(self) -> dict[int, str]:
        """Those that have not ended, and what they are."""
        children = {"the frontend": self._frontend, f"the agent of node {self._flags.node_rank}": self._agent}
        return {child.pid: name for name, child in children.items() if child is not None and child.returncode is None}

    def _log_stopped(self, pid: int, what: str) -> None:
        logger.error("%s: it is ended", what)
        self._stopped[pid] = what
        if self._frontend is not None and pid != self._frontend.pid:
            write_failure(self._runtime_dir, AgentFailure(1, what))

    def _log_final_reason(self) -> None:
        """It is the frontend's, and on other nodes the agent's, unless somebody has killed it."""
        name, last = ("the frontend", self._frontend) if self._frontend is not None else ("the agent", self._agent)
        if last is not None and self._is_killed(last) and not (self._passed_on and last.returncode == -signal.SIGTERM):
            killer = signal.Signals(-last.returncode).name
            killed = f"{name} (pid {last.pid}) was killed by {killer}; look at `dmesg` for a kernel that was out of memory"
            logger.error("ended: %s", self._stopped.get(last.pid, killed))

    def _pass_on(self) -> None:
        """The first signal: whoever knows about open requests decides when they are done."""
        self._passed_on = True
        if self._url and self._flags.nnodes == 1 and not self._is_ready():
            raise _ExitNow(0)  # no request has been admitted, and no other node waits for a word
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
        """Once, when the server is ready: a line to paste."""
        with contextlib.suppress(OSError):  # nobody reads our stdout
            sys.stdout.write(curl_line(self._url, keyed=self._config.api_key is not None) + "\n")
            sys.stdout.flush()
        self._url = ""

    def _verdict(self) -> int:
        """The exit code: the frontend's is the service's; on other nodes there is only the agent's."""
        assert self._agent is not None
        agent = self._agent.poll()
        frontend = agent if self._frontend is None else self._frontend.poll()
        if frontend == 0 or (self._passed_on and frontend in (0, -signal.SIGTERM)):
            return 0
        return 2 if 2 in (frontend, agent) else 1


def curl_line(url: str, keyed: bool) -> str:
    """A first request, to paste into a shell."""
    key = ' -H "Authorization: Bearer $TPSERVE_API_KEY"' if keyed else ""
    body = """{"prompt": "Once upon a time", "max_tokens": 60}"""
    return f"curl {url}/v1/completions -H 'Content-Type: application/json'{key} -d '{body}'"


def _end_all_children() -> None:
    """Kill what is left below this process, children of dead children included, until there is nothing to wait for."""
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
