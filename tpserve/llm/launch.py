"""Launchers of the ranks of an `LLM`: one agent starts all of them, or under torchrun each script starts one.

Owns what differs between the two: the flags resolved for the machine, the name of the runtime directory, the child's command line
and environment, and how the scripts of other nodes find the script of rank 0. Never waits for a rank.
"""

import os
import sys
import tempfile
import time
import uuid
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tpserve.agent.job import AGENT_COMMAND, AgentJob
from tpserve.cli import server_flags
from tpserve.cluster.discovery import runtime_dir
from tpserve.config import env
from tpserve.config.engine_config import EngineConfig
from tpserve.config.env import RankEnv
from tpserve.config.flags import Flags
from tpserve.config.resolve import num_local_ranks, resolve
from tpserve.errors import EngineFailure
from tpserve.host.network import choose_interface
from tpserve.host.resources import available_cores, visible_gpus
from tpserve.hub.locate import locate
from tpserve.llm.engine_process import EngineProcess
from tpserve.models.load_config import load_model_config
from tpserve.types.machine import Machine
from tpserve.wire.curve import FRONTEND, ConnectInfo, CurveClient

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

FIND_POLL_S = 0.1
"""Interval at which a script looks in the store for the address of rank 0's script."""


class LocalLauncher:
    """For a plain script or a notebook: a child process, the agent, starts the ranks as under `tpserve serve`."""

    remote: str | None = None
    num_followers = 0
    restarts = True
    """The agent starts a dead rank again."""

    def __init__(self, flags: Flags) -> None:
        self._flags = flags
        self.runtime_dir = Path(tempfile.gettempdir(), f"tpserve-{os.getuid()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")

    @cached_property
    def _resolved(self) -> tuple[Flags, EngineConfig]:
        flags, files, spec = load_model_config(self._flags, lambda flags: locate(flags, head=True))
        num_gpus = visible_gpus()
        nproc = num_local_ranks(flags, num_gpus)
        return flags, resolve(flags, files, spec, Machine(nproc, nproc, 1, num_gpus, available_cores(), "LLM"))

    def config(self) -> EngineConfig:
        """The resolved configuration. Raises UserError for what can be refused before a process is started."""
        return self._resolved[1]

    def start(self) -> EngineProcess:
        """Start the agent."""
        flags, config = self._resolved
        job = AgentJob(
            supervisor_pid=os.getpid(),
            nproc=config.layout.world_size,
            world_size=config.layout.world_size,
            start_timeout_s=config.start_timeout,
            runtime_dir=str(self.runtime_dir),
            log_level=config.log_level,
            argv=server_flags.to_argv(flags),
        )
        environ = env.for_ranks(str(self.runtime_dir), quiet=config.log_level != "debug")
        return EngineProcess(list(AGENT_COMMAND), environ, msgspec.json.encode(job))

    def publish(self, connect_info: ConnectInfo | None) -> None:
        """Does nothing: no other script looks for this one."""


class TorchrunLauncher:
    """For one of the scripts of `torchrun script.py`. `job` names this LLM among those that the scripts make."""

    restarts = False
    """Each script has one rank and ends with it."""

    def __init__(self, rank_env: RankEnv, job: str, flags: Flags) -> None:
        self._rank_env = rank_env
        self._job = job
        self._flags = flags
        directory = runtime_dir(rank_env)
        self.runtime_dir = directory.with_name(f"{directory.name}-{job}")
        several_nodes = rank_env.nnodes > 1
        self.remote = choose_interface(flags.interface, rank_env.nnodes, rank_env.master_addr).address if several_nodes else None
        self.num_followers = rank_env.world_size - 1

    @cached_property
    def _resolved(self) -> tuple[Flags, EngineConfig]:
        me = self._rank_env
        flags, files, spec = load_model_config(self._flags, lambda flags: locate(flags, head=me.rank == 0))
        machine = Machine(me.world_size, me.local_world_size, me.nnodes, visible_gpus(), available_cores(), "script")
        return flags, resolve(flags, files, spec, machine)

    def config(self) -> EngineConfig:
        """The resolved configuration. Raises UserError for what can be refused before a process is started."""
        return self._resolved[1]

    def start(self) -> EngineProcess:
        """Start the rank of this script."""
        flags, config = self._resolved
        environ = env.for_rank(str(self.runtime_dir), self._job, quiet=config.log_level != "debug")
        return EngineProcess([sys.executable, "-m", "tpserve", *server_flags.to_argv(flags)], environ)

    def publish(self, connect_info: ConnectInfo | None) -> None:
        """Rank 0's script: publish its address to the scripts of other nodes."""
        if connect_info is not None:
            self._store.set(self._key, msgspec.json.encode(connect_info).decode())

    def find(self) -> tuple[str, CurveClient | None]:
        """Another script: returns the address of rank 0's script.

        Raises EngineFailure when rank 0's script does not publish it in time, and UserError when the cluster secrets differ.
        """
        if self._rank_env.node_rank == 0:
            return f"ipc://{self.runtime_dir}/callers", None
        deadline_s = time.monotonic() + self._flags.start_timeout
        while time.monotonic() < deadline_s:
            try:
                if self._store.check([self._key]):
                    connect_info = msgspec.json.decode(self._store.get(self._key), type=ConnectInfo)
                    keyring = connect_info.keyring(self._flags.cluster_secret_file)
                    return connect_info.endpoint, keyring.curve_client(self._rank_env.rank, FRONTEND)
            except RuntimeError as error:
                raise EngineFailure(f"torchrun's store on node 0 is gone: {error}") from error
            time.sleep(FIND_POLL_S)
        raise EngineFailure(f"rank 0's script made no LLM within {self._flags.start_timeout:g} s")

    @property
    def _key(self) -> str:
        return f"tpserve/callers/{self._job}"

    @cached_property
    def _store(self) -> "Store":
        """torchrun's store, used only to exchange an address. The object stays open, for rank 0's script may host the store."""
        from tpserve.parallel.store import agent_store  # imports torch, which is needed with several nodes only

        me = self._rank_env
        return agent_store(me.master_addr, me.master_port, me.rank, me.use_agent_store, self._flags.start_timeout)
