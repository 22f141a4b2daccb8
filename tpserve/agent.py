"""The child of `tpserve serve` that runs torchrun's elastic agent in-process: it starts this node's ranks and watches them.

Started as `python -m tpserve.agent` with a `AgentJob` as JSON on stdin. Owns the ranks' lives and nothing else. It dies with the
supervisor, and its ranks die with it; it ends ranks, and a supervisor, that were stopped. Unlike torchrun it reports nothing of
its own but a rank's violent death, and on SIGTERM it asks its ranks to end, without a limit of 30 s: who has the last word is
the supervisor.
Exit codes: 0 all ranks ended well, 2 a rank met something the user can mend, 1 anything else.
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
"""How long ranks may outlive node 0's agent, which ends after its own ranks, and this agent its ranks."""
FOLLOW_S = 2.5
"""How long ranks of node 0 may outlive another node's agent: all are told at once that it is over, and have two seconds."""
LOOK_AT = "see the last lines of its log, and `dmesg` there for a kernel that was out of memory"
LOOK_BETWEEN = "look at that node and the network between them"


AGENT_COMMAND = (sys.executable, "-m", "tpserve.agent")
"""How an agent is started; it reads its `AgentJob` from stdin."""


class AgentJob(Struct, frozen=True, kw_only=True):
    """What to start. `argv`: the ranks' command line after `python -m tpserve`. Unless it says so, on this node alone."""

    supervisor_pid: int
    mutual: bool = False
    """The supervisor, too, is ended when it was stopped; a script or a command at somebody's terminal is not"""
    nnodes: int = 1
    node_rank: int = 0
    nproc: int
    master_addr: str = LOOPBACK
    master_port: int = 0
    listener: int = -1
    """On node 0 of several, the descriptor of the socket to which the other nodes come; else -1."""
    address: str = LOOPBACK
    """This node's, for other nodes; `derived` from the route to the master"""
    derived: bool = True
    rendezvous_key: str = ""
    """Of the cluster's secret, where there is a file of it, in hexadecimal"""
    port_range: tuple[int, int] = (0, 0)
    world_size: int
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    start_timeout_s: float
    runtime_dir: str
    log_level: str
    argv: list[str]


def main() -> int:
    """Run the ranks to their end."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=AgentJob)
    signal.signal(signal.SIGTERM, _ask_ranks_to_end)
    die_with(job.supervisor_pid)
    env.announce_agent()
    log.setup(job.log_level, f"n{job.node_rank} agent", color=env.color(sys.stderr))
    _end_stopped_neighbours(job)
    try:
        met = _find_nodes(job)
        disable_dns()  # torch's store and agent look names up, only to log them
    except (UserError, EngineFailure) as error:
        return _refuse(job, error)
    return _run(job, met)


class _RendezvousResult(NamedTuple):
    """Where the agents' store is, on node 0 also the socket it is to listen with, and what the other nodes hold on to."""

    store: RendezvousInfo
    listener: socket.socket | None
    rendezvous: Rendezvous | None


def _find_nodes(job: AgentJob) -> _RendezvousResult:
    """Wait for the other nodes."""
    host = socket.gethostname()
    me = JoinRequest(job.node_rank, job.nnodes, job.nproc, __version__, host, host_id(), job.address, job.derived)
    key = bytes.fromhex(job.rendezvous_key)
    if job.node_rank > 0:
        store, line = join_rendezvous(me, job.master_addr, job.master_port, job.world_size, job.start_timeout_s, key)
        threading.Thread(target=_end_with_head, args=(line,), name="line to node 0", daemon=True).start()
        return _RendezvousResult(store, None, None)
    rendezvous = None
    if job.nnodes > 1:
        rendezvous = Rendezvous(me, socket.socket(fileno=job.listener), job.world_size, job.start_timeout_s, key)
        rendezvous.wait_for_all()
    listener = listen(job.address, job.port_range)  # before its port is told
    store = RendezvousInfo(job.address, listener.getsockname()[1])
    if rendezvous is not None:
        rendezvous.send_store(store.host, store.port)
        threading.Thread(target=_end_with_nodes, args=(job, rendezvous), name="lines to the nodes", daemon=True).start()
    return _RendezvousResult(store, listener, rendezvous)


def _end_with_head(line: socket.socket) -> None:
    """Node 0 decides when all is over; a rank that does not hear of it, being stopped or cut off, is ended here."""
    why = wait_head_exit(line)
    time.sleep(LEAVE_S)
    logger.error("%s: ending the ranks of this node", why)
    for pid in live_children(os.getpid()) or ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    time.sleep(LEAVE_S)  # for the main thread to say what became of them, if it waits for ranks already
    os._exit(1)


def _end_with_nodes(job: AgentJob, rendezvous: Rendezvous) -> None:
    """The coordinator knows the ranks that have said Hello; a node that is lost before its ranks have is missed here."""
    end = wait_node_exit(rendezvous.joined)
    if not end.lost:
        time.sleep(FOLLOW_S)
    _fail(job, f"{end.who} {end.why}", LOOK_BETWEEN if end.lost else LOOK_AT)
    os._exit(1)


def _end_stopped_neighbours(job: AgentJob) -> None:
    """The ranks, and the supervisor, which looks after this process."""
    supervisor = {job.supervisor_pid: f"`tpserve serve` of node {job.node_rank}"} if job.mutual else {}

    def tell(pid: int, what: str) -> None:
        if pid == job.supervisor_pid:
            _fail(job, what, "SIGSTOP or Ctrl-Z does that: a server in the background is `... &`")
        else:
            logger.error("%s: it is ended", what)

    kill_stopped_in_background(lambda: supervisor | dict.fromkeys(live_children(os.getpid()) or (), "a rank"), tell)


def _fail(job: AgentJob, why: str, advice: str = "") -> None:
    """Tell why this node is about to end: on node 0 the frontend has the last word."""
    if job.node_rank == 0:
        write_failure(Path(job.runtime_dir), AgentFailure(1, why, advice))
    else:
        logger.error("%s", "; ".join(filter(None, (why, advice))))


def _refuse(job: AgentJob, error: UserError | EngineFailure) -> int:
    """Tell why there are no ranks: on node 0 through the frontend, which has the last word there and clients to answer."""
    code = 2 if isinstance(error, UserError) else 1
    if job.node_rank == 0:
        write_failure(Path(job.runtime_dir), AgentFailure(code, str(error)))
    elif code == 2:
        sys.stderr.write(log.user_error(str(error)) + "\n")
    else:
        logger.error("%s", error)
    return code


def _run(job: AgentJob, met: _RendezvousResult) -> int:
    gc.disable()  # nothing that torch makes while it is imported is garbage, and looking for it costs a sixth of the time
    from torch._C._distributed_c10d import TCPStore  # torch.distributed has it without its types
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters, rendezvous_handler_registry
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    gc.enable()
    if job.log_level != "debug":
        _quiet_loggers("torch.distributed.elastic", "torch.distributed.launcher")

    class ListeningRendezvous(StaticTCPRendezvous):
        """What is left of a rendezvous is the store."""

        def get_backend(self) -> str:
            return "tpserve"

    def hold(parameters: RendezvousParameters) -> RendezvousHandler:
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

    rendezvous_handler_registry.register("tpserve", hold)
    config = LaunchConfig(
        min_nodes=job.nnodes,
        max_nodes=job.nnodes,
        nproc_per_node=job.nproc,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # no files: ranks write to this process's stdout and stderr
        run_id=job.run_id,
        rdzv_backend="tpserve",
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGUSR2",  # none that is ever sent: SIGTERM is ours
    )
    try:
        elastic_launch(config, sys.executable)("-m", "tpserve", *job.argv)
    except ChildFailedError as failed:
        killed = {rank: failure for rank, failure in failed.failures.items() if failure.exitcode < 0}
        first = {rank: failure for rank, failure in killed.items() if failure.exitcode != -signal.SIGTERM}
        for rank, failure in (first or killed).items():  # torch ends the others, because of it, by SIGTERM
            why = f"rank {rank} (pid {failure.pid}) was killed by {signal.Signals(-failure.exitcode).name}"
            logger.warning("%s", why)
            if job.node_rank == 0:  # who died before its Hello is not known to the coordinator
                write_failure(Path(job.runtime_dir), AgentFailure(1, why, LOOK_AT))
        if job.node_rank == 0 and not killed:  # what a rank could say of it, it has said, and the first reason counts
            rank, failure = next(iter(failed.failures.items()))
            why = f"rank {rank} (pid {failure.pid}) ended with exit code {failure.exitcode}"
            write_failure(Path(job.runtime_dir), AgentFailure(failure.exitcode, why, "see what it logged"))
        return 2 if any(failure.exitcode == 2 for failure in failed.failures.values()) else 1
    except Exception as error:  # the edge of a process: torch names the store's troubles in many ways
        logger.error("the ranks of this node could not be started: %s", error, exc_info=job.log_level == "debug")
        return 1
    return 0


def _quiet_loggers(*names: str) -> None:
    """No reports of torch's own: each of its modules sets its own logger's level, so levels above them do not reach."""
    for name, existing in list(logging.Logger.manager.loggerDict.items()):
        if name.startswith(names) and isinstance(existing, logging.Logger):
            existing.setLevel(logging.CRITICAL + 1)


def _ask_ranks_to_end(number: int, frame: FrameType | None) -> None:
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
    os._exit(code)  # taking torch down takes seconds
