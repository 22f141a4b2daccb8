"""How the ranks of an `LLM` come to be: all of them through an agent, or under torchrun one by each script.

Owns what differs between the two: flags resolved for the machine, the runtime directory's name, the child's command line and
environment, and how the scripts of other nodes find rank 0's. Never waits for a rank.
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

from tpserve.agent import AGENT_COMMAND, AgentJob
from tpserve.cli import server_flags
from tpserve.cluster.discovery import runtime_dir
from tpserve.config import env
from tpserve.config.env import RankEnv
from tpserve.config.resolve import num_local_ranks, resolve
from tpserve.config.schema import EngineConfig, Flags
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

FIND_S = 0.1


class LocalLauncher:
    """A plain script or a notebook: an agent below it starts the ranks, as under `tpserve serve`."""

    remote: str | None = None
    num_followers = 0

    def __init__(self, said: Flags) -> None:
        self._said = said
        self.where = Path(tempfile.gettempdir(), f"tpserve-{os.getuid()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")

    @cached_property
    def _resolved(self) -> tuple[Flags, EngineConfig]:
        flags, files, spec = load_model_config(self._said, lambda flags: locate(flags, head=True))
        num_gpus = visible_gpus()
        nproc = num_local_ranks(flags, num_gpus)
        return flags, resolve(flags, files, spec, Machine(nproc, nproc, 1, num_gpus, available_cores(), "LLM"))

    def config(self) -> EngineConfig:
        """UserError for what can be refused before a process is started."""
        return self._resolved[1]

    def start(self) -> EngineProcess:
        """Start the agent."""
        flags, config = self._resolved
        job = AgentJob(
            supervisor_pid=os.getpid(),
            nproc=config.layout.world_size,
            world_size=config.layout.world_size,
            start_timeout_s=config.start_timeout,
            runtime_dir=str(self.where),
            log_level=config.log_level,
            argv=server_flags.to_argv(flags),
        )
        environ = env.for_ranks(str(self.where), quiet=config.log_level != "debug")
        return EngineProcess(list(AGENT_COMMAND), environ, msgspec.json.encode(job))

    def publish(self, connect_info: ConnectInfo | None) -> None:
        """Nobody else looks for us."""


class TorchrunLauncher:
    """One of the scripts of `torchrun script.py`. `job` names this LLM among those that the scripts make."""

    def __init__(self, me: RankEnv, job: str, said: Flags) -> None:
        self._me = me
        self._job = job
        self._said = said
        self.where = runtime_dir(me).with_name(f"{runtime_dir(me).name}-{job}")
        self.remote = choose_interface(said.interface, me.nnodes, me.master_addr).address if me.nnodes > 1 else None
        self.num_followers = me.world_size - 1

    @cached_property
    def _resolved(self) -> tuple[Flags, EngineConfig]:
        me = self._me
        flags, files, spec = load_model_config(self._said, lambda flags: locate(flags, head=me.rank == 0))
        machine = Machine(me.world_size, me.local_world_size, me.nnodes, visible_gpus(), available_cores(), "script")
        return flags, resolve(flags, files, spec, machine)

    def config(self) -> EngineConfig:
        """UserError for what can be refused before a process is started."""
        return self._resolved[1]

    def start(self) -> EngineProcess:
        """Start the rank in the script's own place."""
        flags, config = self._resolved
        environ = env.for_rank(str(self.where), self._job, quiet=config.log_level != "debug")
        return EngineProcess([sys.executable, "-m", "tpserve", *server_flags.to_argv(flags)], environ)

    def publish(self, connect_info: ConnectInfo | None) -> None:
        """Rank 0's script: tell those of other nodes where it is."""
        if connect_info is not None:
            self._store.set(self._key, msgspec.json.encode(connect_info).decode())

    def find(self) -> tuple[str, CurveClient | None]:
        """Another script: where rank 0's is. EngineFailure when it does not tell in time, UserError when the secrets differ."""
        if self._me.node_rank == 0:
            return f"ipc://{self.where}/callers", None
        deadline_s = time.monotonic() + self._said.start_timeout
        while time.monotonic() < deadline_s:
            try:
                if self._store.check([self._key]):
                    connect_info = msgspec.json.decode(self._store.get(self._key), type=ConnectInfo)
                    keyring = connect_info.accept(self._said.cluster_secret_file)
                    return connect_info.endpoint, keyring.curve_client(self._me.rank, FRONTEND)
            except RuntimeError as error:
                raise EngineFailure(f"torchrun's store on node 0 is gone: {error}") from error
            time.sleep(FIND_S)
        raise EngineFailure(f"rank 0's script made no LLM within {self._said.start_timeout:g} s")

    @property
    def _key(self) -> str:
        return f"tpserve/callers/{self._job}"

    @cached_property
    def _store(self) -> "Store":
        """torchrun's own, as ranks of other nodes use it: only to learn an address. Kept, for rank 0's script may host it."""
        from tpserve.parallel.store import agent_store  # imports torch, which is needed with several nodes only

        me = self._me
        return agent_store(me.master_addr, me.master_port, me.rank, me.use_agent_store, self._said.start_timeout)
