"""The child of `tpserve serve` that runs torchrun's elastic agent in-process: it starts this node's ranks and watches them.

Started as `python -m tpserve.agent` with an `AgentJob` as JSON on stdin. Owns only the lifetime of the ranks. It dies with the
supervisor, and its ranks die with it. It kills ranks, and a supervisor, that were stopped by SIGSTOP. It differs from torchrun in
two ways: it logs only when a rank was killed, and SIGTERM has no limit of 30 s, since the supervisor enforces the deadline.

Exit codes: 0 all ranks succeeded, 2 a rank met an error that the user can fix, 1 anything else.
"""

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import msgspec
from msgspec import Struct, field

from tpserve.cluster.discovery import AgentFailure, write_failure
from tpserve.cluster.node_monitor import JoinRequest, wait_head_exit, wait_node_exit
from tpserve.cluster.rendezvous import Rendezvous, RendezvousInfo, join_rendezvous
from tpserve.config import env
from tpserve.errors import EngineFailure, UserError
from tpserve.host.network import LOOPBACK, disable_dns, host_id, listen
from tpserve.observe import log
from tpserve.process.process_utils import die_with, kill_stopped_in_background, live_children
from tpserve.version import __version__

logger = logging.getLogger("tpserve.agent")

LEAVE_S = 1.0
"""How long ranks may outlive node 0's agent (which ends after its own ranks), and then how long this agent outlives its ranks."""
FOLLOW_S = 2.5
"""How long ranks of node 0 may outlive another node's agent. All ranks get Stop at the same time and have two seconds to exit."""
ADVICE_KILLED = "see the last lines of its log, and `dmesg` there for a kernel that was out of memory"
ADVICE_LOST = "look at that node and the network between them"


AGENT_COMMAND = (sys.executable, "-m", "tpserve.agent")
"""The command of the agent, which reads its `AgentJob` from stdin."""


class AgentJob(Struct, frozen=True, kw_only=True):
    """What to start; the defaults are those of a single node. `argv`: the ranks' command line after `python -m tpserve`."""

    supervisor_pid: int
    monitor_supervisor: bool = False
    """Also kill the supervisor when it is stopped. Not set for a script or a command at a terminal."""
    nnodes: int = 1
    node_rank: int = 0
    nproc: int
    master_addr: str = LOOPBACK
    master_port: int = 0
    listener: int = -1
    """On node 0 of several, the descriptor of the socket to which the other nodes connect; else -1."""
    address: str = LOOPBACK
    """This node's address, as other nodes use it."""
    address_derived: bool = True
    """The address comes from the route to the master, not from --interface."""
    rendezvous_key: str = ""
    """Key derived from the cluster's secret file, in hexadecimal; empty without a file."""
    port_range: tuple[int, int] = (0, 0)
    world_size: int
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    start_timeout_s: float
    runtime_dir: str
    log_level: str
    argv: list[str]


def main() -> int:
    """Run the ranks until they end; returns the exit code."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=AgentJob)
    signal.signal(signal.SIGTERM, _terminate_ranks)
    die_with(job.supervisor_pid)
    env.announce_agent()
    log.setup(job.log_level, f"n{job.node_rank} agent", color=env.color(sys.stderr))
    _kill_stopped_processes(job)
    try:
        met = _meet_nodes(job)
        disable_dns()  # torch's store and agent look names up only to log them
    except (UserError, EngineFailure) as error:
        return _report_start_error(job, error)
    return _run_ranks(job, met)


class _RendezvousResult(NamedTuple):
    """The address of the agents' TCPStore; on node 0 also its listening socket and the connections to the other nodes."""

    store: RendezvousInfo
    listener: socket.socket | None
    rendezvous: Rendezvous | None


def _meet_nodes(job: AgentJob) -> _RendezvousResult:
    """Wait until all nodes are connected. Raises UserError or EngineFailure."""
    host = socket.gethostname()
    me = JoinRequest(job.node_rank, job.nnodes, job.nproc, __version__, host, host_id(), job.address, job.address_derived)
    key = bytes.fromhex(job.rendezvous_key)
    if job.node_rank > 0:
        store, connection = join_rendezvous(me, job.master_addr, job.master_port, job.world_size, job.start_timeout_s, key)
        threading.Thread(target=_exit_with_head, args=(connection,), name="connection to node 0", daemon=True).start()
        return _RendezvousResult(store, None, None)
    rendezvous = None
    if job.nnodes > 1:
        rendezvous = Rendezvous(me, socket.socket(fileno=job.listener), job.world_size, job.start_timeout_s, key)
        rendezvous.wait_for_all()
    listener = listen(job.address, job.port_range)  # before its port is sent to the nodes
    store = RendezvousInfo(job.address, listener.getsockname()[1])
    if rendezvous is not None:
        rendezvous.send_store(store.host, store.port)
        threading.Thread(target=_exit_with_nodes, args=(job, rendezvous), name="connections to the nodes", daemon=True).start()
    return _RendezvousResult(store, listener, rendezvous)


def _exit_with_head(connection: socket.socket) -> None:
    """Wait until node 0 ends, then kill the ranks that are still alive: stopped ones, or ones that Stop did not reach."""
    why = wait_head_exit(connection)
    time.sleep(LEAVE_S)
    logger.error("%s: killing the ranks of this node", why)
    for pid in live_children(os.getpid()) or ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    time.sleep(LEAVE_S)  # gives the main thread time to log how the ranks ended
    os._exit(1)


def _exit_with_nodes(job: AgentJob, rendezvous: Rendezvous) -> None:
    """Fail when another node ends. The coordinator monitors only ranks that have sent Hello; this covers the time before."""
    end = wait_node_exit(rendezvous.joined)
    if not end.lost:
        time.sleep(FOLLOW_S)
    _fail(job, f"{end.who} {end.why}", ADVICE_LOST if end.lost else ADVICE_KILLED)
    os._exit(1)


def _kill_stopped_processes(job: AgentJob) -> None:
    """Kill, in the background, ranks that are stopped by a signal, and a stopped supervisor if the job says so."""
    supervisor = {job.supervisor_pid: f"`tpserve serve` of node {job.node_rank}"} if job.monitor_supervisor else {}

    def report(pid: int, what: str) -> None:
        if pid == job.supervisor_pid:
            _fail(job, what, "SIGSTOP or Ctrl-Z does that: a server in the background is `... &`")
        else:
            logger.error("%s: killing it", what)

    kill_stopped_in_background(lambda: supervisor | dict.fromkeys(live_children(os.getpid()) or (), "a rank"), report)


def _fail(job: AgentJob, why: str, advice: str = "") -> None:
    """Report why this node is about to end: on node 0 to the frontend, which logs the final reason; elsewhere in the log."""
    if job.node_rank == 0:
        write_failure(Path(job.runtime_dir), AgentFailure(1, why, advice))
    else:
        logger.error("%s", "; ".join(filter(None, (why, advice))))


def _report_start_error(job: AgentJob, error: UserError | EngineFailure) -> int:
    """Report why no rank starts: on node 0 to the frontend, elsewhere on stderr or in the log. Returns the exit code."""
    code = 2 if isinstance(error, UserError) else 1
    if job.node_rank == 0:
        write_failure(Path(job.runtime_dir), AgentFailure(code, str(error)))
    elif code == 2:
        sys.stderr.write(log.user_error(str(error)) + "\n")
    else:
        logger.error("%s", error)
    return code


def _run_ranks(job: AgentJob, met: _RendezvousResult) -> int:
    """Run torch's elastic agent until all ranks have ended; returns the exit code."""
    gc.disable()  # importing torch makes no garbage, and collections take a sixth of the import time
    from torch._C._distributed_c10d import TCPStore  # torch.distributed exports it without types
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters, rendezvous_handler_registry
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    gc.enable()
    if job.log_level != "debug":
        _quiet_loggers("torch.distributed.elastic", "torch.distributed.launcher")

    class ListeningRendezvous(StaticTCPRendezvous):
        """A rendezvous whose nodes have already met: it only provides the store."""

        def get_backend(self) -> str:
            return "tpserve"

    def make_handler(parameters: RendezvousParameters) -> RendezvousHandler:
        where, listener, timeout_s = met.store, met.listener, int(job.start_timeout_s) + 1
        handler = ListeningRendezvous(where.host, where.port, job.node_rank, job.nnodes, job.run_id, timeout_s)
        handler._store = TCPStore(
            where.host,
            where.port,
            job.nnodes,
            listener is not None,
            timedelta(seconds=timeout_s),
            master_listen_fd=None if listener is None else listener.detach(),
        )
        return handler

    rendezvous_handler_registry.register("tpserve", make_handler)
    config = LaunchConfig(
        min_nodes=job.nnodes,
        max_nodes=job.nnodes,
        nproc_per_node=job.nproc,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # no log files: ranks inherit stdout and stderr
        run_id=job.run_id,
        rdzv_backend="tpserve",
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGUSR2",  # never sent, so that torch leaves SIGTERM to `_terminate_ranks`
    )
    try:
        elastic_launch(config, sys.executable)("-m", "tpserve", *job.argv)
    except ChildFailedError as failed:
        killed = {rank: failure for rank, failure in failed.failures.items() if failure.exitcode < 0}
        first = {rank: failure for rank, failure in killed.items() if failure.exitcode != -signal.SIGTERM}
        for rank, failure in (first or killed).items():  # torch then ends the others by SIGTERM
            why = f"rank {rank} (pid {failure.pid}) was killed by {signal.Signals(-failure.exitcode).name}"
            logger.warning("%s", why)
            if job.node_rank == 0:  # the coordinator does not know a rank that died before its Hello
                write_failure(Path(job.runtime_dir), AgentFailure(1, why, ADVICE_KILLED))
        if job.node_rank == 0 and not killed:  # the rank has reported more if it could, and the first reason counts
            rank, failure = next(iter(failed.failures.items()))
            why = f"rank {rank} (pid {failure.pid}) ended with exit code {failure.exitcode}"
            write_failure(Path(job.runtime_dir), AgentFailure(failure.exitcode, why, "see what it logged"))
        return 2 if any(failure.exitcode == 2 for failure in failed.failures.values()) else 1
    except Exception as error:  # the edge of the process: torch raises many types for store errors
        logger.error("the ranks of this node could not be started: %s", error, exc_info=job.log_level == "debug")
        return 1
    return 0


def _quiet_loggers(*names: str) -> None:
    """Silence torch's loggers. Each of its modules sets its own level, so the level of a parent logger has no effect."""
    for name, existing in list(logging.Logger.manager.loggerDict.items()):
        if name.startswith(names) and isinstance(existing, logging.Logger):
            existing.setLevel(logging.CRITICAL + 1)


def _terminate_ranks(number: int, frame: FrameType | None) -> None:
    """Forward SIGTERM to the ranks; without any, exit."""
    children = [int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    if not children:
        os._exit(0)


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)  # shutting torch down takes seconds
