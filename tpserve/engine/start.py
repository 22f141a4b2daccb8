"""A rank's life, from its hello to its exit code: have the weights, form the mesh, load, measure, run, leave.

Every rank runs this; what differs is that rank 0 hosts the epoch's store, the scheduler and the plan broadcast, and that the
first rank of a node downloads the weights that its node lacks.
"""

import logging
import socket
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch._C._distributed_c10d import Store  # torch.distributed has it without its types

from tpserve.cluster.discovery import FrontendAddress, find_remote_frontend, is_alive, publish_frontend, remove_runtime_dir
from tpserve.config import generation_config
from tpserve.config.env import RankEnv, cache_dir, user_set_interface
from tpserve.config.schema import EngineConfig
from tpserve.engine import connectivity, verify
from tpserve.engine.fingerprint import fingerprint, processor, traits
from tpserve.engine.frames import check_frames
from tpserve.engine.loop import Engine
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
from tpserve.parallel.store import agent_store, host_store, join_store
from tpserve.process.orders import Stopped
from tpserve.process.process_utils import kill_stopped, kill_stopped_in_background, live_children
from tpserve.process.rank_agent import VERDICT_S, RankAgent
from tpserve.scheduling.scheduler import Scheduler
from tpserve.scheduling.scheduler_config import SchedulerConfig
from tpserve.types.messages import MemoryLedger, NodeInfo, Numerics, Start
from tpserve.types.model_spec import ModelSpec
from tpserve.weights.checkpoint import Checkpoint, weight_files
from tpserve.weights.dummy import dummy
from tpserve.weights.load import load
from tpserve.weights.unused_weights import checkpoint_notes
from tpserve.wire.channels import EngineLink, PlanBroadcaster, PlanReceiver, ResultReceiver, ResultSender, TcpEndpoint, tcp
from tpserve.wire.curve import FRONTEND, CurveClient, ZapAuthenticator, rank_role
from tpserve.worker import device as devices
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
    """Take part in serving until told to stop; returns the process's exit code.

    `interface` is this node's between nodes, and `settings` what the user has told NCCL and gloo. `frontend_address` is how to
    reach
    the frontend; ranks of other nodes have none yet and learn it over torchrun's store.
    `watch` has timed what came before; `log_buffer` holds this process's log, for operators.
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
        local_ranks=1 if env.job else env.local_world_size,  # a script's only child
        at_failure=partial(_clean_up, env, frontend_address),
    )
    rank_agent.report_log(log_buffer)
    log_buffer.alarm = rank_agent.nudge
    rank_agent.start()
    if env.runtime_dir is None:
        _end_stopped_neighbours(env, frontend_address, rank_agent)
    try:
        between = None if user_set_interface(settings, config.all_reduce) else interface.address
        _ServingRank(config, spec, env, frontend_address, rank_agent, start_timer, between).serve()
    except Stopped:
        pass
    except BaseException as error:  # the edge of the process: whatever it is, the coordinator hears of it first
        log.debug("rank %d fails", env.rank, exc_info=True)
        return rank_agent.fail(error)
    return rank_agent.leave()


def _end_stopped_neighbours(env: RankEnv, frontend_address: FrontendAddress, rank_agent: RankAgent) -> None:
    """Under bare torchrun, where nobody else looks after the agent and the frontend. `tpserve serve` does."""
    neighbours = {env.agent_pid: "torchrun"}
    if frontend_address.frontend_pid is not None:
        neighbours[frontend_address.frontend_pid] = "the frontend"

    def tell(pid: int, what: str) -> None:
        log.error("%s: it is ended", what)
        if pid == env.agent_pid:  # this rank dies with it: the frontend is to hear of it before, and to answer
            rank_agent.report_fault(what)
            time.sleep(VERDICT_S)

    kill_stopped_in_background(lambda: neighbours, tell)


def _clean_up(env: RankEnv, frontend_address: FrontendAddress) -> None:
    """Under bare torchrun, where nobody else does: end those of this node who were stopped and cannot end themselves, or torchrun
    would wait for them; take the directory of a frontend that was killed away."""
    if env.runtime_dir is None:
        kill_stopped([env.agent_pid, *(live_children(env.agent_pid) or ())])
        if frontend_address.runtime_dir is not None and not is_alive(frontend_address.runtime_dir):
            remove_runtime_dir(frontend_address.runtime_dir)


@dataclass
class _RankZeroSockets:
    """What rank 0 hosts for an epoch; its addresses travel in Hello and Start."""

    store: Store
    plans: PlanBroadcaster
    results: ResultReceiver
    endpoints: dict[str, str]


class _ServingRank:
    """The steps of a rank's life in order; each one's product is the next one's input."""

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        env: RankEnv,
        frontend_address: FrontendAddress,
        rank_agent: RankAgent,
        start_timer: StartTimer,
        between: str | None,
    ) -> None:
        """`between`: this node's address for gloo and NCCL, None where the user has told them."""
        self._config = config
        self._spec = spec
        self._env = env
        self._frontend_address = frontend_address
        self._rank_agent = rank_agent
        self._start_timer = start_timer
        self._between = between
        self._trace = Trace(config.step_trace, env.rank)

    def serve(self) -> None:
        """Join an epoch and run it to its end. Raises Stopped when told to leave earlier."""
        config, rank_agent, env, start_timer = self._config, self._rank_agent, self._env, self._start_timer
        check_frames(config, self._spec.vocab_size, len(self._spec.windows))
        device = devices.choose(config.device, env.local_rank, env.local_world_size)
        if config.binding and (bound := devices.bind(device)):
            log.info("rank %d %s", env.rank, bound)
        start_timer.mark("device")
        self._have_weights()  # before hello: whoever waits for this rank is told how far it is
        start_timer.mark("download")
        hosted = self._host() if env.rank == 0 else None
        stage, self._processor = config.layout.stage_of(env.rank), processor(device)
        rank_agent.report_progress("waiting for all ranks", 0)
        rank_agent.hello(
            hosted.endpoints if hosted else {}, fingerprint(config, self._spec), traits(device), stage, self._processor
        )
        start = rank_agent.wait_start()
        start_timer.mark("all ranks")
        rank_agent.report_progress("forming the mesh", 5)
        free = devices.free_memory(device)  # before the ranks meet, so before any has loaded
        store = hosted.store if hosted else join_store(start.endpoints["store"])
        if env.nnodes > 1:
            remote = [address for name, address in hosted.endpoints.items() if name.endswith("-tcp")] if hosted else []
            connectivity.check_connectivity(env.rank, env.world_size, self._between, store, config.start_timeout, remote)
        if config.verify_weights:
            self._verify_weights(store)
            start_timer.mark("verify")
        mesh = meshes.init_distributed(
            env.rank, config.layout, start.epoch, store, device, config.start_timeout, config.all_reduce, available_cores()
        )
        plans = None if hosted else PlanReceiver(self._endpoint(start, "plan"), start.epoch, self._leader_key)
        start_timer.mark("mesh")
        if device.type == "cuda":
            on_compile(rank_agent.busy)
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
        """Load this rank's share, see what fits beside it, and make that. `free`: memory before any rank had loaded."""
        config, env, start_timer = self._config, self._env, self._start_timer
        check_weights(mesh, self._spec, config, env.local_world_size, free)
        with self._room_for("loading the model", mesh):
            decoder, weights = self._load(mesh)
        start_timer.mark("load")
        numerics = self._self_test(decoder)
        start_timer.mark("self-test")
        self._rank_agent.report_progress("measuring memory", 90)
        make_slots = partial(self._slots, mesh.device)
        with self._room_for("measuring the largest steps", mesh):
            found, ledgers = measure(decoder, mesh, make_slots, config, env.local_world_size, weights)
        with self._room_for("making room for the KV cache", mesh):
            request_pool = make_slots(found.max_model_len)
            caches = allocate(decoder, mesh, found.num_blocks, config.block_size)
        start_timer.mark("measure")
        if env.rank == 0:
            for line in report(ledgers, found, self._spec, config):
                log.info(line)
            if (told := generation_config.log_line(config.sampling_defaults)) is not None:
                log.info(told)
        if (expert_load := decoder.expert_load) is not None and mesh.tp.rank == 0:  # the other ranks of the stage count the same
            expert_load.clear()
            self._rank_agent.report_expert_load(expert_load.layers, expert_load.read)
        return ModelRunner(mesh, decoder, request_pool, caches), ledgers[env.rank], numerics

    def _self_test(self, decoder: Decoder) -> Numerics | None:
        """Whether rows keep their bits in company here; on CUDA that is not promised."""
        if decoder.device.type != "cpu":
            return None
        return self_test(decoder.products(), [cpu_model(), *self._processor.values()], cache_dir())

    def _have_weights(self) -> None:
        """Of a repository: download the weights that the cache lacks, or wait for local rank 0 to have done it."""
        snapshot, env = self._config.snapshot, self._env
        if snapshot is None:
            return
        title = f"downloading {snapshot.repository}"
        first = env.local_rank == 0
        with ByteProgress(title, visible=first) as progress:

            def arrived(done: int, total: int) -> None:
                progress.update(done, total)
                self._rank_agent.report_progress(title, 100 * done // max(total, 1))

            have = download.ensure if first else download.wait
            have(weights_of(snapshot), self._config.start_timeout, arrived)

    def _verify_weights(self, store: Store) -> None:
        """Compare the files of all nodes, byte by byte."""
        config, env = self._config, self._env
        if env.nnodes == 1 or config.load_format == "dummy":
            log.info("--verify-weights: one node or --load-format dummy, so nothing to compare")
            return
        title = "verifying weights"
        directory = Path(config.model)
        names = weight_files(directory, only_safetensors=config.load_format == "safetensors")
        with ByteProgress(title, visible=env.local_rank == 0) as progress:

            def read(done: int, total: int) -> None:
                progress.update(done, total)
                self._rank_agent.report_progress(title, 5)

            verify.check(env, directory, names, store, max(1, available_cores() // env.local_world_size), read)

    def _host(self) -> _RankZeroSockets:
        frontend_address, keyring, ports = self._frontend_address, self._frontend_address.keyring, self._config.port_range
        store, store_address = host_store(frontend_address.address, ports)
        remote = None
        if keyring is not None:
            curve_server = keyring.curve_server(rank_role(0), self._config.layout.world_size)
            remote, zap_authenticator = (
                TcpEndpoint(tcp(frontend_address.address, ports), curve_server),
                ZapAuthenticator(curve_server.allowed),
            )
        plans = PlanBroadcaster(frontend_address.endpoint("plan"), remote)
        results = ResultReceiver(frontend_address.endpoint("result"), remote)
        endpoints = {"store": store_address, "plan": plans.endpoint, "result": results.endpoint}
        if keyring is not None:
            endpoints |= {"plan-tcp": plans.remote_endpoint, "result-tcp": results.remote_endpoint}
            zap_authenticator.log_refusals_of(plans.socket)
            zap_authenticator.log_refusals_of(results.socket)
        return _RankZeroSockets(store, plans, results, endpoints)

    def _endpoint(self, start: Start, name: str) -> str:
        """Where this rank finds what rank 0 hosts."""
        return start.endpoints[name if self._leader_key is None else f"{name}-tcp"]

    @property
    def _leader_key(self) -> CurveClient | None:
        """To rank 0's sockets; None on its own node."""
        return self._frontend_address.curve_client(self._env.rank, rank_role(0))

    def _load(self, mesh: Mesh) -> tuple[Decoder, int]:
        """This rank's shard of the model, and its size in bytes."""
        config, env = self._config, self._env
        layout = config.layout
        stage = layout.stage_of(env.rank)
        dtype: torch.dtype = getattr(torch, config.dtype)
        decoder = Decoder(self._spec, layout, stage, mesh.tp, dtype, mesh.device, config.max_model_len)
        parameters = decoder.parameters()
        if env.rank == 0:
            shares = split_heads(self._spec.num_heads, self._spec.num_kv_heads, layout.tp)
            if (uneven := imbalance([share.q for share in shares], "heads")) is not None:
                log.info(uneven)
        with ByteProgress("loading weights", visible=env.rank == 0) as progress:

            def loaded(done: int, total: int) -> None:
                progress.update(done, total)
                self._rank_agent.report_progress("loading weights", 10 + 80 * done // max(total, 1))

            self._rank_agent.report_progress("loading weights", 10)
            if config.load_format == "dummy":
                dummy(parameters, config.seed)
            else:
                only_safetensors = config.load_format == "safetensors"
                checkpoint = Checkpoint.open(config.model, names_of(self._spec), only_safetensors=only_safetensors)
                if env.rank == 0:
                    for line in checkpoint_notes(sources(self._spec), checkpoint, self._spec.num_layers, config.dtype):
                        log.info(line)
                load(parameters, checkpoint, loaded)
        return decoder, decoder.prepack()

    def _heads(self) -> dict[str, int]:
        """This rank's share of the attention heads, for Ready."""
        layout = self._config.layout
        share = split_heads(self._spec.num_heads, self._spec.num_kv_heads, layout.tp)[layout.tp_rank_of(self._env.rank)]
        q, kv = share.q, share.kv
        return {"first_head": q.start, "end_head": q.stop, "first_kv_head": kv.start, "end_kv_head": kv.stop}

    def _room_for(self, what: str, mesh: Mesh) -> AbstractContextManager[None]:
        return room_for(what, mesh, self._spec, self._config, self._env.local_world_size)

    def _slots(self, device: torch.device, max_len: int) -> RequestPool:
        config = self._config
        return RequestPool(
            config.max_num_seqs,
            max_len,
            config.block_size,
            self._spec.windows,
            device,
            eos_ids=self._spec.eos_ids,
            vocab_size=self._spec.vocab_size,
        )

    def _lead(self, hosted: _RankZeroSockets, model_runner: ModelRunner, ledger: MemoryLedger, epoch: int) -> None:
        """Rank 0: schedule, broadcast, run, answer."""
        config, layout = self._config, self._config.layout
        limits = SchedulerConfig(
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
        self._rank_agent.beside(hosted.plans.serve)
        results = None if layout.sampling_rank == 0 else hosted.results
        watchdog = StepWatchdog(first_s=config.start_timeout)
        Engine(Scheduler(limits, epoch), model_runner, link, hosted.plans, results, self._rank_agent, self._trace, watchdog).run()
