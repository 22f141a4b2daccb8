"""How the agents of several nodes meet, and how they find each other again.

    node 0's agent loses a node      it says so, and lets the node in again at any time; how long the service waits is the
                                     coordinator's decision
    a node's agent loses node 0's    its ranks go on; it dials again, and ranks that it starts from then on get the address of
                                     the present store. It ends its ranks and itself when node 0 has ended (whose `tpserve serve`
                                     listens as long as it lives), or does not come back within `--recovery-timeout`

Before all nodes have met once, an error on one of them ends all.
"""

import logging
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tpserve.agent.job import AgentJob
from tpserve.cluster.discovery import AgentFailure, write_failure
from tpserve.cluster.node_monitor import JoinRequest, wait_head_exit
from tpserve.cluster.rendezvous import Rendezvous, join_rendezvous
from tpserve.errors import EngineFailure, UserError
from tpserve.host.network import host_id, listen
from tpserve.version import __version__

logger = logging.getLogger("tpserve.agent")

LEAVE_S = 1.0
"""How long ranks may outlive node 0, which ends after its own ranks."""


@dataclass
class Meeting:
    """The agents' store, which changes with node 0's agent. On node 0 `listener` is its socket. `first_rank`: of this node."""

    store: tuple[str, int]
    listener: socket.socket | None
    first_rank: int


def meet_nodes(job: AgentJob) -> Meeting:
    """Wait until all nodes are connected. Raises UserError or EngineFailure."""
    host = socket.gethostname()
    me = JoinRequest(job.node_rank, job.nnodes, job.nproc, __version__, host, host_id(), job.address, job.address_derived)
    key = bytes.fromhex(job.rendezvous_key)
    if job.node_rank > 0:
        again = job.restarts > 0  # the agent before was killed: node 0 was there, and may have ended since
        timeout_s = job.recovery_timeout_s if again else job.start_timeout_s
        where = job.master_addr, job.master_port
        info, connection = join_rendezvous(me, *where, job.world_size, timeout_s, key, again=again, began_s=job.began_s)
        meeting = Meeting((info.host, info.port), None, info.first_rank)
        follow = threading.Thread(
            target=_follow_head, args=(job, me, connection, meeting), name="connection to node 0", daemon=True
        )
        follow.start()
        return meeting
    rendezvous = None
    if job.nnodes > 1:
        listener = socket.socket(fileno=job.listener)
        rendezvous = Rendezvous(me, listener, job.world_size, job.start_timeout_s, key, job.began_s)
        rendezvous.wait_for_all()
    listener = listen(job.address, job.port_range)  # before its port is sent to the nodes
    port = listener.getsockname()[1]
    if rendezvous is not None:
        rendezvous.send_store(job.address, port)
        threading.Thread(target=rendezvous.serve, name="connections to the nodes", daemon=True).start()
    return Meeting((job.address, port), listener, 0)


def _follow_head(job: AgentJob, me: JoinRequest, connection: socket.socket, meeting: Meeting) -> None:
    """Keep in touch with node 0, and note where the agents' store is. When node 0 is gone for good, end this node."""
    while True:
        why = wait_head_exit(connection)
        connection.close()
        logger.warning("%s: waiting up to %g s for it", why.replace("node 0 has", "node 0's agent has"), job.recovery_timeout_s)
        try:
            info, connection = join_rendezvous(
                me, job.master_addr, job.master_port, job.world_size, job.recovery_timeout_s, bytes.fromhex(job.rendezvous_key),
                again=True,
            )  # fmt: skip
        except (UserError, EngineFailure) as error:
            _end(str(error))
        if info.first_rank != meeting.first_rank:
            _end(f"node 0 now counts this node's ranks from {info.first_rank}, before from {meeting.first_rank}")
        meeting.store = info.host, info.port
        logger.info("node 0's agent is back")


def _end(why: str) -> None:
    """End this process. The kernel kills the ranks that are still alive: stopped ones, or ones that Stop did not reach."""
    time.sleep(LEAVE_S)
    logger.error("%s: this node ends", why)
    os._exit(1)


def log_failure(job: AgentJob, why: str, advice: str = "") -> None:
    """Report why this node is about to end: on node 0 to the frontend, which logs the final reason; elsewhere in the log."""
    if job.node_rank == 0:
        write_failure(Path(job.runtime_dir), AgentFailure(1, why, advice))
    else:
        logger.error("%s", "; ".join(filter(None, (why, advice))))
