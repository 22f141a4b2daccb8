"""Measures a rank's memory, agrees with the other ranks on what fits (`sizing`), and allocates the KV cache.

On CUDA the largest steps are tried, the model and then the LM head, and the peaks are read from the allocator; on the CPU a
share of what the control group has free is taken. The smallest rank decides for all.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple

import torch

from tpserve.attention.paged import KVCache
from tpserve.config.schema import EngineConfig
from tpserve.config.sizes import GIB, size
from tpserve.errors import UserError
from tpserve.host.resources import available_memory
from tpserve.models.decoder import Decoder
from tpserve.models.param_count import cache_arrays_of, num_arrays
from tpserve.parallel.mesh import Mesh
from tpserve.types.messages import MemoryLedger
from tpserve.types.model_spec import ModelSpec
from tpserve.types.packed import pack
from tpserve.types.plan import Chunk, NewSequence, StepPlan
from tpserve.types.sampling import EngineSamplingParams
from tpserve.worker import device as devices
from tpserve.worker import sizing
from tpserve.worker.input_batch import ChunkTensors, build_model_input
from tpserve.worker.request_pool import RequestPool
from tpserve.worker.sampler_stage import SamplerStage
from tpserve.worker.sizing import KVCacheConfig, MemoryProfile

log = logging.getLogger(__name__)

CPU_CACHE_MOST = 4 * GIB
CPU_CACHE_SHARE = 0.4
CPU_WARM_UP_ROWS = 16
PLAIN = EngineSamplingParams(logprobs=20)
FILTERED = EngineSamplingParams(
    logprobs=20, top_p=0.99, min_p=1e-6, repetition_penalty=1.1, logit_bias=((0, 1.0),), bad_words=((0, 0),)
)
"""The largest draws: every filter's temporaries are there, and top-p, without top-k, sorts the vocabulary."""


def allocate(decoder: Decoder, mesh: Mesh, num_blocks: int, block_size: int) -> list[KVCache]:
    """The KV caches of this rank's layers, one a layer, unwritten. Layers of different groups share arrays: never a block."""
    spec, layers = decoder.spec, _layers(mesh)
    arrays = [
        decoder.kv_layout.empty(num_blocks, block_size, decoder.dtype, mesh.device) for _ in range(num_arrays(spec, layers))
    ]
    return [arrays[place] for place in cache_arrays_of(spec, layers)]


def _layers(mesh: Mesh) -> range:
    return mesh.layout.layers_of(mesh.layout.stage_of(mesh.rank))


def check_weights(mesh: Mesh, spec: ModelSpec, config: EngineConfig, local_ranks: int, free: int) -> None:
    """Before anything of the model is allocated: UserError when a rank's share of the weights is larger than its memory.

    `free`: what this rank had when no rank had loaded anything yet. On the CPU it is the only check there is: the kernel
    hands out more memory than it has, and kills who uses it. Every rank calls this.
    """
    if mesh.device.type == "cuda":
        total = torch.cuda.get_device_properties(mesh.device).total_memory
        kept, sharers = int(total * (1 - config.gpu_memory_utilization)), devices.sharers(mesh.device, local_ranks)
    else:
        total, kept, sharers = free, 0, local_ranks
    weights = sizing.weight_bytes(spec, config, mesh.rank)
    mine = MemoryProfile(total, total - free, (free - kept) // sharers, weights, 0, 0, 0, free // sharers, 0)
    ranks = _gather(mesh, mine)
    refused = sizing.weights_refusal(ranks, spec, config, devices.places(mesh.device, local_ranks))
    if refused is not None:
        _explain(mesh, refused[0])
        raise refused[1]


@contextmanager
def room_for(what: str, mesh: Mesh, spec: ModelSpec, config: EngineConfig, local_ranks: int) -> Iterator[None]:
    """Turn memory that ran out into a UserError that says who took it and what would help.

    `what` completes "ran out of memory while ...".
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(mesh.device)
        ours, weights = torch.cuda.memory_reserved(mesh.device), sizing.weight_bytes(spec, config, mesh.rank)
        others = total - free - ours
        share = int(total * config.gpu_memory_utilization) - others
        rank = MemoryProfile(total, others, share, weights, max(0, ours - weights), 0, 0, free, 0)
        log.error(devices.occupants(mesh.device))
        raise UserError(
            f"GPU {mesh.device.index} ran out of memory while {what}: {size(total)} in all, {size(ours)} taken by rank "
            f"{mesh.rank} (weights {size(weights)}), {size(others)} by others and the driver: pass "
            f"{sizing.wider(rank, spec, config, devices.places(mesh.device, local_ranks))}, or a smaller "
            f"--max-num-batched-tokens than {config.max_num_batched_tokens}"
        ) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise UserError(f"rank {mesh.rank} ran out of memory while {what}: {devices.occupants(mesh.device)}") from error


def measure(
    decoder: Decoder, mesh: Mesh, slots: Callable[[int], RequestPool], config: EngineConfig, local_ranks: int, weights: int
) -> tuple[KVCacheConfig, list[MemoryLedger]]:
    """Try a step, measure, and decide how long a sequence may be and how many KV blocks there are: the same for all ranks.

    `request_pool` makes some for sequences of a length; what is tried is dropped again. Every rank calls this and learns every
    rank's memory. UserError when the cache cannot hold a single sequence of `max_model_len`.
    """
    block = num_arrays(decoder.spec, _layers(mesh)) * decoder.kv_layout.num_bytes(1, config.block_size, decoder.dtype)

    def trial(rows: int) -> _ProfileRun:
        return _ProfileRun(decoder, mesh, slots(config.max_model_len), config, rows)

    measured = _measured_cuda if mesh.device.type == "cuda" else _measured_cpu
    ranks = _gather(mesh, measured(trial, mesh, config, local_ranks, weights, block))
    found = sizing.fit_kv_cache(ranks, decoder.spec, config)
    ledgers = [sizing.ledger_of(rank, found, config) for rank in ranks]
    refused = sizing.refusal(found, ranks, decoder.spec, config, devices.places(mesh.device, local_ranks))
    if refused is not None:
        _explain(mesh, found.rank, sizing.ledger_line(found.rank, ledgers[found.rank], config))
        raise refused
    return found, ledgers


def _gather(mesh: Mesh, mine: MemoryProfile) -> list[MemoryProfile]:
    return [MemoryProfile(*values) for values in mesh.world.all_gather_ints(astuple(mine))]


def _explain(mesh: Mesh, rank: int, *lines: str) -> None:
    """The rank that decides says what is on its device; the others wait for it, so that the error comes last."""
    if mesh.rank == rank:
        for line in (*lines, devices.occupants(mesh.device)):
            log.error(line)
    mesh.world.all_reduce_min(0)


def _measured_cpu(
    trial: Callable[[int], "_ProfileRun"], mesh: Mesh, config: EngineConfig, local_ranks: int, weights: int, block: int
) -> MemoryProfile:
    tried = trial(CPU_WARM_UP_ROWS)
    tried.layers()
    tried.head()
    mesh.world.all_reduce_min(0)  # all ranks of this machine have loaded, so what is free is free for all
    head = tried.head_bound()
    free = available_memory().free // local_ranks - head
    room = min(CPU_CACHE_MOST // local_ranks, int(free * CPU_CACHE_SHARE))
    share = free + head + weights
    return MemoryProfile(share, 0, share, weights, 0, head, room, free, block)


def _measured_cuda(
    trial: Callable[[int], "_ProfileRun"], mesh: Mesh, config: EngineConfig, local_ranks: int, weights: int, block: int
) -> MemoryProfile:
    activations, head = _peaks(trial(config.max_num_batched_tokens))
    torch.cuda.empty_cache()
    mesh.world.all_reduce_min(0)  # ranks that share the card have loaded and given back what they tried
    free, total = torch.cuda.mem_get_info()
    sharers = devices.sharers(mesh.device, local_ranks)
    held = torch.cuda.memory_allocated()
    others = max(0, total - free - sharers * torch.cuda.memory_reserved())  # processes not ours, CUDA's contexts, NCCL's buffers
    share = (int(total * config.gpu_memory_utilization) - others) // sharers
    activations += held - weights  # tables of positions
    taken = weights + activations + head
    return MemoryProfile(
        total, others, share, weights, activations, head, share - taken, (total - others) // sharers - taken, block
    )


def _peaks(profile_run: "_ProfileRun") -> tuple[int, int]:
    """What activations and the LM head's rows add to the device's memory at most, in bytes."""

    def peak(work: Callable[[], None]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    return peak(profile_run.layers), peak(profile_run.head)


class _ProfileRun:
    """The largest steps of this stage on nothing, without its neighbours: they are measured, and they warm up the libraries.

    Every position lives in block 0. `rows`: how many at most, positions to compute and tokens to draw.
    """

    def __init__(self, decoder: Decoder, mesh: Mesh, request_pool: RequestPool, config: EngineConfig, rows: int) -> None:
        self._decoder, self._mesh, self._request_pool, self._config = decoder, mesh, request_pool, config
        self._sampler_stage = SamplerStage(decoder, request_pool, mesh.tp) if mesh.pipeline.last else None
        self._num_rows = min(rows, config.max_num_seqs * config.max_model_len)
        self._num_seqs = min(rows, config.max_num_seqs)

    @torch.inference_mode()
    def layers(self) -> None:
        chunks = self._take(self._scoring())
        caches = allocate(self._decoder, self._mesh, 1, self._config.block_size)
        self._decoder.forward(build_model_input(chunks, self._request_pool), self._hidden(self._num_rows), caches)

    @torch.inference_mode()
    def head(self) -> None:
        """Prompt tokens scored, tokens drawn without filters, and with them."""
        if self._sampler_stage is not None:
            for plan in (self._scoring(), self._drawing(PLAIN), self._drawing(FILTERED)):
                chunks = self._take(plan)
                self._sampler_stage.run(self._hidden(int(chunks.query_starts[-1])), plan, chunks)

    def head_bound(self) -> int:
        """What the head's rows take at most in steps of the configured size, in bytes, by computation."""
        config = self._config
        return (
            self._sampler_stage.logits_chunking.most_bytes(config.max_num_seqs, config.max_num_batched_tokens)
            if self._sampler_stage
            else 0
        )

    def _take(self, plan: StepPlan) -> ChunkTensors:
        self._request_pool.update(plan)
        return ChunkTensors.of(plan)

    def _hidden(self, rows: int) -> torch.Tensor:
        return torch.zeros((rows, self._decoder.spec.hidden_size), dtype=self._decoder.dtype, device=self._mesh.device)

    def _scoring(self) -> StepPlan:
        """As many positions as a step may have, all of prompts."""
        longest = min(self._num_rows, self._config.max_model_len)
        counts = [min(longest, self._num_rows - at) for at in range(0, self._num_rows, longest)]
        params = EngineSamplingParams(prompt_logprobs=20)
        return self._plan([Chunk(slot, 0, count, sample=False, score=True) for slot, count in enumerate(counts)], params)

    def _drawing(self, params: EngineSamplingParams) -> StepPlan:
        """The last token of as many sequences as there may be."""
        last = self._config.max_model_len - 1
        return self._plan([Chunk(slot, last, 1, sample=True) for slot in range(self._num_seqs)], params)

    def _plan(self, chunks: list[Chunk], params: EngineSamplingParams) -> StepPlan:
        groups = (b"",) * len(self._decoder.spec.cache)
        prompt_len = self._config.max_model_len + 1  # so that every position of a chunk has a successor in it
        return StepPlan.of(0, 0, chunks, [NewSequence(c.slot, pack([0]), prompt_len, params, 0, 0, groups) for c in chunks])
