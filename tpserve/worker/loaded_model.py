"""What a rank keeps from epoch to epoch: its weights, the result of their self-test, the KV caches and the request pool.

The first epoch loads, tests, measures and allocates, together with the other ranks. In a later one a survivor only takes the new
groups, and a rank that was started again loads its shard and allocates what was agreed before, without the others.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch

from tpserve.attention.paged import KVCache
from tpserve.config import generation_config
from tpserve.config.engine_config import EngineConfig
from tpserve.config.env import RankEnv, cache_dir
from tpserve.host.resources import cpu_model
from tpserve.models import names_of
from tpserve.models.decoder import Decoder
from tpserve.models.whole_model import sources
from tpserve.observe.progress import ByteProgress
from tpserve.observe.start_timer import StartTimer
from tpserve.parallel.mesh import Mesh
from tpserve.parallel.split import imbalance, split_heads
from tpserve.types.messages import MemoryLedger, Numerics
from tpserve.types.model_spec import ModelSpec
from tpserve.weights import dummy
from tpserve.weights.checkpoint import Checkpoint
from tpserve.weights.load import Loader
from tpserve.weights.parameter import Parameter
from tpserve.weights.unused_weights import checkpoint_notes
from tpserve.worker import device as devices
from tpserve.worker.decode_graphs import Capture, CudaCapture, DecodeGraphs
from tpserve.worker.grammars import CompiledGrammars
from tpserve.worker.kept_weights import KeptByAgent
from tpserve.worker.memory import allocate, check_weights, measure, nccl_bytes, room_for
from tpserve.worker.model_runner import ModelRunner
from tpserve.worker.request_pool import RequestPool
from tpserve.worker.self_test import self_test
from tpserve.worker.sizing import report

log = logging.getLogger(__name__)


class LoadedModel:
    """One rank's part of the model; empty until the first `join`."""

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        env: RankEnv,
        processor: dict[str, str],
        answers: dict[str, str],
        compiled: CompiledGrammars | None,
        report: Callable[[str, int], None],
    ) -> None:
        """`processor`: the facts about it that a stage shares; `answers`: those that decide answers, and with them the weights
        as they are packed.

        `compiled`: on ranks of the last stage. `report` takes the phase and the percentage of the start.
        """
        self._config = config
        self._spec = spec
        self._env = env
        self.processor = processor
        self._report = report
        self._kept = KeptByAgent(env.rank, env.weights_socket, answers)
        self._compiled = compiled
        self.decoder: Decoder | None = None
        """Once it is loaded."""
        self._weights = 0
        self._nccl = 0
        self._caches: list[KVCache] = []
        self._graphs: DecodeGraphs | None = None
        """Those that outlive an epoch: of a stage of one rank."""
        self._request_pool: RequestPool | None = None
        self.ledger: MemoryLedger | None = None
        """This rank's memory, once it is allocated."""
        self.numerics: Numerics | None = None

    def join(self, mesh: Mesh, agreed: MemoryLedger | None, free: int, start_timer: StartTimer) -> ModelRunner:
        """Be ready to run plans with the groups of `mesh`. UserError when something does not fit.

        `agreed`: this rank's memory as an earlier epoch agreed on it; None: all ranks measure and agree now. `free`: bytes that
        were free before the mesh formed.
        """
        if agreed is None:
            ours = self._kept.num_bytes if self.decoder is None else self._weights  # taken already, and not to be taken again
            sharers = self._env.local_world_size
            check_weights(mesh, self._spec, self._config, sharers, free + sharers * ours)
            with self._room_for("connecting the ranks", mesh):
                self._nccl = nccl_bytes(mesh, self._spec, self._config, free)
        if self._config.quantization is not None and mesh.tp.size > 1:
            has_weights = self.decoder is not None or self._kept.find()
            if not mesh.tp.all_reduce_min(int(has_weights)):
                self.decoder = self._graphs = None  # int8 needs scales of all ranks, so all of them load again
        if self.decoder is None:
            with self._room_for("loading the model", mesh):
                self.decoder, self._weights = self._load(mesh)
            start_timer.mark("load")
            if self._env.rank == 0 and self.decoder.device.type == "cpu":
                log.info(f"the layers run as {self.decoder.form}")
            self.numerics = self._self_test(self.decoder)
            start_timer.mark("self-test")
        else:
            self.decoder.rejoin(mesh.tp)
        if agreed is None:
            self._measure(self.decoder, mesh)
        elif self.ledger is None:
            self._allocate(self.decoder, mesh, agreed)
        start_timer.mark("measure")
        assert self._request_pool is not None
        if self._compiled is not None:
            self._compiled.clear()
        model_runner = ModelRunner(mesh, self.decoder, self._request_pool, self._caches, self._capture(mesh), self._graphs)
        if model_runner.graphs is not None and model_runner.graphs is not self._graphs:
            self._report("capturing graphs", 95)
            with self._room_for("capturing graphs", mesh):
                model_runner.graphs.warm_up()
            start_timer.mark("graphs")
        # Graphs with collectives end with the groups of their epoch.
        self._graphs = model_runner.graphs if mesh.tp.size == 1 else None
        return model_runner

    def _capture(self, mesh: Mesh) -> Capture | None:
        """What makes the graphs of decode steps; None where every step is eager."""
        on_card = mesh.device.type == "cuda" and mesh.tp.can_be_captured
        return CudaCapture() if on_card and not self._config.enforce_eager else None

    def _measure(self, decoder: Decoder, mesh: Mesh) -> None:
        """Run the largest steps, agree with the other ranks on what fits, and allocate it."""
        config, env = self._config, self._env
        self._caches, self._request_pool, self._graphs, self.ledger = [], None, None, None  # of an epoch that failed at its start
        self._report("measuring memory", 90)
        with self._room_for("measuring the largest steps", mesh):
            make_pool = partial(self._make_pool, mesh.device)
            kv_config, ledgers = measure(decoder, mesh, make_pool, config, env.local_world_size, self._weights, self._nccl)
        self._allocate(decoder, mesh, ledgers[env.rank])
        if env.rank == 0:
            for line in report(ledgers, kv_config, self._spec, config):
                log.info(line)
            if (defaults := generation_config.log_line(config.sampling_defaults)) is not None:
                log.info(defaults)

    def _allocate(self, decoder: Decoder, mesh: Mesh, ledger: MemoryLedger) -> None:
        with self._room_for("making room for the KV cache", mesh):
            self._request_pool = self._make_pool(mesh.device, ledger.max_model_len)
            self._caches = allocate(decoder, mesh, ledger.num_blocks, self._config.block_size)
        self.ledger = ledger

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
                self._report("loading weights", 10 + 80 * done // max(total, 1))

            self._report("loading weights", 10)
            memory = self._kept.memory(decoder.parameters(), decoder.device, dtype)
            fill: Callable[[Parameter], None] | None = partial(dummy.fill, seed=config.seed)
            loader = None
            if config.load_format != "dummy" and not memory.packed:
                loader = self._loader(decoder, on_progress)
                fill = loader.fill
            if decoder.device.type == "cuda":  # nothing is packed there
                if loader is not None:
                    loader.fill_on_card(decoder.parameters())
                else:
                    dummy.dummy(decoder.parameters(), seed=config.seed)
                fill = None
            weights = decoder.prepack(config.quantization, fill, memory)
        self._kept.leave()
        return decoder, weights

    def _loader(self, decoder: Decoder, progress: Callable[[int, int], None]) -> Loader:
        """A loader of this rank's parameters. Rank 0 tells what nobody reads."""
        checkpoint = Checkpoint.open(
            self._config.model, names_of(self._spec), only_safetensors=self._config.load_format == "safetensors"
        )
        if self._env.rank == 0:
            for line in checkpoint_notes(sources(self._spec), checkpoint, self._spec.num_layers, self._config.dtype):
                log.info(line)
        return Loader(decoder.parameters(), checkpoint, progress)

    def _self_test(self, decoder: Decoder) -> Numerics | None:
        """Test batch invariance of this processor's matrix products; None on CUDA, which does not promise it."""
        if decoder.device.type != "cpu":
            return None
        machine, kernels = [cpu_model(), *self.processor.values()], devices.kernels_id(decoder.device)
        return self_test(decoder.products(), machine, cache_dir(), kernels)

    def _make_pool(self, device: torch.device, max_len: int) -> RequestPool:
        config = self._config
        return RequestPool(
            config.max_num_seqs,
            max_len,
            config.block_size,
            self._spec.windows,
            device,
            eos_ids=self._spec.eos_ids,
            vocab_size=self._spec.vocab_size,
            compiled=self._compiled,
        )

    def _room_for(self, what: str, mesh: Mesh) -> AbstractContextManager[None]:
        return room_for(what, mesh, self._spec, self._config, self._env.local_world_size)
