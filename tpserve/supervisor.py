"""`tpserve serve`: one command per node. Starts the ranks' agent and, on node 0, the HTTP frontend; forwards signals; ends last.

    supervisor          this process; imports no torch
      forkserver        imports torch once; forks the agents; its own session
      agent             its own session; dies with the supervisor
        forkserver      forked by the agent, for ranks
        rank, rank ...  their own sessions; die with the agent
      frontend          its own session; ends when the supervisor is gone, or the agent for good

Owns the lifetime of the children, the HTTP listening socket and the exit code. Never touches a request.

Invariants:
- Wrong input is refused before a child starts.
- A child that was killed by a signal is started again, after a pause from the fourth early death in a row on. Until a frontend
  accepts them again, clients wait in the backlog of the listening socket. A child that ended with an exit code has meant it.
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
import http.client
import logging
import os
import select
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import time
import uuid
from pathlib import Path
from types import FrameType

import msgspec
from msgspec.structs import replace

from tpserve.agent.job import AGENT_MODULE, AgentJob
from tpserve.cli import server_flags
from tpserve.cluster.discovery import announce_agent_end, read_frontend, spawn_frontend
from tpserve.cluster.retry_log import RetryLog
from tpserve.config import env
from tpserve.config.engine_config import EngineConfig
from tpserve.config.flags import Flags
from tpserve.config.resolve import num_all_ranks, num_local_ranks, resolve
from tpserve.errors import EngineFailure, UserError
from tpserve.host.launch import node_interface, rendezvous_address
from tpserve.host.network import LOOPBACK, Interface, listen, listen_http, os_error_text
from tpserve.host.resources import available_cores, visible_gpus
from tpserve.process.fork_client import FIRST_DESCRIPTOR, ForkClient, ForkReply, ForkRequest, ForkserverLost, adopt_orphans
from tpserve.process.process_utils import end_all_children, exit_text, kill_stopped_in_background, reap_children
from tpserve.process.signals import SAME_SIGNAL_S
from tpserve.process.watched_child import WatchedChild
from tpserve.types.machine import Machine
from tpserve.types.model_files import ModelFiles
from tpserve.types.model_spec import ModelSpec
from tpserve.wire.curve import Keyring

logger = logging.getLogger("tpserve.supervisor")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FOLLOW_S = 6.0
"""How long one child may outlive the other. The frontend gives its ranks four seconds to exit."""
READY_POLL_S = 0.5
START_POLL_S = 0.02


def serve(flags: Flags, files: ModelFiles, spec: ModelSpec) -> int:
    """Serve until a signal or a failure; returns the exit code. Raises UserError for an error that the user can fix."""
    num_gpus = visible_gpus()
    nproc = num_local_ranks(flags, num_gpus)
    machine = Machine(num_all_ranks(flags, nproc), nproc, flags.nnodes, num_gpus, available_cores(), "serve")
    config = resolve(flags, files, spec, machine)
    _wait_for_master_name(flags)
    interface = node_interface(flags)
    if flags.node_rank == 0:
        runtime_dir = Path(tempfile.mkdtemp(prefix="tpserve-"))
    else:  # only a unique name, by which the ranks of this node find each other
        runtime_dir = Path(f"/nowhere/tpserve-{uuid.uuid4().hex}")
    try:
        return _Supervisor(flags, config, nproc, runtime_dir, interface).run()
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

    def __init__(self, flags: Flags, config: EngineConfig, nproc: int, runtime_dir: Path, interface: Interface) -> None:
        self._flags = flags
        self._config = config
        self._nproc = nproc
        self._runtime_dir = runtime_dir
        self._interface = interface
        self._http: socket.socket | None = None
        self._listener: socket.socket | None = None
        """On node 0 of several, the socket to which the other nodes connect."""
        self._signalled_s: list[float] = []
        self._began_s = time.monotonic()
        self._stopped: dict[int, str] = {}
        self._starting = True
        self._forwarded = False
        self._wake, self._wake_writer = socket.socketpair()
        self._agent = WatchedChild(f"the agent of node {flags.node_rank}")
        self._frontend = WatchedChild("the frontend")
        self._forkserver = WatchedChild("the forkserver")
        self._forks: ForkClient | None = None
        self._url = ""

    def run(self) -> int:
        """Start the children, watch them and end them; returns the exit code. Raises UserError before a child is started."""
        flags = self._flags
        if flags.node_rank == 0:
            self._http = listen_http(self._config.host, self._config.port)
        if flags.nnodes > 1 and flags.node_rank == 0:
            self._listener = listen(rendezvous_address(flags, self._interface), (flags.master_port, flags.master_port))
        adopt_orphans()
        self._wake_writer.setblocking(False)
        signal.set_wakeup_fd(self._wake_writer.fileno())
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._on_signal)
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # a stopped process is killed, and Ctrl-Z must not do that
        kill_stopped_in_background(self._pids, self._log_stopped)
        if flags.node_rank > 0:
            logger.info("node %d of %d: %d headless ranks", flags.node_rank, flags.nnodes, self._nproc)
            self._frontend.due_s, self._starting = None, False
        try:
            return self._watch()
        except _ExitNow as now:
            return now.code
        except EngineFailure as error:
            logger.error("%s", error)
            return 1
        finally:
            end_all_children()

    def _watch(self) -> int:
        """Keep the children alive until the service ends; returns the exit code."""
        ended_s: float | None = None
        while True:
            if self._signalled_s and not self._forwarded:
                self._forward_signal()
            if ended_s is None:
                self._start_due()
            exits = reap_children()
            self._check_start()  # now: a process has its reply sent before it runs, so that of one in `exits` has come
            for pid, code in exits.items():
                self._take_exit(pid, code)
            if ended_s is None and (self._agent.code is not None or self._frontend.code is not None):
                ended_s = time.monotonic()
                self._close_listeners()
            if ended_s is not None and (self._all_ended() or time.monotonic() - ended_s > FOLLOW_S):
                break
            if self._url and not self._starting and not self._signalled_s and ended_s is None and self._is_ready():
                self._print_curl()
            self._wait(ended_s is not None)
        code = self._exit_code()
        end_all_children()  # first, so that the final reason is the last log line
        self._log_final_reason()
        return code

    def _wait(self, ending: bool) -> None:
        """Wait for a signal, an end, a reply, a record of the frontend or a time."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        children = (self._agent, self._frontend, self._forkserver)
        for child in children:
            if child.pidfd is not None:
                poll.register(child.pidfd, select.POLLIN)
        if self._forks is not None and self._agent.pid == 0 and self._forkserver.pid:
            poll.register(self._forks, select.POLLIN)
        now = time.monotonic()
        waiting = [child for child in children if child is not self._agent or self._forks is not None]
        times = [child.due_s - now for child in waiting if child.due_s is not None and not ending]
        if self._starting:
            times.append(START_POLL_S)
        if self._url or ending:
            times.append(READY_POLL_S)
        poll.poll(None if not times else max(0.0, min(times)) * 1000)
        with contextlib.suppress(BlockingIOError):
            self._wake.recv(4096, socket.MSG_DONTWAIT)

    # Starts

    def _start_due(self) -> None:
        """Start what is due: first the forkserver, which imports torch, and then the frontend, which does not."""
        now = time.monotonic()
        if self._forkserver.due_s is not None and self._forkserver.due_s <= now:
            self._spawn_forkserver()
        if self._agent.due_s is not None and self._agent.due_s <= now and self._forks is not None:
            self._request_agent(self._forks)
        if self._frontend.due_s is not None and self._frontend.due_s <= now:
            assert self._http is not None
            address, nnodes = self._interface.address, self._flags.nnodes
            process = spawn_frontend(self._runtime_dir, self._config, os.getpid(), nnodes, address, self._http)
            self._frontend.begin(process.pid, process)

    def _check_start(self) -> None:
        """Take what has come of a start: the agent's pid, the frontend's record."""
        if self._forks is not None and self._agent.pid == 0:
            with contextlib.suppress(ForkserverLost):  # `_take_exit` sees its end
                if (reply := self._forks.receive()) is not None:
                    self._take_reply(reply)
        if self._starting and self._frontend.pid:
            record = read_frontend(self._runtime_dir)
            if record is not None and record.pid == self._frontend.pid and not record.error:
                self._url, self._starting = record.http, False

    def _spawn_forkserver(self) -> None:
        environ = env.for_ranks(str(self._runtime_dir), quiet=self._config.log_level != "debug")
        self._forks = ForkClient.spawn(environ, self._rank_argv())
        self._forkserver.begin(self._forks.pid)

    def _rank_argv(self) -> list[str]:
        return server_flags.to_argv(replace(self._flags, port=self._config.port))

    def _request_agent(self, forks: ForkClient) -> None:
        flags, config, agent = self._flags, self._config, self._agent
        key = b"" if flags.cluster_secret_file is None else Keyring.read(flags.cluster_secret_file).rendezvous_key
        job = AgentJob(
            supervisor_pid=os.getpid(),
            monitor_supervisor=True,
            nnodes=flags.nnodes,
            node_rank=flags.node_rank,
            nproc=self._nproc,
            master_addr=flags.master_addr or LOOPBACK,
            master_port=flags.master_port,
            listener=-1 if self._listener is None else FIRST_DESCRIPTOR,
            address=self._interface.address,
            address_derived=flags.interface is None,
            rendezvous_key=key.hex(),
            port_range=config.port_range,
            world_size=config.layout.world_size,
            run_id=f"tpserve-{flags.master_port}" if flags.nnodes > 1 else uuid.uuid4().hex,
            start_timeout_s=config.start_timeout,
            began_s=self._began_s if agent.restarts == 0 else None,
            recovery_timeout_s=config.recovery_timeout,
            runtime_dir=str(self._runtime_dir),
            log_level=config.log_level,
            argv=self._rank_argv(),
            restarts=agent.restarts,
            last_exit=agent.last_exit and f"{agent.name} {agent.last_exit}",
        )
        environ = env.for_ranks(str(self._runtime_dir), quiet=config.log_level != "debug")
        request = ForkRequest.of(AGENT_MODULE, [], environ, "tpserve agent")
        descriptors = [] if self._listener is None else [self._listener.fileno()]
        with contextlib.suppress(ForkserverLost):  # `_take_exit` sees its end
            forks.request(request, msgspec.json.encode(job), descriptors)
            agent.due_s = None

    def _take_reply(self, reply: ForkReply) -> None:
        if reply.error:
            raise EngineFailure(f"the agent could not be started: {reply.error}")
        self._agent.begin(reply.pid)

    # Signals

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

    def _forward_signal(self) -> None:
        """Forward the first signal to the frontend (on other nodes the agent), which drains."""
        self._forwarded = True
        if self._url and self._flags.nnodes == 1 and not self._is_ready():
            raise _ExitNow(0)  # not ready: no request is open, and there is no other node to inform
        first = self._agent if self._flags.node_rank > 0 else self._frontend
        if first.pid == 0:
            raise _ExitNow(0)
        os.kill(first.pid, signal.SIGTERM)

    # Ends

    def _take_exit(self, pid: int, code: int) -> None:
        if pid == self._frontend.pid:
            self._frontend.end(code, again=code < 0 and not self._forwarded and self._agent.code is None)
            if self._frontend.code is not None:
                self._raise_start_error()
        elif pid == self._agent.pid:
            told = self._forwarded and code == -signal.SIGTERM
            self._agent.end(code, again=code < 0 and not told and self._frontend.code is None)
            if self._agent.code is not None and self._flags.node_rank == 0:
                announce_agent_end(self._runtime_dir)
        elif pid == self._forkserver.pid:
            assert self._forks is not None
            if code >= 0 and self._agent.pid == 0 and self._agent.restarts == 0:
                raise EngineFailure(f"the forkserver, which imports torch, {exit_text(code)}: see what it printed")
            for reply in self._forks.remaining():
                self._take_reply(reply)
            if self._agent.pid == 0 and self._agent.code is None:  # ask the next one
                self._agent.due_s = self._agent.due_s or 0.0
            self._forks.close(code)
            self._forks = None
            self._forkserver.end(code, again=True)

    def _raise_start_error(self) -> None:
        """Raise what prevented the frontend's start, if that is why it has ended."""
        record = read_frontend(self._runtime_dir)
        if record is not None and record.error:
            raise UserError(record.error) if record.code == 2 else EngineFailure(record.error)

    def _all_ended(self) -> bool:
        return self._agent.pid == 0 and self._frontend.pid == 0

    def _close_listeners(self) -> None:
        """Refuse clients and nodes that still come."""
        for listener in (self._http, self._listener):
            if listener is not None:
                listener.close()

    def _pids(self) -> dict[int, str]:
        """The children that have not ended: pid -> name."""
        return {child.pid: child.name for child in (self._agent, self._frontend, self._forkserver) if child.pid}

    def _log_stopped(self, pid: int, what: str) -> None:
        logger.error("%s: killing it", what)
        self._stopped[pid] = what

    def _log_final_reason(self) -> None:
        """Log that the frontend (on other nodes the agent) was killed. Otherwise it has logged the final reason itself."""
        last = self._agent if self._flags.node_rank > 0 else self._frontend
        if last.code is not None and last.code < 0 and not (self._forwarded and last.code == -signal.SIGTERM):
            killed = (
                f"{last.name} (pid {last.killed_pid}) {exit_text(last.code)}; look at `dmesg` for a kernel that was out of memory"
            )
            logger.error("ended: %s", self._stopped.get(last.killed_pid, killed))

    def _is_ready(self) -> bool:
        scheme, _, address = self._url.partition("://")
        host, _, port = address.rpartition(":")
        connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=READY_POLL_S)
        if scheme == "https":  # our own socket, on this host: whose name the certificate has does not matter
            context = ssl._create_unverified_context()
            connection = http.client.HTTPSConnection(host.strip("[]"), int(port), timeout=READY_POLL_S, context=context)
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
            keyed = self._config.api_key is not None or self._config.api_key_file is not None
            sys.stdout.write(curl_line(self._url, keyed=keyed) + "\n")
            sys.stdout.flush()
        self._url = ""

    def _exit_code(self) -> int:
        """The frontend's exit code decides; on other nodes the agent's."""
        agent = self._agent.code
        frontend = agent if self._flags.node_rank > 0 else self._frontend.code
        if frontend == 0 or (self._forwarded and frontend == -signal.SIGTERM):
            return 0
        return 2 if 2 in (frontend, agent) else 1


def curl_line(url: str, keyed: bool) -> str:
    """A first request as a curl command. `keyed`: the server needs an API key."""
    key = ' -H "Authorization: Bearer $TPSERVE_API_KEY"' if keyed else ""
    body = """{"prompt": "Once upon a time", "max_tokens": 60}"""
    return f"curl {url}/v1/completions -H 'Content-Type: application/json'{key} -d '{body}'"
