"""A rank's life up to its exit code: get the weights, form the mesh, load, measure memory, serve, leave.

Every rank runs this code. In addition rank 0 hosts the epoch's store, the scheduler and the plan broadcast, and the first rank of
a node downloads missing weights.
"""

import logging
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch._C._distributed_c10d import Store  # torch.distributed has it without its types

from tpserve.cluster.discovery import (
    FrontendAddress,
    find_remote_frontend,
    is_frontend_alive,
    publish_frontend,
    remove_runtime_dir,
)
from tpserve.config import generation_config
from tpserve.config.env import RankEnv, cache_dir, user_set_interface
from tpserve.config.schema import EngineConfig
from tpserve.engine import connectivity, verify
from tpserve.engine.fingerprint import fingerprint, processor
from tpserve.engine.frames import check_frames
from tpserve.engine.loop import Engine
from tpserve.engine.rank_zero_sockets import RankZeroSockets
from tpserve.engine.watchdog import StepWatchdog
from tpserve.host.network import Interface, host_id
from tpserve.host.resources import available_cores, cpu_model, visible_gpus
from tpserve.hub import download
from tpserve.hub.locate import weights_of
from tpserve.models import names_of
from tpserve.models.decoder import Decoder
from tpserve.models.whole_model import sources
from tpserve.observe.log import LogRingBuffer
from tpserve.observe.progress import ByteProgress
from tpserve.observe.start_timer import StartTimer
from tpserve.observe.trace import Trace
from tpserve.parallel import mesh as meshes
from tpserve.parallel.mesh import Mesh
from tpserve.parallel.split import imbalance, split_heads
from tpserve.parallel.store import agent_store, join_store
from tpserve.process.orders import Stopped
from tpserve.process.process_utils import kill_stopped, kill_stopped_in_background, live_children
from tpserve.process.rank_agent import STOP_WAIT_S, RankAgent
from tpserve.quant.int8 import check_available
from tpserve.scheduling.scheduler import Scheduler
from tpserve.scheduling.scheduler_config import SchedulerConfig
from tpserve.structured_output.compiler import vocabulary
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.messages import MemoryLedger, NodeInfo, Numerics, Start
from tpserve.types.model_spec import ModelSpec
from tpserve.weights import dummy
from tpserve.weights.checkpoint import Checkpoint, weight_files
from tpserve.weights.load import Loader
from tpserve.weights.parameter import Parameter
from tpserve.weights.unused_weights import checkpoint_notes
from tpserve.wire.channels import EngineLink, PlanReceiver, ResultSender
from tpserve.wire.curve import FRONTEND, CurveClient, rank_role
from tpserve.worker import device as devices
from tpserve.worker.grammars import CompiledGrammars
from tpserve.worker.loop import serve_plans
from tpserve.worker.memory import allocate, check_weights, measure, room_for
from tpserve.worker.model_runner import ModelRunner
from tpserve.worker.request_pool import RequestPool
from tpserve.worker.self_test import self_test
from tpserve.worker.sizing import report
from tpserve_kernels.compiling import on_compile

log = logging.getLogger(__name__)


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
        store = agent_store(env.master_addr, env.master_port, env.rank, env.use_agent_store, config.start_timeout)
    if frontend_address is None:
        assert store is not None
        frontend_address = find_remote_frontend(env, store, interface.address, config.start_timeout, config.cluster_secret_file)
    elif store is not None:
        publish_frontend(env, frontend_address, store)
    rank_agent = RankAgent(
        env.rank,
        frontend_address.control,
        host=socket.gethostname(),
        node=NodeInfo(env.node_rank, interface.address, host_id(), settings, visible_gpus()),
        curve_client=frontend_address.curve_client(env.rank, FRONTEND),
        frontend_pid=frontend_address.frontend_pid,
        agent_pid=env.agent_pid,
        local_ranks=1 if env.job else env.local_world_size,  # the rank is the only child of a torchrun script
        on_failure=partial(_clean_up, env, frontend_address),
    )
    rank_agent.report_log(log_buffer)
    log_buffer.on_error = rank_agent.wake
    rank_agent.start()
    if env.runtime_dir is None:
        _end_stopped_neighbours(env, frontend_address, rank_agent)
    try:
        node_address = None if user_set_interface(settings, config.all_reduce) else interface.address
        _ServingRank(config, spec, env, frontend_address, rank_agent, start_timer, node_address).serve()
    except Stopped:
        pass
    except BaseException as error:  # the end of the process: report any error to the coordinator first
        log.debug("rank %d fails", env.rank, exc_info=True)
        return rank_agent.fail(error)
    return rank_agent.leave()


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
        frontend_address: FrontendAddress,
        rank_agent: RankAgent,
        start_timer: StartTimer,
        node_address: str | None,
    ) -> None:
        """`node_address`: this node's address for gloo and NCCL; None when the user chose their interface."""
        self._config = config
        self._spec = spec
        self._env = env
        self._frontend_address = frontend_address
        self._rank_agent = rank_agent
        self._start_timer = start_timer
        self._node_address = node_address
        self._trace = Trace(config.step_trace, env.rank)

    def serve(self) -> None:
        """Join an epoch and run it to its end. Raises Stopped when a Stop arrives before Run."""
        config, rank_agent, env, start_timer = self._config, self._rank_agent, self._env, self._start_timer
        check_frames(config, self._spec.vocab_size, len(self._spec.windows))
        device = devices.choose(config.device, env.local_rank, env.local_world_size)
        if config.quantization is not None:
            check_available()
        if config.binding and (bound := devices.bind(device)):
            log.info("rank %d %s", env.rank, bound)
        start_timer.mark("device")
        self._ensure_weights()  # before Hello, while the coordinator sees this rank's progress
        start_timer.mark("download")
        hosted = RankZeroSockets.open(self._frontend_address, config) if env.rank == 0 else None
        stage, (self._processor, traits) = config.layout.stage_of(env.rank), processor(device, config.dtype, self._spec)
        rank_agent.report_progress("waiting for all ranks", 0)
        rank_agent.hello(hosted.endpoints if hosted else {}, fingerprint(config, self._spec), traits, stage, self._processor)
        start = rank_agent.wait_start()
        start_timer.mark("all ranks")
        rank_agent.report_progress("forming the mesh", 5)
        free = devices.free_memory(device)  # before the mesh forms, so no rank has loaded anything
        store = hosted.store if hosted else join_store(start.endpoints["store"])
        if env.nnodes > 1:
            remote = [address for name, address in hosted.endpoints.items() if name.endswith("-tcp")] if hosted else []
            connectivity.check_connectivity(env.rank, env.world_size, self._node_address, store, config.start_timeout, remote)
        if config.verify_weights:
            self._verify_weights(store)
            start_timer.mark("verify")
        mesh = meshes.init_distributed(
            env.rank, config.layout, start.epoch, store, device, config.start_timeout, config.all_reduce, available_cores()
        )
        if agreed := devices.agree_on_isa(device, mesh.tp):
            log.info("rank %d %s", env.rank, agreed)
        plans = None if hosted else PlanReceiver(self._endpoint(start, "plan"), start.epoch, self._leader_key)
        start_timer.mark("mesh")
        if device.type == "cuda":
            on_compile(rank_agent.report_busy)
        model_runner, ledger, numerics = self._build(mesh, free)
        facts = {"max_model_len": ledger.max_model_len, "vocab_size": self._spec.vocab_size, **self._heads()}
        rank_agent.ready(ledger, facts, numerics)
        epoch = rank_agent.wait_run()
        if hosted:
            start_timer.mark("other ranks")
            log.info(start_timer.line())
            self._lead(hosted, model_runner, ledger, epoch)
        else:
            assert plans is not None
            sampling = env.rank == config.layout.sampling_rank
            results = ResultSender(self._endpoint(start, "result"), self._leader_key) if sampling else None
            serve_plans(plans, model_runner, results, rank_agent, self._trace)

    def _build(self, mesh: Mesh, free: int) -> tuple[ModelRunner, MemoryLedger, Numerics | None]:
        """Load this rank's shard, measure memory, allocate the KV cache. `free`: free bytes before any rank loads."""
        config, env, start_timer = self._config, self._env, self._start_timer
        compiled = self._compiled_grammars()  # its thread reads the tokenizer meanwhile
        check_weights(mesh, self._spec, config, env.local_world_size, free)
        with self._room_for("loading the model", mesh):
            decoder, weights = self._load(mesh)
        start_timer.mark("load")
        if env.rank == 0 and decoder.device.type == "cpu":
            log.info(f"the layers run as {decoder.form}")
        numerics = self._self_test(decoder)
        start_timer.mark("self-test")
        self._rank_agent.report_progress("measuring memory", 90)
        make_pool = partial(self._request_pool, mesh.device, compiled)
        with self._room_for("measuring the largest steps", mesh):
            kv_config, ledgers = measure(decoder, mesh, make_pool, config, env.local_world_size, weights)
        with self._room_for("making room for the KV cache", mesh):
            request_pool = make_pool(kv_config.max_model_len)
            caches = allocate(decoder, mesh, kv_config.num_blocks, config.block_size)
        start_timer.mark("measure")
        if env.rank == 0:
            for line in report(ledgers, kv_config, self._spec, config):
                log.info(line)
            if (defaults := generation_config.log_line(config.sampling_defaults)) is not None:
                log.info(defaults)
        if (expert_load := decoder.expert_load) is not None and mesh.tp.rank == 0:  # the other ranks of a stage have equal counts
            expert_load.clear()
            self._rank_agent.report_expert_load(expert_load.layers, expert_load.read)
        return ModelRunner(mesh, decoder, request_pool, caches), ledgers[env.rank], numerics

    def _compiled_grammars(self) -> CompiledGrammars | None:
        """On ranks of the last stage, which sample; a thread begins to read the tokenizer."""
        config, spec = self._config, self._spec
        if config.layout.stage_of(self._env.rank) < config.layout.pp - 1:
            return None
        return CompiledGrammars(lambda: vocabulary(Tokenizer.load(config.tokenizer), spec.vocab_size, spec.eos_ids))

    def _self_test(self, decoder: Decoder) -> Numerics | None:
        """Test batch invariance of this processor's matrix products; None on CUDA, which does not promise it."""
        if decoder.device.type != "cpu":
            return None
        machine, kernels = [cpu_model(), *self._processor.values()], devices.kernels_id(decoder.device)
        return self_test(decoder.products(), machine, cache_dir(), kernels)

    def _ensure_weights(self) -> None:
        """For a repository: local rank 0 downloads the weights that the cache lacks, the other ranks wait for it."""
        snapshot, env = self._config.snapshot, self._env
        if snapshot is None:
            return
        title = f"downloading {snapshot.repository}"
        first = env.local_rank == 0
        with ByteProgress(title, visible=first) as progress:

            def on_progress(done: int, total: int) -> None:
                progress.update(done, total)
                self._rank_agent.report_progress(title, 100 * done // max(total, 1))

            fetch = download.download if first else download.wait_for_download
            fetch(weights_of(snapshot), self._config.start_timeout, on_progress)

    def _verify_weights(self, store: Store) -> None:
        """Compare the weight files of all nodes, byte by byte."""
        config, env = self._config, self._env
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
        return self._frontend_address.curve_client(self._env.rank, rank_role(0))

    def _load(self, mesh: Mesh) -> tuple[Decoder, int]:
        """This rank's shard of the model, and its size in bytes."""
        config, env = self._config, self._env
        layout = config.layout
        stage = layout.stage_of(env.rank)
        dtype: torch.dtype = getattr(torch, config.dtype)
        kv_int8 = config.kv_cache_dtype == "int8"
        decoder = Decoder(self._spec, layout, stage, mesh.tp, dtype, mesh.device, config.max_model_len, kv_int8)
        if env.rank == 0:
            shares = split_heads(self._spec.num_heads, self._spec.num_kv_heads, layout.tp)
            if (uneven := imbalance([share.q for share in shares], "heads")) is not None:
                log.info(uneven)
        with ByteProgress("loading weights", visible=env.rank == 0) as progress:

            def on_progress(done: int, total: int) -> None:
                progress.update(done, total)
                self._rank_agent.report_progress("loading weights", 10 + 80 * done // max(total, 1))

            self._rank_agent.report_progress("loading weights", 10)
            fill: Callable[[Parameter], None] = partial(dummy.fill, seed=config.seed)
            if config.load_format != "dummy":
                only_safetensors = config.load_format == "safetensors"
                checkpoint = Checkpoint.open(config.model, names_of(self._spec), only_safetensors=only_safetensors)
                if env.rank == 0:
                    for line in checkpoint_notes(sources(self._spec), checkpoint, self._spec.num_layers, config.dtype):
                        log.info(line)
                fill = Loader(decoder.parameters(), checkpoint, on_progress).fill
            return decoder, decoder.prepack(config.quantization, fill)

    def _heads(self) -> dict[str, int]:
        """This rank's share of the attention heads, for Ready."""
        layout = self._config.layout
        share = split_heads(self._spec.num_heads, self._spec.num_kv_heads, layout.tp)[layout.tp_rank_of(self._env.rank)]
        q, kv = share.q, share.kv
        return {"first_head": q.start, "end_head": q.stop, "first_kv_head": kv.start, "end_kv_head": kv.stop}

    def _room_for(self, what: str, mesh: Mesh) -> AbstractContextManager[None]:
        return room_for(what, mesh, self._spec, self._config, self._env.local_world_size)

    def _request_pool(self, device: torch.device, compiled: CompiledGrammars | None, max_len: int) -> RequestPool:
        config = self._config
        return RequestPool(
            config.max_num_seqs,
            max_len,
            config.block_size,
            self._spec.windows,
            device,
            eos_ids=self._spec.eos_ids,
            vocab_size=self._spec.vocab_size,
            compiled=compiled,
        )

    def _lead(self, hosted: RankZeroSockets, model_runner: ModelRunner, ledger: MemoryLedger, epoch: int) -> None:
        """Rank 0: serve requests with the engine loop until Stop."""
        config, layout = self._config, self._config.layout
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
        link = EngineLink(self._frontend_address.engine, self._rank_agent.identity)
        hosted.plans.begin(epoch, layout.world_size - 1, config.start_timeout)
        hosted.results.begin(epoch)
        self._rank_agent.run_periodically(hosted.plans.resend_missed)
        results = None if layout.sampling_rank == 0 else hosted.results
        watchdog = StepWatchdog(first_s=config.start_timeout)
        scheduler = Scheduler(scheduler_config, epoch)
        Engine(scheduler, model_runner, link, hosted.plans, results, self._rank_agent, self._trace, watchdog).run()
