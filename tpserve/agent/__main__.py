"""The agent of one node: it starts this node's ranks, watches them, and starts a rank again that died.

Forked by a forkserver (`tpserve serve`) or run as `python -m tpserve.agent` (an `LLM`, `tpserve doctor`), with an `AgentJob` as
JSON on stdin. Owns the lifetime of the ranks, and a forkserver of its own, which it forks before its first thread. It dies with
the supervisor, and its ranks die with it. It kills ranks, and a supervisor, that were stopped by SIGSTOP.

Exit codes: 0 the ranks have drained, 2 a rank met an error that the user can fix, 1 anything else.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType

import msgspec

from tpserve.agent.job import AgentJob
from tpserve.agent.nodes import Meeting, log_failure, meet_nodes
from tpserve.agent.rank_processes import RankProcess, RankProcesses, rank_name
from tpserve.cluster.discovery import AgentFailure, clear_failure, write_failure
from tpserve.config import env
from tpserve.errors import EngineFailure, UserError
from tpserve.forkserver import fork_here, preload
from tpserve.host.network import disable_dns
from tpserve.observe import log
from tpserve.process.fork_client import FIRST_DESCRIPTOR, ForkClient, ForkRequest, adopt_orphans
from tpserve.process.process_utils import die_with, end_all_children, exit_text, kill_stopped_in_background

logger = logging.getLogger("tpserve.agent")


def main(arguments: Sequence[str] = ()) -> int:
    """Run the ranks until they end; returns the exit code."""
    with open(0, "rb", closefd=False) as stdin:
        job = msgspec.json.decode(stdin.read(), type=AgentJob)
    die_with(job.supervisor_pid)
    env.announce_agent()
    log.setup(job.log_level, f"n{job.node_rank} agent", color=env.color(sys.stderr))
    preload()  # done already in a process that a forkserver has forked
    forkserver = fork_here()
    adopt_orphans()
    node = _Node(job, forkserver)
    signal.signal(signal.SIGTERM, node.on_terminate)
    kill_stopped_in_background(node.pids, partial(_report_stopped, job))
    try:
        meeting = meet_nodes(job)
        disable_dns()  # torch's store and agent look names up only to log them
    except (UserError, EngineFailure) as error:
        return _report_start_error(job, error)
    try:
        return node.run(meeting)
    except Exception as error:  # the edge of the process: torch raises many types for store errors
        logger.error("the ranks of this node could not be started: %s", error, exc_info=job.log_level == "debug")
        return 1
    finally:
        end_all_children()


class _Node:
    """The ranks of this node under torch's agent."""

    def __init__(self, job: AgentJob, forkserver: ForkClient) -> None:
        self._job = job
        self._forkserver = forkserver
        self._processes: RankProcesses | None = None

    def run(self, meeting: Meeting) -> int:
        """Run torch's elastic agent until all ranks have ended; returns the exit code."""
        from torch._C._distributed_c10d import TCPStore  # torch.distributed exports it without types

        from tpserve.agent.elastic_agent import MetNodes, RestartingAgent

        job = self._job
        if job.log_level != "debug":
            _quiet_loggers("torch.distributed.elastic", "torch.distributed.launcher")
        listener, timeout = meeting.listener, timedelta(seconds=int(job.start_timeout_s) + 1)
        descriptor = None if listener is None else listener.detach()
        host, port = meeting.store
        store = TCPStore(host, port, job.nnodes, listener is not None, timeout, False, master_listen_fd=descriptor)
        make_processes = partial(self._make_processes, meeting)
        RestartingAgent(job, MetNodes(job, host, port, store), meeting.first_rank, make_processes).run()
        assert self._processes is not None
        code = self._processes.result
        if code != 0:
            self._report_failure()
        return 1 if code is None else code

    def _make_processes(self, meeting: Meeting, variables: dict[int, dict[str, str]]) -> RankProcesses:
        job = self._job

        def make_request(rank: RankProcess) -> ForkRequest:
            restarts = job.restarts + rank.restarts
            if restarts and job.node_rank == 0:
                clear_failure(Path(job.runtime_dir))  # that of the process before
            host, port = meeting.store  # another one when node 0's agent was replaced
            own = variables[rank.rank - first] | {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
            weights_socket = FIRST_DESCRIPTOR if job.restart else None
            configuration = FIRST_DESCRIPTOR + 1 if job.configuration >= 0 else None
            environ = env.of_rank(own, restarts, rank.last_exit, weights_socket, configuration)
            return ForkRequest.of(job.module, job.argv, environ, rank_name(rank.rank))

        first = int(variables[0]["RANK"])
        ranks = [RankProcess(first + local_rank, last_exit=job.last_exit) for local_rank in variables]
        shared = [job.configuration] if job.configuration >= 0 else []
        new_forkserver = partial(ForkClient.spawn, env.of_agent(), job.argv)
        self._processes = RankProcesses(self._forkserver, new_forkserver, make_request, ranks, job.restart, shared)
        return self._processes

    def _report_failure(self) -> None:
        """On node 0 leave the reason for the frontend. The rank has reported more if it could, and the first reason counts."""
        assert self._processes is not None
        rank = next(rank for rank in self._processes.ranks if rank.exit_code)
        assert rank.exit_code is not None
        why = f"rank {rank.rank} {exit_text(rank.exit_code)}"
        if self._job.node_rank == 0:
            write_failure(Path(self._job.runtime_dir), AgentFailure(2 if rank.exit_code == 2 else 1, why, "see what it logged"))

    def pids(self) -> dict[int, str]:
        """The processes that may not be stopped: pid -> name."""
        job = self._job
        supervisor = {job.supervisor_pid: f"`tpserve serve` of node {job.node_rank}"} if job.monitor_supervisor else {}
        return supervisor | ({self._forkserver.pid: "the forkserver"} if self._processes is None else self._processes.pids())

    def on_terminate(self, number: int, frame: FrameType | None) -> None:
        """Forward SIGTERM to the ranks; without any, exit."""
        if self._processes is None or not self._processes.terminate():
            os._exit(0)


def _report_stopped(job: AgentJob, pid: int, what: str) -> None:
    if pid == job.supervisor_pid:
        log_failure(job, what, "SIGSTOP or Ctrl-Z does that: a server in the background is `... &`")
    else:
        logger.error("%s: killing it", what)


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


def _quiet_loggers(*names: str) -> None:
    """Silence torch's loggers. Each of its modules sets its own level, so the level of a parent logger has no effect."""
    for name, existing in list(logging.Logger.manager.loggerDict.items()):
        if name.startswith(names) and isinstance(existing, logging.Logger):
            existing.setLevel(logging.CRITICAL + 1)


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)  # shutting torch down takes seconds
