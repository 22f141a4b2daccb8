"""Estimates one layout on given GPUs: the memory of every rank, the size of its KV cache, and lower bounds of two times. Pure.

The KV cache is computed by the server's own arithmetic (`worker/sizing`), from the values that the ranks would measure: weights,
slots and KV blocks are exact, LM head rows, activations and graphs are bounds, NCCL's buffers an estimate, and other memory is
`OTHERS_BYTES`. On the CPU a rank's
share of its node's memory takes the place of a GPU.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from msgspec.structs import replace

from tpserve.config.engine_config import EngineConfig
from tpserve.config.flags import Flags
from tpserve.config.resolve import resolve
from tpserve.config.sizes import GIB, size
from tpserve.errors import UserError
from tpserve.models.param_count import count_params
from tpserve.models.units import VOCAB_UNIT
from tpserve.models.weight_bytes import ITEM_BYTES, weight_bytes, weight_bytes_read
from tpserve.parallel.split import imbalance, split, split_heads
from tpserve.planner.activations import activation_bytes, graph_bytes, nccl_bytes, rotary_bytes
from tpserve.types.layout import ParallelLayout, even_layers
from tpserve.types.machine import Machine
from tpserve.types.messages import MemoryLedger
from tpserve.types.model_files import ModelFiles
from tpserve.types.model_spec import ModelSpec
from tpserve.types.window import blocks_needed, max_length
from tpserve.worker import sizing
from tpserve.worker.logits_chunking import LogitsChunking
from tpserve.worker.sizing import MemoryProfile

OTHERS_BYTES = GIB
"""GPU memory of CUDA's context and the driver."""


@dataclass(frozen=True)
class GpuCluster:
    """The GPUs. `memory`: bytes of a GPU. `memory_rate`, and `disk_rate` of a node: bytes a second.

    `is_cpu`: they are ranks on the CPU instead, each with so much memory; `library`: they have the library of CPU kernels.
    """

    num_gpus: int
    per_node: int
    memory: int
    memory_rate: int
    nvlink: bool
    disk_rate: int | None
    is_cpu: bool = False
    library: bool = True

    @property
    def noun(self) -> str:
        """What there are so many of."""
        return "rank" if self.is_cpu else "GPU"

    @property
    def link(self) -> str:
        """What the ranks of a node sum through."""
        return "shared memory" if self.is_cpu else "NVLink" if self.nvlink else "PCIe"

    def nodes_of(self, world_size: int) -> int:
        """The number of nodes for `world_size` ranks."""
        return -(-world_size // self.per_node)


@dataclass(frozen=True)
class PlanRequest:
    """The model to serve: the server's flags without a layout, the model and its files."""

    flags: Flags
    files: ModelFiles
    spec: ModelSpec
    stored_bytes: int | None
    wanted: int
    """Sequences at once. With a length of "auto" the longest length is chosen of which this number fits."""


@dataclass(frozen=True)
class Estimate:
    """The estimate of one layout. `why_not`: the reason why it does not fit; empty when it fits.

    For a layout that the model cannot have, all fields after `why_not` have their defaults.
    """

    layout: ParallelLayout
    nodes: int
    why_not: str
    ledgers: tuple[MemoryLedger, ...] = ()
    decides: int = 0
    """The rank with the least room, which decides the size of the cache."""
    kv_tokens: int = 0
    concurrency: float = 0.0
    """Sequences of full length that fit at once."""
    token_s: float = 0.0
    """A lower bound of the seconds of a token."""
    load_s: float | None = None
    """A lower bound of the seconds to read the weights; None without a disk rate."""
    crosses: bool = False
    """Whether the ranks of a stage are on more than one node."""
    uneven: tuple[str, ...] = ()
    """Sentences about parts that the ranks do not share evenly."""

    @property
    def fits(self) -> bool:
        """Whether the server would start."""
        return not self.why_not

    @property
    def length(self) -> int:
        """The length of a sequence in tokens."""
        return self.ledgers[0].max_model_len

    @property
    def name(self) -> str:
        """The layout as text, such as "TP 8 x PP 2"."""
        return f"TP {self.layout.tp} x PP {self.layout.pp}" + " x EP" * self.layout.expert_parallel


def layouts(spec: ModelSpec, world_size: int, *, only_experts: bool) -> Iterator[ParallelLayout]:
    """Every TP x PP of `world_size` ranks, widest TP first, and for a model with experts with and without expert parallelism.

    `only_experts`: only those with expert parallelism.
    """
    for tp in range(world_size, 0, -1):
        if world_size % tp == 0:
            pp = world_size // tp
            for expert_parallel in (False, True) if spec.experts is not None and tp > 1 else (only_experts,):
                if expert_parallel or not only_experts:
                    yield ParallelLayout(tp, pp, even_layers(spec.num_layers, pp), expert_parallel)


def estimate(request: PlanRequest, gpus: GpuCluster, layout: ParallelLayout) -> Estimate:
    """Estimate one layout. Raises UserError for flags that no layout can satisfy."""
    nodes = gpus.nodes_of(layout.world_size)
    try:
        config = config_of(request, gpus, layout)
        ranks = [memory_profile(request.spec, config, gpus, rank) for rank in range(layout.world_size)]
    except UserError as error:
        if error.param not in (None, "tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel"):
            raise
        return Estimate(layout, nodes, str(error))
    if config.fit_max_model_len:
        config = replace(config, max_model_len=_longest(request, ranks, config), fit_max_model_len=False)
    found = sizing.fit_kv_cache(ranks, request.spec, config)
    sequence = blocks_needed(config.max_model_len, request.spec.windows, config.block_size)
    why_not = _too_heavy(ranks, request, config, gpus) if gpus.is_cpu else _shortage(ranks, sequence, config)
    if not why_not and (refused := sizing.refusal(found, ranks, request.spec, config, gpus.per_node)) is not None:
        why_not = str(refused)
    tokens = found.num_blocks * config.block_size * -(-config.max_model_len // config.block_size) // sequence
    return Estimate(
        layout=layout,
        nodes=nodes,
        why_not=why_not,
        ledgers=tuple(sizing.ledger_of(rank, found, config) for rank in ranks),
        decides=found.rank,
        kv_tokens=tokens,
        concurrency=found.num_blocks / sequence,
        token_s=_token_s(request.spec, config, gpus),
        load_s=None if gpus.disk_rate is None else _load_bytes(request, config, gpus) / gpus.disk_rate,
        crosses=any(_nodes_of_stage(layout, gpus, stage) > 1 for stage in range(layout.pp)),
        uneven=_uneven(request.spec, layout),
    )


def config_of(request: PlanRequest, gpus: GpuCluster, layout: ParallelLayout) -> EngineConfig:
    """The configuration that a server with this layout resolves. Raises UserError for a layout that it cannot have."""
    flags = replace(
        request.flags,
        model=request.flags.model or request.files.directory,
        tensor_parallel_size=layout.tp,
        pipeline_parallel_size=layout.pp,
        enable_expert_parallel=layout.expert_parallel,
    )
    nodes, per_node = gpus.nodes_of(layout.world_size), min(gpus.per_node, layout.world_size)
    return resolve(flags, request.files, request.spec, Machine(layout.world_size, per_node, nodes, per_node, 1, "torchrun"))


def memory_profile(spec: ModelSpec, config: EngineConfig, gpus: GpuCluster, rank: int) -> MemoryProfile:
    """The profile that a rank would measure when it is alone on its GPU."""
    layout, item, memory = config.layout, ITEM_BYTES[config.dtype], gpus.memory
    weights = weight_bytes(spec, layout, rank, sizing.held_format(config, library=gpus.library))
    rows = min(config.max_num_batched_tokens, config.max_num_seqs * config.max_model_len)
    activations = activation_bytes(spec, layout, rank, rows, item) + rotary_bytes(spec, config.max_model_len)
    head = 0
    if layout.stage_of(rank) == layout.pp - 1:
        shards = split(spec.vocab_size, layout.tp, VOCAB_UNIT, what="vocabulary entries")
        logits_chunking = LogitsChunking.of(shards, config.max_model_len + 1, on_card=not gpus.is_cpu)
        head = logits_chunking.most_bytes(config.max_num_seqs, config.max_num_batched_tokens)
    block = sizing.position_bytes(count_params(spec, layout, rank), config) * config.block_size
    if gpus.is_cpu:
        return sizing.cpu_profile(memory - weights, weights, head, block, min(gpus.per_node, layout.world_size))
    share = int(memory * config.gpu_memory_utilization) - OTHERS_BYTES
    uses_nccl = config.all_reduce != "gloo"
    graphs = communication = 0
    if not config.enforce_eager and (uses_nccl or layout.tp == 1):
        graphs = graph_bytes(spec, layout, rank, min(config.max_num_seqs, sizing.MAX_GRAPH_ROWS), item)
    if uses_nccl:
        communication = nccl_bytes(layout, rank) + sizing.sent_bytes(spec, config, rank)
    taken = weights + activations + head + graphs + communication
    room, free = share - taken, memory - OTHERS_BYTES - taken
    return MemoryProfile(
        memory, OTHERS_BYTES, share, weights, activations, head, room, free, block, graphs=graphs, communication=communication
    )


def _longest(request: PlanRequest, ranks: list[MemoryProfile], config: EngineConfig) -> int:
    """The longest length of which `request.wanted` sequences fit; the server's minimum when no length fits."""
    distinct = {(rank.block, rank.room) for rank in ranks}

    def fits(length: int) -> bool:
        blocks = request.wanted * blocks_needed(length, request.spec.windows, config.block_size)
        return all(blocks * block + sizing.slot_bytes(config, length) <= room for block, room in distinct)

    return max(max_length(fits, config.block_size, config.max_model_len), sizing.least_length(config))


def _shortage(ranks: list[MemoryProfile], blocks: int, config: EngineConfig) -> str:
    """The rank that lacks most memory for one sequence of `blocks` KV blocks, as a sentence; empty when all have room."""
    rest = sizing.slot_bytes(config, config.max_model_len)
    short = [rest + blocks * rank.block - rank.room for rank in ranks]
    worst = max(range(len(ranks)), key=short.__getitem__)
    if short[worst] <= 0:
        return ""
    rank = ranks[worst]
    return (
        f"rank {worst} needs {size(rank.share + short[worst])} (weights {size(rank.weights)}) for one sequence of "
        f"{config.max_model_len:,} tokens and may take {size(max(rank.share, 0))}: {size(short[worst])} too much"
    )


def _too_heavy(ranks: list[MemoryProfile], request: PlanRequest, config: EngineConfig, gpus: GpuCluster) -> str:
    """The sentence of a start on the CPU whose weights do not fit; empty when they do."""
    before = [dataclasses.replace(rank, free=gpus.memory) for rank in ranks]
    refusal = sizing.weights_refusal(before, request.spec, config, gpus.per_node)
    return "" if refusal is None else str(refusal[1])


def _token_s(spec: ModelSpec, config: EngineConfig, gpus: GpuCluster) -> float:
    """A lower bound of the seconds of a token, for one sequence of full length.

    It is the time to read weights and KV cache from memory, on the slowest rank of each stage, summed over the stages.
    """
    layout, held_format = config.layout, sizing.held_format(config, library=gpus.library)

    def read_bytes(rank: int) -> int:
        weights = weight_bytes_read(spec, layout, rank, held_format)
        return weights + sizing.kv_bytes_read(spec, config, rank, config.max_model_len)

    stages = (range(stage * layout.tp, (stage + 1) * layout.tp) for stage in range(layout.pp))
    return sum(max(map(read_bytes, ranks)) for ranks in stages) / gpus.memory_rate


def _load_bytes(request: PlanRequest, config: EngineConfig, gpus: GpuCluster) -> float:
    """Bytes that the busiest node reads from its disk. Ranks of one stage on one node read shared bytes once."""
    spec, layout = request.spec, config.layout
    alone = ParallelLayout(1, layout.pp, layout.layers)
    whole = [count_params(spec, alone, stage).weights for stage in range(layout.pp)]
    share = [count_params(spec, layout, rank).weights for rank in range(layout.world_size)]
    busiest = 0
    for first in range(0, layout.world_size, gpus.per_node):
        by_stage: dict[int, int] = {}
        for rank in range(first, min(first + gpus.per_node, layout.world_size)):
            stage = layout.stage_of(rank)
            by_stage[stage] = min(whole[stage], by_stage.get(stage, 0) + share[rank])
        busiest = max(busiest, sum(by_stage.values()))
    item = ITEM_BYTES[spec.dtype]
    total = request.stored_bytes or item * sum(whole)
    return busiest / sum(whole) * total


def _nodes_of_stage(layout: ParallelLayout, gpus: GpuCluster, stage: int) -> int:
    first, last = stage * layout.tp, (stage + 1) * layout.tp - 1
    return last // gpus.per_node - first // gpus.per_node + 1


def _uneven(spec: ModelSpec, layout: ParallelLayout) -> tuple[str, ...]:
    """The parts that the ranks do not share evenly, in the words of the server's log."""
    shares = split_heads(spec.num_heads, spec.num_kv_heads, layout.tp)
    heads = imbalance([share.q for share in shares], "attention heads")
    stages = imbalance([layout.layers_of(stage) for stage in range(layout.pp)], "layers")
    experts = None
    if layout.expert_parallel and spec.experts is not None:
        experts = imbalance(split(spec.experts.count, layout.tp, what="experts"), "experts")
    layers = stages and stages.replace("slowest rank", "largest stage")
    return tuple(text for text in (heads, layers, experts) if text)
