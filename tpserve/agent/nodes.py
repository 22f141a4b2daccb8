"""How the agents of several nodes meet, and what one does when another is gone."""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import NamedTuple

from tpserve.agent.job import AgentJob
from tpserve.cluster.discovery import AgentFailure, write_failure
from tpserve.cluster.node_monitor import JoinRequest, wait_head_exit, wait_node_exit
from tpserve.cluster.rendezvous import Rendezvous, join_rendezvous
from tpserve.host.network import host_id, listen
from tpserve.process.process_utils import live_children
from tpserve.version import __version__

logger = logging.getLogger("tpserve.agent")

LEAVE_S = 1.0
"""How long ranks may outlive node 0's agent (which ends after its own ranks), and then how long this agent outlives its ranks."""
FOLLOW_S = 2.5
"""How long ranks of node 0 may outlive another node's agent. All ranks get Stop at the same time and have two seconds to exit."""
ADVICE_KILLED = "see the last lines of its log, and `dmesg` there for a kernel that was out of memory"
ADVICE_LOST = "look at that node and the network between them"


class MeetingResult(NamedTuple):
    """The address of the agents' store, on node 0 its listening socket, and this node's first rank."""

    host: str
    port: int
    listener: socket.socket | None
    first_rank: int


def meet_nodes(job: AgentJob) -> MeetingResult:
    """Wait until all nodes are connected. Raises UserError or EngineFailure."""
    host = socket.gethostname()
    me = JoinRequest(job.node_rank, job.nnodes, job.nproc, __version__, host, host_id(), job.address, job.address_derived)
    key = bytes.fromhex(job.rendezvous_key)
    if job.node_rank > 0:
        store, connection = join_rendezvous(me, job.master_addr, job.master_port, job.world_size, job.start_timeout_s, key)
        threading.Thread(target=_exit_with_head, args=(connection,), name="connection to node 0", daemon=True).start()
        return MeetingResult(store.host, store.port, None, store.first_rank)
    rendezvous = None
    if job.nnodes > 1:
        rendezvous = Rendezvous(me, socket.socket(fileno=job.listener), job.world_size, job.start_timeout_s, key)
        rendezvous.wait_for_all()
    listener = listen(job.address, job.port_range)  # before its port is sent to the nodes
    port = listener.getsockname()[1]
    if rendezvous is not None:
        rendezvous.send_store(job.address, port)
        threading.Thread(target=_exit_with_nodes, args=(job, rendezvous), name="connections to the nodes", daemon=True).start()
    return MeetingResult(job.address, port, listener, 0)


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
    log_failure(job, f"{end.who} {end.why}", ADVICE_LOST if end.lost else ADVICE_KILLED)
    os._exit(1)


def log_failure(job: AgentJob, why: str, advice: str = "") -> None:
    """Report why this node is about to end: on node 0 to the frontend, which logs the final reason; elsewhere in the log."""
    if job.node_rank == 0:
        write_failure(Path(job.runtime_dir), AgentFailure(1, why, advice))
    else:
        logger.error("%s", "; ".join(filter(None, (why, advice))))
