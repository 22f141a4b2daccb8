"""torch's elastic agent, in a subclass whose ranks come from a forkserver and are started again one by one.

What stays torch's: its store, the rendezvous, the loop that watches the group, and what ranks find in their environment. What
differs: a rank that died is started again alone, its siblings go on; node 0 has told each node its first rank, so no rank is
assigned over the store; nobody waits at the end for nodes that may be gone. Works with torch 2.11 and later. Importing this
module loads torch.
"""

import os
import signal
from collections.abc import Callable
from typing import Any

from torch._C._distributed_c10d import Store  # torch.distributed has it without its types
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from tpserve.agent.job import AgentJob
from tpserve.agent.rank_processes import RankProcess, RankProcesses

STOP_S = 2.5
"""How long ranks may take to end after one of them has failed. The coordinator has told them as well."""
_POLL_S = 1.0


class MetNodes(StaticTCPRendezvous):
    """A rendezvous whose nodes have already met: it only provides the store."""

    def __init__(self, job: AgentJob, host: str, port: int, store: Store) -> None:
        """`host`, `port`: the address of `store`, for the ranks."""
        super().__init__(host, port, job.node_rank, job.nnodes, job.run_id, int(job.start_timeout_s) + 1)
        self._store = store

    def get_backend(self) -> str:
        """Its name in torch's log."""
        return "tpserve"


class RestartingAgent(LocalElasticAgent):
    """The agent of one node."""

    def __init__(
        self,
        job: AgentJob,
        rendezvous: MetNodes,
        first_rank: int,
        make_processes: Callable[[dict[int, dict[str, str]]], RankProcesses],
    ) -> None:
        """`first_rank`: of this node. `make_processes` gets torch's variables for each rank of this node, by its local rank."""
        spec = WorkerSpec("default", job.nproc, rendezvous, entrypoint=job.module, max_restarts=0, monitor_interval=0.001)
        super().__init__(spec, DefaultLogsSpecs(log_dir=os.devnull))  # no log files: ranks inherit stdout and stderr
        self._job = job
        self._first_rank = first_rank
        self._make_processes = make_processes
        self._processes: RankProcesses | None = None

    def _assign_worker_ranks(self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec) -> list[Worker]:
        """The ranks of this node, without the other nodes: they may have started long ago."""
        world_size, first = self._job.world_size, self._first_rank
        return [Worker(local, first + local, first + local, world_size, world_size) for local in range(spec.local_world_size)]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        """Start all ranks. The worker ids are process ids."""
        variables = {worker.local_rank: self._variables(worker_group, worker) for worker in worker_group.workers}
        self._processes = self._make_processes(variables)
        self._processes.start()
        return {local_rank: rank.pid for local_rank, rank in enumerate(self._processes.ranks)}

    def _variables(self, group: WorkerGroup, worker: Worker) -> dict[str, str]:
        """What torch's agent sets for a rank, besides LOCAL_RANK, whose owner is torch, and the count of restarts."""
        spec = group.spec
        variables: dict[str, str | None] = {
            "RANK": str(worker.global_rank),
            "GROUP_RANK": str(group.group_rank),
            "ROLE_RANK": str(worker.role_rank),
            "ROLE_NAME": spec.role,
            "LOCAL_WORLD_SIZE": str(spec.local_world_size),
            "WORLD_SIZE": str(worker.world_size),
            "GROUP_WORLD_SIZE": str(group.group_world_size),
            "ROLE_WORLD_SIZE": str(worker.role_world_size),
            "MASTER_ADDR": str(group.master_addr),
            "MASTER_PORT": str(group.master_port),
            "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
            "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
        }
        self._set_local_rank_env(variables, worker.local_rank, spec)
        return {name: text for name, text in variables.items() if text is not None}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Wait for something to happen; start again what died. Never UNHEALTHY."""
        processes = self._processes
        assert processes is not None
        processes.poll(_POLL_S)
        for worker, rank in zip(worker_group.workers, processes.ranks, strict=True):
            worker.id = rank.pid
        if processes.result is None:
            return RunResult(WorkerState.HEALTHY)
        if processes.result == 0:
            return RunResult(WorkerState.SUCCEEDED, return_values={worker.global_rank: 0 for worker in worker_group.workers})
        return RunResult(
            WorkerState.FAILED, failures={rank.rank: self._failure(rank) for rank in processes.ranks if rank.exit_code}
        )

    def _failure(self, rank: RankProcess) -> ProcessFailure:
        return ProcessFailure(rank.rank - self._first_rank, rank.pid, rank.exit_code or 0, "")

    def _stop_workers(self, worker_group: WorkerGroup, *arguments: Any, **more: Any) -> None:
        """End all ranks. Versions of torch differ in the other arguments."""
        self._shutdown()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *arguments: Any, **more: Any) -> None:
        """End all ranks; what is left after `STOP_S` is killed. Versions of torch differ in the other arguments."""
        if self._processes is not None:
            self._processes.stop(death_sig, STOP_S)

    def _exit_barrier(self) -> None:
        """Do not wait for other nodes."""
