"""A rank's life up to its exit code: get the weights, form the mesh, load, measure memory, serve, leave.

Every rank runs this code. In addition rank 0 hosts the epoch's store, the scheduler and the plan broadcast, and the first rank of
a node downloads missing weights.
"""

import logging
import socket
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch._C._distributed_c10d import Store  # torch.distributed has it without its types

from tpserve.cluster.discovery import (
    FrontendAddress,
    find_frontend,
    find_remote_frontend,
    is_frontend_alive,
    publish_frontend,
    remove_runtime_dir,
)
from tpserve.config.engine_config import EngineConfig
from tpserve.config.env import RankEnv, user_set_interface
from tpserve.engine import connectivity, verify
from tpserve.engine.fingerprint import fingerprint, processor
from tpserve.engine.frames import check_frames
from tpserve.engine.loop import Engine
from tpserve.engine.rank_zero_sockets import RankZeroSockets
from tpserve.engine.watchdog import StepWatchdog
from tpserve.host.network import Interface, host_id
from tpserve.host.resources import available_cores, visible_gpus
from tpserve.hub import download
from tpserve.hub.locate import weights_of
from tpserve.observe.log import LogRingBuffer
from tpserve.observe.progress import ByteProgress
from tpserve.observe.start_timer import StartTimer
from tpserve.observe.trace import Trace
from tpserve.parallel import mesh as meshes
from tpserve.parallel.mesh import Mesh
from tpserve.parallel.split import split_heads
from tpserve.parallel.store import agent_store, join_store
from tpserve.process.exit_rules import ENDED_CODE
from tpserve.process.orders import EpochOver, Stopped
from tpserve.process.process_utils import kill_stopped, kill_stopped_in_background, live_children
from tpserve.process.rank_agent import STOP_WAIT_S, RankAgent
from tpserve.quant.int8 import check_available
from tpserve.scheduling.scheduler import Scheduler
from tpserve.scheduling.scheduler_config import SchedulerConfig
from tpserve.structured_output.compiler import vocabulary
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.messages import MemoryLedger, NodeInfo, Start
from tpserve.types.model_spec import ModelSpec
from tpserve.weights.checkpoint import weight_files
from tpserve.wire.channels import EngineLink, PlanReceiver, ResultSender
from tpserve.wire.curve import FRONTEND, CurveClient, rank_role
from tpserve.worker import device as devices
from tpserve.worker.grammars import CompiledGrammars
from tpserve.worker.loaded_model import LoadedModel
from tpserve.worker.loop import serve_plans
from tpserve.worker.model_runner import ModelRunner
from tpserve_kernels.compiling import on_compile

log = logging.getLogger(__name__)

LEAST_STEP_S, LEAST_STEP_ON_CPU_S = 60.0, 10.0
"""The shortest time after which a step counts as one that never ends. On CUDA a kernel may have to be compiled first."""


def run_rank(
    config: EngineConfig,
    spec: ModelSpec,
    env: RankEnv,
    interface: Interface,
    settings: dict[str, str],
    frontend_address: FrontendAddress | None,
    start_timer: StartTimer,
    log_buffer: LogRingBuffer,
) -> int:
    """Serve until the coordinator sends Stop. Returns the process's exit code.

    `interface`: this node's interface to other nodes. `settings`: the environment variables of NCCL and gloo that the user set.
    `frontend_address`: None on ranks of other nodes, which learn it over torchrun's store. `start_timer` has timed the process so
    far; `log_buffer` holds this process's log, for operators.
    """
    store = None
    if env.nnodes > 1 and (frontend_address is None or env.rank == 0):
        where, supervised = (env.master_addr, env.master_port, env.rank, env.use_agent_store), env.runtime_dir is not None
        store = agent_store(*where, config.start_timeout, listens=supervised)  # the agent has reached it
    if frontend_address is None:
        assert store is not None
        frontend_address = find_remote_frontend(env, store, interface.address, config.start_timeout, config.cluster_secret_file)
    elif store is not None:
        publish_frontend(env, frontend_address, store)
    node_address = None if user_set_interface(settings, config.all_reduce) else interface.address
    node = NodeInfo(env.node_rank, interface.address, host_id(), settings, visible_gpus())
    rank = _ServingRank(config, spec, env, node, node_address, start_timer)
    while True:
        code = _take_part(rank, frontend_address, log_buffer)
        if code is not None:
            return code
        if env.node_rank == 0:  # the frontend may be another one by now
            frontend_address = find_frontend(env, config, interface.address, config.recovery_timeout, start=False)
        start_timer.restart()


def _take_part(rank: "_ServingRank", frontend_address: FrontendAddress, log_buffer: LogRingBuffer) -> int | None:
    """Be one incarnation. Returns the process's exit code; None: be another one."""
    config, env = rank.config, rank.env
    returns = env.runtime_dir is not None and not env.job  # `tpserve serve` starts another frontend
    rank_agent = RankAgent(
        env.rank,
        frontend_address.control,
        host=socket.gethostname(),
        node=rank.node,
        curve_client=frontend_address.curve_client(env.rank, FRONTEND),
        frontend_pid=frontend_address.frontend_pid,
        agent_pid=env.agent_pid,
        # torchrun ends all ranks when one has died; but a rank is the only child of a torchrun script
        local_ranks=env.local_world_size if env.runtime_dir is None and not env.job else 1,
        on_failure=partial(_clean_up, env, frontend_address),
        failure_code=ENDED_CODE if env.runtime_dir is not None else 1,
        frontend_returns_s=config.recovery_timeout if returns else None,
    )
    rank_agent.report_log(log_buffer)
    log_buffer.on_error = rank_agent.wake
    rank_agent.start()
    if env.runtime_dir is None and not rank.took_part:
        _end_stopped_neighbours(env, frontend_address, rank_agent)
    rank.took_part = True
    try:
        rank.serve(rank_agent, frontend_address)
        rank_agent.raise_if_over()
    except Stopped:
        return rank_agent.leave()
    except EpochOver as over:
        log.debug("rank %d leaves its epoch: %s", env.rank, over)
    except BaseException as error:  # the end of the process: report any error to the coordinator first
        log.debug("rank %d fails", env.rank, exc_info=True)
        return rank_agent.fail(error)
    rank_agent.close()
    return None


def _end_stopped_neighbours(env: RankEnv, frontend_address: FrontendAddress, rank_agent: RankAgent) -> None:
    """Kill the agent or the frontend when it is stopped (SIGSTOP). Under bare torchrun only: `tpserve serve` does it itself."""
    neighbours = {env.agent_pid: "torchrun"}
    if frontend_address.frontend_pid is not None:
        neighbours[frontend_address.frontend_pid] = "the frontend"

    def report(pid: int, what: str) -> None:
        log.error("%s: it is ended", what)
        if pid == env.agent_pid:  # this rank dies with the agent, so it reports first and gives the frontend time to answer
            rank_agent.report_fault(what)
            time.sleep(STOP_WAIT_S)

    kill_stopped_in_background(lambda: neighbours, report)


def _clean_up(env: RankEnv, frontend_address: FrontendAddress) -> None:
    """Under bare torchrun, after a failure: kill stopped processes of this node, since torchrun would wait for them, and remove
    the runtime directory of a dead frontend."""
    if env.runtime_dir is None:
        kill_stopped([env.agent_pid, *(live_children(env.agent_pid) or ())])
        if frontend_address.runtime_dir is not None and not is_frontend_alive(frontend_address.runtime_dir):
            remove_runtime_dir(frontend_address.runtime_dir)


class _ServingRank:
    """The phases of a rank's life in order; each phase needs the result of the one before."""

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        env: RankEnv,
        node: NodeInfo,
        node_address: str | None,
        start_timer: StartTimer,
    ) -> None:
        """`node_address`: this node's address for gloo and NCCL; None when the user chose their interface."""
        self.config = config
        self.env = env
        self.node = node
        self.took_part = False
        self._spec = spec
        self._node_address = node_address
        self._start_timer = start_timer
        self._trace = Trace(config.step_trace, env.rank)
        self._device = torch.device("cpu")
        self._model: LoadedModel | None = None
        self._fingerprint: dict[str, str] = {}
        self._traits: dict[str, str] = {}
        self._rank_agent: RankAgent
        self._frontend_address: FrontendAddress

    def serve(self, rank_agent: RankAgent, frontend_address: FrontendAddress) -> None:
        """Join an epoch and run it to its end. Raises Stopped or EpochOver when Stop or Leave arrives before Run."""
        self._rank_agent, self._frontend_address = rank_agent, frontend_address
        if self._model is None:
            self._model = self._prepare()
        with ExitStack() as epoch:
            hosted = RankZeroSockets.open(frontend_address, self.config) if self.env.rank == 0 else None
            if hosted is not None:
                epoch.callback(hosted.close)
            self._run_epoch(self._model, hosted, epoch)

    def _prepare(self) -> LoadedModel:
        """What comes before the first Hello: look at the device, get the weights."""
        config, env, start_timer = self.config, self.env, self._start_timer
        check_frames(config, self._spec.vocab_size, len(self._spec.windows))
        self._device = devices.choose(config.device, env.local_rank, env.local_world_size)
        if config.quantization is not None:
            check_available()
        if config.binding and (bound := devices.bind(self._device)):
            log.info("rank %d %s", env.rank, bound)
        start_timer.mark("device")
        compiled = self._compiled_grammars()  # its thread reads the tokenizer meanwhile
        self._ensure_weights()  # before Hello, while the coordinator sees this rank's progress
        start_timer.mark("download")
        stage_facts, self._traits = processor(self._device, config.dtype, self._spec)
        self._fingerprint = fingerprint(config, self._spec)
        if compiled is not None:  # building it may delay heartbeats, which nobody expects before Hello
            self._report_progress("reading the tokenizer", 0)
            compiled.wait_for_vocabulary()
            start_timer.mark("tokenizer")
        return LoadedModel(config, self._spec, env, stage_facts, self._fingerprint, compiled, self._report_progress)

    def _compiled_grammars(self) -> CompiledGrammars | None:
        """On ranks of the last stage, which sample; a thread begins to read the tokenizer."""
        config, spec = self.config, self._spec
        if config.layout.stage_of(self.env.rank) < config.layout.pp - 1:
            return None
        return CompiledGrammars(lambda: vocabulary(Tokenizer.load(config.tokenizer), spec.vocab_size, spec.eos_ids))

    def _report_progress(self, phase: str, percent: int) -> None:
        """To the coordinator, by the present incarnation."""
        self._rank_agent.report_progress(phase, percent)

    def _run_epoch(self, model: LoadedModel, hosted: RankZeroSockets | None, epoch: ExitStack) -> None:
        """Say Hello, form the mesh, load what is missing, and run plans. `epoch` closes what belongs to it."""
        config, rank_agent, env, start_timer = self.config, self._rank_agent, self.env, self._start_timer
        rank_agent.report_progress("waiting for all ranks", 0)
        rank_agent.hello(
            hosted.endpoints if hosted else {},
            self._fingerprint,
            self._traits,
            config.layout.stage_of(env.rank),
            model.processor,
            model.ledger,
            env.last_exit if start_timer.first else "",
        )
        start = rank_agent.wait_start()
        start_timer.mark("all ranks")
        rank_agent.report_progress("forming the mesh", 5)
        free = devices.free_memory(self._device)  # before the mesh forms, so no rank has loaded anything
        mesh = self._form_mesh(start, hosted)
        epoch.callback(meshes.destroy_distributed, mesh)
        plans = None
        if hosted is None:
            plans = PlanReceiver(self._endpoint(start, "plan"), start.epoch, self._leader_key)
            epoch.callback(plans.close)
        start_timer.mark("mesh")
        if self._device.type == "cuda":
            on_compile(rank_agent.report_busy)
        model_runner = model.join(mesh, start.ledger, free, start_timer)
        self._count_experts(model, mesh)
        assert model.ledger is not None
        facts = {"max_model_len": model.ledger.max_model_len, "vocab_size": self._spec.vocab_size, **self._heads()}
        rank_agent.ready(model.ledger, facts, model.numerics)
        number = rank_agent.wait_run()
        if hosted:
            start_timer.mark("other ranks")
            log.info(start_timer.line())
            self._lead(hosted, model_runner, model.ledger, number, epoch)
        else:
            assert plans is not None
            results = None
            if env.rank == config.layout.sampling_rank:
                results = ResultSender(self._endpoint(start, "result"), self._leader_key)
                epoch.callback(results.close)
            serve_plans(plans, model_runner, results, rank_agent, self._trace)

    def _form_mesh(self, start: Start, hosted: RankZeroSockets | None) -> Mesh:
        """The groups of the epoch. PeerLost when another rank is lost meanwhile."""
        config, env, rank_agent = self.config, self.env, self._rank_agent
        store = hosted.store if hosted else join_store(start.endpoints["store"])
        if env.nnodes > 1:
            remote = [address for name, address in hosted.endpoints.items() if name.endswith("-tcp")] if hosted else []
            connectivity.check_connectivity(env.rank, env.world_size, self._node_address, store, config.start_timeout, remote)
        if config.verify_weights and start.ledger is None:
            self._verify_weights(store)
            self._start_timer.mark("verify")
        mesh = meshes.init_distributed(
            env.rank,
            config.layout,
            start.epoch,
            store,
            self._device,
            config.start_timeout,
            config.all_reduce,
            available_cores(),
            lambda: rank_agent.over,
        )
        if (agreed := devices.agree_on_isa(self._device, mesh.tp)) and self._start_timer.first:
            log.info("rank %d %s", env.rank, agreed)
        return mesh

    def _count_experts(self, model: LoadedModel, mesh: Mesh) -> None:
        """Let the first rank of a stage, whose ranks have equal counts, report the tokens routed to each expert."""
        assert model.decoder is not None
        if (expert_load := model.decoder.expert_load) is not None and mesh.tp.rank == 0:
            expert_load.clear()
            self._rank_agent.report_expert_load(expert_load.layers, expert_load.read)

    def _ensure_weights(self) -> None:
        """For a repository: local rank 0 downloads the weights that the cache lacks, the other ranks wait for it."""
        snapshot, env = self.config.snapshot, self.env
        if snapshot is None:
            return
        title = f"downloading {snapshot.repository}"
        first = env.local_rank == 0
        with ByteProgress(title, visible=first) as progress:

            def on_progress(done: int, total: int) -> None:
                progress.update(done, total)
                self._rank_agent.report_progress(title, 100 * done // max(total, 1))

            fetch = download.download if first else download.wait_for_download
            fetch(weights_of(snapshot), self.config.start_timeout, on_progress)

    def _verify_weights(self, store: Store) -> None:
        """Compare the weight files of all nodes, byte by byte."""
        config, env = self.config, self.env
        if env.nnodes == 1 or config.load_format == "dummy":
            log.info("--verify-weights: one node or --load-format dummy, so nothing to compare")
            return
        title = "verifying weights"
        directory = Path(config.model)
        names = weight_files(directory, only_safetensors=config.load_format == "safetensors")
        with ByteProgress(title, visible=env.local_rank == 0) as progress:

            def on_progress(done: int, total: int) -> None:
                progress.update(done, total)
                self._rank_agent.report_progress(title, 5)

            verify.check(env, directory, names, store, max(1, available_cores() // env.local_world_size), on_progress)

    def _endpoint(self, start: Start, name: str) -> str:
        """Rank 0's endpoint `name` as this rank reaches it."""
        return start.endpoints[name if self._leader_key is None else f"{name}-tcp"]

    @property
    def _leader_key(self) -> CurveClient | None:
        """The CURVE key for rank 0's TCP sockets; None on rank 0's node."""
        return self._frontend_address.curve_client(self.env.rank, rank_role(0))

    def _heads(self) -> dict[str, int]:
        """This rank's share of the attention heads, for Ready."""
        layout = self.config.layout
        share = split_heads(self._spec.num_heads, self._spec.num_kv_heads, layout.tp)[layout.tp_rank_of(self.env.rank)]
        q, kv = share.q, share.kv
        return {"first_head": q.start, "end_head": q.stop, "first_kv_head": kv.start, "end_kv_head": kv.stop}

    def _lead(
        self, hosted: RankZeroSockets, model_runner: ModelRunner, ledger: MemoryLedger, number: int, epoch: ExitStack
    ) -> None:
        """Rank 0: serve requests with the engine loop until the epoch `number` is over, or until Stop."""
        config, layout = self.config, self.config.layout
        scheduler_config = SchedulerConfig(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=ledger.max_model_len,
            num_blocks=ledger.num_blocks,
            block_size=config.block_size,
            depth=2 if layout.pp == 1 else layout.pp + 1,
            sync_sampling=layout.pp > 1,
            eos_ids=self._spec.eos_ids,
            windows=self._spec.windows,
            prefix_caching=config.enable_prefix_caching,
            vocab_size=self._spec.vocab_size,
        )
        hosted.plans.begin(number, layout.world_size - 1, config.start_timeout, lambda: self._rank_agent.over)
        hosted.results.begin(number)
        link = EngineLink(self._frontend_address.engine, self._rank_agent.identity)
        epoch.callback(link.close)
        self._rank_agent.run_periodically(hosted.plans.resend_missed)
        results = None if layout.sampling_rank == 0 else hosted.results
        least_s = LEAST_STEP_S if self._device.type == "cuda" else LEAST_STEP_ON_CPU_S
        watchdog = StepWatchdog(config.start_timeout, least_s)
        scheduler = Scheduler(scheduler_config, number)
        Engine(scheduler, model_runner, link, hosted.plans, results, self._rank_agent, self._trace, watchdog).run()
