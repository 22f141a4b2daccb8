"""How many KV blocks a rank can hold: measured memory, minus what the model takes, as a ledger.

On CUDA the model is run once at the largest batch and the peak is read from the allocator; on the CPU a share of what
the control group has free is taken. The smallest rank decides for all.
"""

from collections.abc import Callable
from math import prod

import torch

from tpserve.attention.batch import AttentionBatch, StepBatch
from tpserve.attention.paged import KVCache
from tpserve.config.machine import available_memory
from tpserve.config.schema import EngineConfig
from tpserve.errors import UserError
from tpserve.models.decoder import Decoder
from tpserve.parallel.mesh import Mesh
from tpserve.types.messages import MemoryLedger

GIB = 1 << 30
CPU_CACHE_MOST = 4 * GIB
CPU_CACHE_SHARE = 0.4
CPU_WARM_UP_ROWS = 16


def allocate(decoder: Decoder, mesh: Mesh, num_blocks: int, block_size: int) -> list[KVCache]:
    """The KV caches of this rank's layers, unwritten: attention never reads what no plan has written."""
    shape = decoder.cache_shape(num_blocks, block_size)

    def empty() -> torch.Tensor:
        return torch.empty(shape, dtype=decoder.dtype, device=mesh.device)

    return [KVCache(empty(), empty()) for _ in _layers(mesh)]


def _layers(mesh: Mesh) -> range:
    return mesh.layout.layers_of(mesh.layout.stage_of(mesh.rank))


def measure(decoder: Decoder, mesh: Mesh, config: EngineConfig, local_ranks: int, weights: int) -> MemoryLedger:
    """Run the model once, measure, and divide what is left into KV blocks. Every rank calls this; all get one block count.

    Raises UserError when the cache cannot hold a single sequence of `max_model_len`.
    """
    block_bytes = 2 * len(_layers(mesh)) * decoder.dtype.itemsize * prod(decoder.cache_shape(1, config.block_size))
    if mesh.device.type == "cuda":
        total, activations = _profile_cuda(decoder, mesh, config)
        free, _ = torch.cuda.mem_get_info()
        others = total - free - torch.cuda.memory_reserved()  # other processes, the CUDA context, NCCL's buffers
        held = torch.cuda.memory_allocated()  # weights, tables of positions, slots
        room = int(total * config.gpu_memory_utilization) - others - held - activations
    else:
        _run_once(decoder, mesh, CPU_WARM_UP_ROWS, config)
        total, activations = available_memory(), 0
        room = min(CPU_CACHE_MOST, int(total * CPU_CACHE_SHARE)) // local_ranks
    num_blocks = mesh.world.min(config.num_gpu_blocks_override or max(0, room // block_bytes))
    needed = -(-config.max_model_len // config.block_size)
    if num_blocks < needed:
        raise UserError(_too_small(num_blocks, needed, block_bytes, room, config), param="max_model_len")
    return MemoryLedger(total, weights, activations, num_blocks * block_bytes, num_blocks, config.block_size)


def _too_small(num_blocks: int, needed: int, block_bytes: int, room: int, config: EngineConfig) -> str:
    fits = num_blocks * config.block_size
    remedy = f"pass --max-model-len {fits}" if fits else "use more ranks (--tensor-parallel-size, --pipeline-parallel-size)"
    return (
        f"one sequence of {config.max_model_len:,} tokens (--max-model-len) needs {_size(needed * block_bytes)} of KV cache "
        f"a rank, and {_size(max(room, 0))} are free for it, enough for {fits:,} tokens: {remedy}"
    )


def _profile_cuda(decoder: Decoder, mesh: Mesh, config: EngineConfig) -> tuple[int, int]:
    """Total device memory and the peak that activations add to it, in bytes."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _run_once(decoder, mesh, config.max_num_batched_tokens, config)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    return torch.cuda.get_device_properties(mesh.device).total_memory, peak


@torch.inference_mode()
def _run_once(decoder: Decoder, mesh: Mesh, rows: int, config: EngineConfig) -> None:
    """One step of this stage on `rows` rows of nothing, without its neighbours: it measures, and it warms up the libraries."""
    per_chunk = min(rows, config.max_model_len)
    lens = [min(per_chunk, rows - at) for at in range(0, rows, per_chunk)]
    batch = _nothing(lens, config.block_size, len(decoder.spec.cache), mesh.device)
    hidden_TH = torch.zeros((rows, decoder.spec.hidden_size), dtype=decoder.dtype, device=mesh.device)
    hidden_TH = decoder.forward(batch, hidden_TH, allocate(decoder, mesh, 1, config.block_size))
    if mesh.pipeline.last:
        decoder.logits(hidden_TH[: min(rows, config.max_num_seqs)])


def _nothing(lens: list[int], block_size: int, num_groups: int, device: torch.device) -> StepBatch:
    """A batch of zeros whose every position lives in block 0."""
    starts = torch.tensor([0, *lens]).cumsum(0)
    rows = int(starts[-1])
    group = AttentionBatch(
        query_starts=starts.int().to(device),
        context_lens=torch.tensor(lens, dtype=torch.int32, device=device),
        tables=torch.zeros((len(lens), -(-max(lens) // block_size)), dtype=torch.int32, device=device),
        write_slots=torch.zeros(rows, dtype=torch.int64, device=device),
        query_lens_host=tuple(lens),
        context_lens_host=tuple(lens),
    )
    positions_T = torch.cat([torch.arange(n) for n in lens]).to(device)
    return StepBatch(
        tokens_T=torch.zeros(rows, dtype=torch.int64, device=device),
        positions_T=positions_T,
        groups=(group,) * num_groups,
        sample_rows_S=torch.zeros(0, dtype=torch.int64, device=device),
    )


def report(ledger: MemoryLedger, config: EngineConfig, say: Callable[[str], None]) -> None:
    """Print the ledger in the words that operators look for."""
    whole = "on the device" if config.device == "cuda" else "free"
    say(
        f"memory of rank 0: {_size(ledger.total)} {whole}, weights {_size(ledger.weights)}, "
        f"activations {_size(ledger.activations)}, KV cache {_size(ledger.kv_cache)}"
    )
    tokens = ledger.num_blocks * ledger.block_size
    device = "GPU" if config.device == "cuda" else "CPU"
    say(f"{device} KV cache size: {tokens:,} tokens ({ledger.num_blocks:,} blocks of {ledger.block_size})")
    say(f"Maximum concurrency for {config.max_model_len:,} tokens per request: {tokens / config.max_model_len:.2f}x")


def _size(num_bytes: int) -> str:
    """With a unit that suits it."""
    for unit, name in ((GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} B"
