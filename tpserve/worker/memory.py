"""Measures a rank's memory, agrees with the other ranks on the size of the KV cache (`sizing`), and allocates it.

On CUDA a profile run executes the largest steps, first the layers and then the LM head, and reads the peaks from the allocator.
On the CPU the cache gets a share of the memory that the control group has free. The rank with the least memory decides for all.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple

import torch

from tpserve.attention.paged import KVCache
from tpserve.config.engine_config import EngineConfig
from tpserve.config.sizes import size
from tpserve.errors import UserError
from tpserve.host.resources import available_memory
from tpserve.models.decoder import Decoder
from tpserve.models.param_count import cache_arrays_of, num_arrays
from tpserve.models.weight_bytes import weight_bytes
from tpserve.parallel.mesh import Mesh
from tpserve.sampler.filters import Filters, GrammarMask, apply
from tpserve.types.messages import MemoryLedger
from tpserve.types.model_spec import ModelSpec
from tpserve.types.packed import pack
from tpserve.types.plan import MAX_REDRAWN, Chunk, NewSequence, StepPlan
from tpserve.types.sampling import EngineSamplingParams
from tpserve.worker import device as devices
from tpserve.worker import device_input, sizing
from tpserve.worker.decode_graphs import Capture, CudaCapture, DecodeGraphs
from tpserve.worker.input_batch import ChunkArrays
from tpserve.worker.request_pool import RequestPool
from tpserve.worker.sampler_stage import SamplerStage
from tpserve.worker.sizing import KVCacheConfig, MemoryProfile
from tpserve_kernels.cpu.library import library

log = logging.getLogger(__name__)

CPU_WARM_UP_ROWS = 16
PLAIN = EngineSamplingParams(logprobs=20)
PER_ID = EngineSamplingParams(logprobs=20, repetition_penalty=1.1, logit_bias=((0, 1.0),))
"""Filters that a rank applies to its part of the vocabulary."""
FILTERED = EngineSamplingParams(
    logprobs=20,
    top_p=0.99,
    min_p=1e-6,
    repetition_penalty=1.1,
    logit_bias=((0, 1.0),),
    bad_words=((0, 0),),
    allowed_token_ids=(0, 1),
)
"""The largest sampling step: it needs the temporaries of every filter, and top-p without top-k sorts the vocabulary."""


def allocate(decoder: Decoder, mesh: Mesh, num_blocks: int, block_size: int) -> list[KVCache]:
    """The KV caches of this rank's layers, one per layer, uninitialized. Layers of different groups share arrays, not blocks."""
    spec, layers = decoder.spec, _layers(mesh)
    arrays = [
        decoder.kv_layout.empty(num_blocks, block_size, decoder.dtype, mesh.device) for _ in range(num_arrays(spec, layers))
    ]
    return [arrays[index] for index in cache_arrays_of(spec, layers)]


def _layers(mesh: Mesh) -> range:
    return mesh.layout.layers_of(mesh.layout.stage_of(mesh.rank))


def check_weights(mesh: Mesh, spec: ModelSpec, config: EngineConfig, local_ranks: int, free: int) -> None:
    """Check that every rank's weights fit its memory, before anything is allocated. Every rank calls this; raises UserError.

    `free`: this rank's free bytes before any rank loaded anything. On the CPU this is the only check: the kernel grants more
    memory than it has and later kills the process that uses it.
    """
    if mesh.device.type == "cuda":
        total = torch.cuda.get_device_properties(mesh.device).total_memory
        reserved, sharers = int(total * (1 - config.gpu_memory_utilization)), devices.ranks_on_gpu(mesh.device, local_ranks)
    else:
        total, reserved, sharers = free, 0, local_ranks
    weights = _weight_bytes(mesh, spec, config)
    profile = MemoryProfile(total, total - free, (free - reserved) // sharers, weights, 0, 0, 0, free // sharers, 0)
    ranks = _gather(mesh, profile)
    refusal = sizing.weights_refusal(ranks, spec, config, devices.ranks_per_node(mesh.device, local_ranks))
    if refusal is not None:
        _log_memory(mesh, refusal[0])
        raise refusal[1]


def _weight_bytes(mesh: Mesh, spec: ModelSpec, config: EngineConfig) -> int:
    return weight_bytes(spec, mesh.layout, mesh.rank, sizing.held_format(config, library=library() is not None))


@contextmanager
def room_for(what: str, mesh: Mesh, spec: ModelSpec, config: EngineConfig, local_ranks: int) -> Iterator[None]:
    """Turn an out-of-memory error into a UserError that names the users of the memory and a way out.

    `what` completes the sentence "ran out of memory while ...".
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(mesh.device)
        ours, weights = torch.cuda.memory_reserved(mesh.device), _weight_bytes(mesh, spec, config)
        others = total - free - ours
        share = int(total * config.gpu_memory_utilization) - others
        rank = MemoryProfile(total, others, share, weights, max(0, ours - weights), 0, 0, free, 0)
        log.error(devices.describe_memory(mesh.device))
        raise UserError(
            f"GPU {mesh.device.index} ran out of memory while {what}: {size(total)} in all, {size(ours)} taken by rank "
            f"{mesh.rank} (weights {size(weights)}), {size(others)} by others and the driver: pass "
            f"{sizing.wider(rank, spec, config, devices.ranks_per_node(mesh.device, local_ranks))}, or a smaller "
            f"--max-num-batched-tokens than {config.max_num_batched_tokens}"
        ) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise UserError(f"rank {mesh.rank} ran out of memory while {what}: {devices.describe_memory(mesh.device)}") from error


def nccl_bytes(mesh: Mesh, spec: ModelSpec, config: EngineConfig, free: int) -> int:
    """Bytes that NCCL takes on this rank's GPU, once each of its links has been used; 0 without NCCL. Every rank calls this.

    `free`: this GPU's free bytes before the mesh formed. NCCL refuses two ranks on one GPU, so all that has gone is this rank's.
    """
    if not mesh.world.uses_nccl:
        return 0
    for rows in (1, config.max_num_batched_tokens):  # NCCL connects ranks anew for sizes that take another way
        x_TH = torch.zeros((rows, spec.hidden_size), dtype=getattr(torch, config.dtype), device=mesh.device)
        mesh.tp.all_gather(mesh.tp.all_reduce(x_TH))
        del x_TH
    mesh.pipeline.connect(mesh.device)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return max(0, free - devices.free_memory(mesh.device))


def measure(
    decoder: Decoder,
    mesh: Mesh,
    make_pool: Callable[[int], RequestPool],
    config: EngineConfig,
    local_ranks: int,
    weights: int,
    nccl: int = 0,
) -> tuple[KVCacheConfig, list[MemoryLedger]]:
    """Run the largest steps, measure, and decide the longest sequence and the number of KV blocks, equal on all ranks.

    `make_pool(max_len)` makes a request pool for the profile run, which drops it afterwards. `nccl`: `nccl_bytes`. Every rank
    calls this and gets every rank's memory ledger. Raises UserError when the cache cannot hold one sequence of `max_model_len`.
    """
    block_bytes = num_arrays(decoder.spec, _layers(mesh)) * decoder.kv_layout.num_bytes(1, config.block_size, decoder.dtype)

    def make_run(rows: int) -> _ProfileRun:
        return _ProfileRun(decoder, mesh, make_pool(config.max_model_len), config, rows)

    if mesh.device.type == "cuda":
        sent = sizing.sent_bytes(decoder.spec, config, mesh.rank)
        profile = _profile_cuda(make_run, mesh, config, local_ranks, weights, block_bytes, nccl, sent)
    else:
        profile = _profile_cpu(make_run, mesh, config, local_ranks, weights, block_bytes)
    ranks = _gather(mesh, profile)
    kv_config = sizing.fit_kv_cache(ranks, decoder.spec, config)
    ledgers = [sizing.ledger_of(rank, kv_config, config) for rank in ranks]
    refusal = sizing.refusal(kv_config, ranks, decoder.spec, config, devices.ranks_per_node(mesh.device, local_ranks))
    if refusal is not None:
        _log_memory(mesh, kv_config.rank, sizing.ledger_line(kv_config.rank, ledgers[kv_config.rank], config))
        raise refusal
    return kv_config, ledgers


def _gather(mesh: Mesh, profile: MemoryProfile) -> list[MemoryProfile]:
    return [MemoryProfile(*values) for values in mesh.world.all_gather_ints(astuple(profile))]


def _log_memory(mesh: Mesh, rank: int, *lines: str) -> None:
    """The rank that decides logs its device's memory. The others wait for it, so that the error comes after."""
    if mesh.rank == rank:
        for line in (*lines, devices.describe_memory(mesh.device)):
            log.error(line)
    mesh.world.all_reduce_min(0)


def _profile_cpu(
    make_run: Callable[[int], "_ProfileRun"],
    mesh: Mesh,
    config: EngineConfig,
    local_ranks: int,
    weights: int,
    block_bytes: int,
) -> MemoryProfile:
    """A warm-up, then this rank's share of the free memory; the LM head's bytes are computed."""
    warm_up = make_run(CPU_WARM_UP_ROWS)
    warm_up.layers()
    warm_up.head()
    mesh.world.all_reduce_min(0)  # barrier: all ranks of this machine have loaded
    head = warm_up.max_head_bytes()
    return sizing.cpu_profile(available_memory().free // local_ranks, weights, head, block_bytes, local_ranks)


def _profile_cuda(
    make_run: Callable[[int], "_ProfileRun"],
    mesh: Mesh,
    config: EngineConfig,
    local_ranks: int,
    weights: int,
    block_bytes: int,
    nccl: int,
    sent: int,
) -> MemoryProfile:
    """Peaks of the largest steps, and this rank's share of its GPU. `nccl`: bytes that are taken; `sent`: bytes that will be."""
    profile_run = make_run(config.max_num_batched_tokens)
    activations, head = _peaks(profile_run)
    graphs = _graph_bytes(profile_run) if mesh.tp.can_be_captured and not config.enforce_eager else 0
    del profile_run
    torch.cuda.empty_cache()
    mesh.world.all_reduce_min(0)  # barrier: ranks that share the GPU have loaded and freed their profile runs
    free, total = torch.cuda.mem_get_info()
    sharers = devices.ranks_on_gpu(mesh.device, local_ranks)
    allocated = torch.cuda.memory_allocated()
    others = max(0, total - free - sharers * torch.cuda.memory_reserved() - nccl)  # other processes, CUDA contexts
    share = (int(total * config.gpu_memory_utilization) - others) // sharers
    activations += allocated - weights  # rotary tables
    communication = nccl + sent
    taken = weights + activations + head + graphs + communication
    room, free = share - taken, (total - others) // sharers - taken
    return MemoryProfile(
        total, others, share, weights, activations, head, room, free, block_bytes, graphs=graphs, communication=communication
    )


def _peaks(profile_run: "_ProfileRun") -> tuple[int, int]:
    """Peak bytes of activations and of the LM head's rows on the device."""

    def peak(work: Callable[[], None]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    return peak(profile_run.layers), peak(profile_run.head)


def _graph_bytes(profile_run: "_ProfileRun") -> int:
    """The memory that the graphs of decode steps take, beside what is reserved for activations."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what is kept for later tensors would hide what the graphs' buffers take
    free, _ = torch.cuda.mem_get_info()
    graphs = profile_run.graphs(CudaCapture())
    graphs.warm_up()
    torch.cuda.synchronize()
    taken = free - torch.cuda.mem_get_info()[0]
    return max(0, taken)


class _ProfileRun:
    """The largest steps of this stage on dummy data, without other stages. They are measured, and they warm up the libraries.

    Every position is in block 0. `rows`: an upper bound for positions to compute and tokens to sample.
    """

    def __init__(self, decoder: Decoder, mesh: Mesh, request_pool: RequestPool, config: EngineConfig, rows: int) -> None:
        self._decoder, self._mesh, self._request_pool, self._config = decoder, mesh, request_pool, config
        self._sampler_stage = SamplerStage(decoder, request_pool, mesh.tp) if mesh.pipeline.last else None
        self._num_rows = min(rows, config.max_num_seqs * config.max_model_len)
        self._num_seqs = min(rows, config.max_num_seqs)

    @torch.inference_mode()
    def layers(self) -> None:
        """Run the layers on the largest batch."""
        chunks = self._update(self._scoring_plan())
        caches = allocate(self._decoder, self._mesh, 1, self._config.block_size)
        self._decoder.forward(device_input.build(chunks, self._request_pool), self._hidden(self._num_rows), caches)

    @torch.inference_mode()
    def head(self) -> None:
        """Score prompt tokens, draw known tokens again, then sample without filters, then with some, then with all of them."""
        if self._sampler_stage is not None:
            for plan in (self._scoring_plan(), self._redraw_plan(), *map(self._sampling_plan, (PLAIN, PER_ID, FILTERED))):
                chunks = self._update(plan)
                self._sampler_stage.run(self._hidden(chunks.num_rows), plan, chunks)
            for width in {len(self._sampler_stage.vocab), self._decoder.vocab_shards[-1].stop}:
                self._mask(width)

    def _mask(self, width: int) -> None:
        """The mask of a grammar, of which this run has none, on logits of so many ids."""
        device = self._mesh.device
        bits = torch.full((1, -(-width // 32)), -1, dtype=torch.int32, device=device)
        zero, logits = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, width, device=device)
        apply(logits, Filters(zero, grammar=GrammarMask(zero, bits)), logits[:, 0], zero, self._request_pool.tokens, zero)

    @torch.inference_mode()
    def graphs(self, capture: Capture) -> DecodeGraphs:
        """The graphs of decode steps, on a cache of one block."""
        caches, first = allocate(self._decoder, self._mesh, 1, self._config.block_size), self._mesh.pipeline.first
        return DecodeGraphs(self._decoder, self._request_pool, caches, self._sampler_stage, capture, first_stage=first)

    def max_head_bytes(self) -> int:
        """A computed bound for the LM head's rows in steps of the configured size, in bytes; 0 before the last stage."""
        if self._sampler_stage is None:
            return 0
        return self._sampler_stage.logits_chunking.most_bytes(self._config.max_num_seqs, self._config.max_num_batched_tokens)

    def _update(self, plan: StepPlan) -> ChunkArrays:
        self._request_pool.update(plan)
        return ChunkArrays.of(plan)

    def _hidden(self, rows: int) -> torch.Tensor:
        return torch.zeros((rows, self._decoder.spec.hidden_size), dtype=self._decoder.dtype, device=self._mesh.device)

    def _scoring_plan(self) -> StepPlan:
        """The largest number of positions in a step, all of prompts."""
        longest = min(self._num_rows, self._config.max_model_len)
        counts = [min(longest, self._num_rows - at) for at in range(0, self._num_rows, longest)]
        params = EngineSamplingParams(prompt_logprobs=20)
        return self._plan([Chunk(slot, 0, count, sample=False, score=True) for slot, count in enumerate(counts)], params)

    def _redraw_plan(self) -> StepPlan:
        """The largest number of rows that draw known tokens again; with filters no more of them are drawn at once than sample."""
        most = min(MAX_REDRAWN, self._config.max_model_len)
        counts = [min(most, self._num_rows - at) for at in range(0, self._num_rows, most)][: self._config.max_num_seqs]
        chunks = [Chunk(slot, 0, count, sample=False, redraw=count) for slot, count in enumerate(counts)]
        return self._plan(chunks, EngineSamplingParams())

    def _sampling_plan(self, params: EngineSamplingParams) -> StepPlan:
        """The last token of the largest number of sequences."""
        last = self._config.max_model_len - 1
        return self._plan([Chunk(slot, last, 1, sample=True) for slot in range(self._num_seqs)], params)

    def _plan(self, chunks: list[Chunk], params: EngineSamplingParams) -> StepPlan:
        groups = (b"",) * len(self._decoder.spec.cache)
        prompt_len = self._config.max_model_len + 1  # so that every position of a chunk has a successor in it
        return StepPlan.of(0, 0, chunks, [NewSequence(c.slot, pack([0]), prompt_len, params, 0, 0, groups) for c in chunks])
