"""How many KV blocks a rank can hold: measured memory, minus what the model takes, as a ledger.

On CUDA the largest steps are tried, the model and then the LM head, and the peaks are read from the allocator; on the CPU a
share of what the control group has free is taken. The smallest rank decides for all.
"""

from collections.abc import Callable
from math import prod

import torch

from tpserve.attention.paged import KVCache
from tpserve.config.machine import available_memory
from tpserve.config.schema import EngineConfig
from tpserve.errors import UserError
from tpserve.models.decoder import Decoder
from tpserve.parallel.mesh import Mesh
from tpserve.types.messages import MemoryLedger
from tpserve.types.packed import pack
from tpserve.types.plan import Admission, Chunk, StepPlan
from tpserve.types.sampling import SamplingParams
from tpserve.worker.batch import Chunks, build
from tpserve.worker.head import Head
from tpserve.worker.slots import Slots

GIB = 1 << 30
CPU_CACHE_MOST = 4 * GIB
CPU_CACHE_SHARE = 0.4
CPU_WARM_UP_ROWS = 16
PLAIN = SamplingParams(logprobs=20)
FILTERED = SamplingParams(
    logprobs=20, top_p=0.99, min_p=1e-6, repetition_penalty=1.1, logit_bias=((0, 1.0),), bad_words=((0, 0),)
)
"""The largest draws: every filter's temporaries are there, and top-p, without top-k, sorts the vocabulary."""


def allocate(decoder: Decoder, mesh: Mesh, num_blocks: int, block_size: int) -> list[KVCache]:
    """The KV caches of this rank's layers, unwritten: attention never reads what no plan has written."""
    shape = decoder.cache_shape(num_blocks, block_size)

    def empty() -> torch.Tensor:
        return torch.empty(shape, dtype=decoder.dtype, device=mesh.device)

    return [KVCache(empty(), empty()) for _ in _layers(mesh)]


def _layers(mesh: Mesh) -> range:
    return mesh.layout.layers_of(mesh.layout.stage_of(mesh.rank))


def measure(decoder: Decoder, mesh: Mesh, slots: Slots, config: EngineConfig, local_ranks: int, weights: int) -> MemoryLedger:
    """Try a step, measure, and divide what is left into KV blocks. Every rank calls this; all get one block count.

    Changes what is in the slots. Raises UserError when the cache cannot hold a single sequence of `max_model_len`.
    """
    block_bytes = 2 * len(_layers(mesh)) * decoder.dtype.itemsize * prod(decoder.cache_shape(1, config.block_size))
    if mesh.device.type == "cuda":
        total, activations, head = _profile_cuda(decoder, mesh, slots, config)
        free, _ = torch.cuda.mem_get_info()
        others = total - free - torch.cuda.memory_reserved()  # other processes, the CUDA context, NCCL's buffers
        held = torch.cuda.memory_allocated()  # weights, tables of positions, slots
        room = int(total * config.gpu_memory_utilization) - others - held - activations - head
    else:
        trial = _Trial(decoder, mesh, slots, config, CPU_WARM_UP_ROWS)
        trial.layers()
        trial.head()
        total, activations, head = available_memory(), 0, trial.head_bound()
        room = min(CPU_CACHE_MOST // local_ranks, int((total // local_ranks - head) * CPU_CACHE_SHARE))
    num_blocks = mesh.world.min(config.num_gpu_blocks_override or max(0, room // block_bytes))
    needed = -(-config.max_model_len // config.block_size)
    if num_blocks < needed:
        raise UserError(_too_small(num_blocks, needed, block_bytes, room, config), param="max_model_len")
    return MemoryLedger(total, weights, activations, head, num_blocks * block_bytes, num_blocks, config.block_size)


def _too_small(num_blocks: int, needed: int, block_bytes: int, room: int, config: EngineConfig) -> str:
    fits = num_blocks * config.block_size
    remedy = f"pass --max-model-len {fits}" if fits else "use more ranks (--tensor-parallel-size, --pipeline-parallel-size)"
    return (
        f"one sequence of {config.max_model_len:,} tokens (--max-model-len) needs {_size(needed * block_bytes)} of KV cache "
        f"a rank, and {_size(max(room, 0))} are free for it, enough for {fits:,} tokens: {remedy}"
    )


def _profile_cuda(decoder: Decoder, mesh: Mesh, slots: Slots, config: EngineConfig) -> tuple[int, int, int]:
    """Total device memory, and the peaks that activations and the LM head's rows add to it, in bytes."""

    def peak(work: Callable[[], None]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    trial = _Trial(decoder, mesh, slots, config, config.max_num_batched_tokens)
    activations, head = peak(trial.layers), peak(trial.head)
    torch.cuda.empty_cache()
    return torch.cuda.get_device_properties(mesh.device).total_memory, activations, head


class _Trial:
    """The largest steps of this stage on nothing, without its neighbours: they are measured, and they warm up the libraries.

    Every position lives in block 0. `rows`: how many at most, positions to compute and tokens to draw.
    """

    def __init__(self, decoder: Decoder, mesh: Mesh, slots: Slots, config: EngineConfig, rows: int) -> None:
        self._decoder, self._mesh, self._slots, self._config = decoder, mesh, slots, config
        self._head = Head(decoder, slots, mesh.tp) if mesh.pipeline.last else None
        self._num_rows = min(rows, config.max_num_seqs * config.max_model_len)
        self._num_seqs = min(rows, config.max_num_seqs)

    @torch.inference_mode()
    def layers(self) -> None:
        chunks = self._take(self._scoring())
        caches = allocate(self._decoder, self._mesh, 1, self._config.block_size)
        self._decoder.forward(build(chunks, self._slots), self._hidden(self._num_rows), caches)

    @torch.inference_mode()
    def head(self) -> None:
        """Prompt tokens scored, tokens drawn without filters, and with them."""
        if self._head is not None:
            for plan in (self._scoring(), self._drawing(PLAIN), self._drawing(FILTERED)):
                chunks = self._take(plan)
                self._head.run(self._hidden(int(chunks.query_starts[-1])), plan, chunks)

    def head_bound(self) -> int:
        """What the head's rows take at most in steps of the configured size, in bytes, by computation."""
        config = self._config
        return self._head.at_once.most_bytes(config.max_num_seqs, config.max_num_batched_tokens) if self._head else 0

    def _take(self, plan: StepPlan) -> Chunks:
        self._slots.update(plan)
        return Chunks.of(plan)

    def _hidden(self, rows: int) -> torch.Tensor:
        return torch.zeros((rows, self._decoder.spec.hidden_size), dtype=self._decoder.dtype, device=self._mesh.device)

    def _scoring(self) -> StepPlan:
        """As many positions as a step may have, all of prompts."""
        longest = min(self._num_rows, self._config.max_model_len)
        counts = [min(longest, self._num_rows - at) for at in range(0, self._num_rows, longest)]
        params = SamplingParams(prompt_logprobs=20)
        return self._plan([Chunk(slot, 0, count, sample=False, score=True) for slot, count in enumerate(counts)], params)

    def _drawing(self, params: SamplingParams) -> StepPlan:
        """The last token of as many sequences as there may be."""
        last = self._config.max_model_len - 1
        return self._plan([Chunk(slot, last, 1, sample=True) for slot in range(self._num_seqs)], params)

    def _plan(self, chunks: list[Chunk], params: SamplingParams) -> StepPlan:
        groups = (b"",) * len(self._decoder.spec.cache)
        prompt_len = self._config.max_model_len + 1  # so that every position of a chunk has a successor in it
        return StepPlan.of(0, 0, chunks, [Admission(c.slot, pack([0]), prompt_len, params, 0, 0, groups) for c in chunks])


def report(ledger: MemoryLedger, config: EngineConfig, say: Callable[[str], None]) -> None:
    """Print the ledger in the words that operators look for."""
    whole = "on the device" if config.device == "cuda" else "free"
    say(
        f"memory of rank 0: {_size(ledger.total)} {whole}, weights {_size(ledger.weights)}, "
        f"activations {_size(ledger.activations)}, LM head rows {_size(ledger.head)}, KV cache {_size(ledger.kv_cache)}"
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
