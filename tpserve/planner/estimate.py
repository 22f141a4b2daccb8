"""One layout on the cards that are there: every rank's memory, what fits beside the weights, and the floors of two times. Pure.

What fits is the server's own arithmetic (`worker/sizing`), fed with what the ranks would measure: weights, slots and KV blocks
are exact, LM head rows and activations bounds, and what is not ours is `OTHERS_BYTES`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from msgspec.structs import replace

from tpserve.config.resolve import resolve
from tpserve.config.schema import EngineConfig, Flags
from tpserve.config.sizes import GIB, size
from tpserve.errors import UserError
from tpserve.models.param_count import count_params, num_arrays
from tpserve.models.units import VOCAB_UNIT
from tpserve.parallel.split import imbalance, split, split_heads
from tpserve.planner.activations import activation_bytes, table_bytes
from tpserve.types.layout import ParallelLayout, even_layers
from tpserve.types.machine import Machine
from tpserve.types.messages import MemoryLedger
from tpserve.types.model_files import ModelFiles
from tpserve.types.model_spec import ModelSpec
from tpserve.types.window import blocks_needed, max_length
from tpserve.worker import sizing
from tpserve.worker.logits_chunking import LogitsChunking
from tpserve.worker.sizing import ITEM_BYTES, MemoryProfile

OTHERS_BYTES = GIB
"""Of a card's memory: CUDA's context, NCCL's buffers, and what the driver keeps."""


@dataclass(frozen=True)
class GpuCluster:
    """What there is. Memory in bytes a card, rates in bytes a second; `disk_rate`: of each node."""

    num_gpus: int
    per_node: int
    memory: int
    memory_rate: int
    nvlink: bool
    disk_rate: int | None

    def nodes_of(self, world_size: int) -> int:
        """How many nodes so many ranks take, node after node."""
        return -(-world_size // self.per_node)


@dataclass(frozen=True)
class PlanRequest:
    """What is to be served: the server's flags but for the layout, the model, and how it is stored."""

    flags: Flags
    files: ModelFiles
    spec: ModelSpec
    stored_bytes: int | None
    wanted: int
    """Sequences at once; with a length of "auto" it is the longest of which so many fit."""


@dataclass(frozen=True)
class Estimate:
    """A layout. `why_not`: empty where it fits. With an impossible layout there is no more than that."""

    layout: ParallelLayout
    nodes: int
    why_not: str
    ledgers: tuple[MemoryLedger, ...] = ()
    decides: int = 0
    """The rank whose memory decides."""
    kv_tokens: int = 0
    concurrency: float = 0.0
    """Sequences of the length asked for that fit at once."""
    token_s: float = 0.0
    load_s: float | None = None
    crosses: bool = False
    """The ranks of a stage are on more than one node."""
    uneven: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the server would start."""
        return not self.why_not

    @property
    def length(self) -> int:
        """Of a sequence, in tokens."""
        return self.ledgers[0].max_model_len

    @property
    def name(self) -> str:
        """As people say it."""
        return f"TP {self.layout.tp} x PP {self.layout.pp}" + " x EP" * self.layout.expert_parallel


def layouts(spec: ModelSpec, world_size: int, *, only_experts: bool) -> Iterator[ParallelLayout]:
    """Every TP x PP of so many ranks, widest TP first, and where there are experts to deal out whole, with and without that."""
    for tp in range(world_size, 0, -1):
        if world_size % tp == 0:
            pp = world_size // tp
            for whole in (False, True) if spec.experts is not None and tp > 1 else (only_experts,):
                if whole or not only_experts:
                    yield ParallelLayout(tp, pp, even_layers(spec.num_layers, pp), whole)


def estimate(request: PlanRequest, gpus: GpuCluster, layout: ParallelLayout) -> Estimate:
    """What this layout comes to. UserError for flags that no layout can meet."""
    nodes = gpus.nodes_of(layout.world_size)
    try:
        config = _config(request, gpus, layout)
        ranks = [memory_profile(request.spec, config, gpus.memory, rank) for rank in range(layout.world_size)]
    except UserError as error:
        if error.param not in (None, "tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel"):
            raise
        return Estimate(layout, nodes, str(error))
    if config.fit_max_model_len:
        config = replace(config, max_model_len=_longest(request, ranks, config), fit_max_model_len=False)
    found = sizing.fit_kv_cache(ranks, request.spec, config)
    sequence = blocks_needed(config.max_model_len, request.spec.windows, config.block_size)
    why_not = _shortage(ranks, sequence, config)
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
        token_s=_token_s(request.spec, config, gpus.memory_rate),
        load_s=None if gpus.disk_rate is None else _load_bytes(request, config, gpus) / gpus.disk_rate,
        crosses=any(_nodes_of_stage(layout, gpus, stage) > 1 for stage in range(layout.pp)),
        uneven=_uneven(request.spec, layout),
    )


def _config(request: PlanRequest, gpus: GpuCluster, layout: ParallelLayout) -> EngineConfig:
    flags = replace(
        request.flags,
        model=request.flags.model or request.files.directory,
        tensor_parallel_size=layout.tp,
        pipeline_parallel_size=layout.pp,
        enable_expert_parallel=layout.expert_parallel,
    )
    nodes, per_node = gpus.nodes_of(layout.world_size), min(gpus.per_node, layout.world_size)
    return resolve(flags, request.files, request.spec, Machine(layout.world_size, per_node, nodes, per_node, 1, "torchrun"))


def memory_profile(spec: ModelSpec, config: EngineConfig, memory: int, rank: int) -> MemoryProfile:
    """What a rank alone on a card of so many bytes would measure."""
    layout, item = config.layout, ITEM_BYTES[config.dtype]
    weights = sizing.weight_bytes(spec, config, rank)
    rows = min(config.max_num_batched_tokens, config.max_num_seqs * config.max_model_len)
    activations = activation_bytes(spec, layout, rank, rows, item) + table_bytes(spec, config.max_model_len)
    head = 0
    if layout.stage_of(rank) == layout.pp - 1:
        shards = split(spec.vocab_size, layout.tp, VOCAB_UNIT, what="vocabulary entries")
        logits_chunking = LogitsChunking.of(shards, config.max_model_len + 1)
        head = logits_chunking.most_bytes(config.max_num_seqs, config.max_num_batched_tokens)
    share = int(memory * config.gpu_memory_utilization) - OTHERS_BYTES
    taken = weights + activations + head
    block = item * count_params(spec, layout, rank).cached * config.block_size
    return MemoryProfile(
        memory, OTHERS_BYTES, share, weights, activations, head, share - taken, memory - OTHERS_BYTES - taken, block
    )


def _longest(request: PlanRequest, ranks: list[MemoryProfile], config: EngineConfig) -> int:
    """The longest sequence of which as many as are wanted fit; the shortest that a server would take where none does."""
    different = {(rank.block, rank.room) for rank in ranks}

    def fits(length: int) -> bool:
        blocks = request.wanted * blocks_needed(length, request.spec.windows, config.block_size)
        return all(blocks * block + sizing.slot_bytes(config, length) <= room for block, room in different)

    return max(max_length(fits, config.block_size, config.max_model_len), sizing.least_length(config))


def _shortage(ranks: list[MemoryProfile], blocks: int, config: EngineConfig) -> str:
    """Which rank has too little memory for one sequence, of so many blocks, and by how much; empty when that is not why."""
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


def _token_s(spec: ModelSpec, config: EngineConfig, memory_rate: int) -> float:
    """Seconds a token of one sequence at its full length takes at least: the slowest rank's reading, stage after stage."""
    layout, item = config.layout, ITEM_BYTES[config.dtype]

    seen = {
        layer: min(config.max_model_len, group.window or config.max_model_len) for group in spec.cache for layer in group.layers
    }

    def read_bytes(rank: int) -> int:
        layers = layout.layers_of(layout.stage_of(rank))
        of_a_layer = count_params(spec, layout, rank).cached // num_arrays(spec, layers)
        return item * (_weights_of_a_token(spec, layout, rank) + of_a_layer * sum(seen[layer] for layer in layers))

    stages = (range(stage * layout.tp, (stage + 1) * layout.tp) for stage in range(layout.pp))
    return sum(max(map(read_bytes, ranks)) for ranks in stages) / memory_rate


def _weights_of_a_token(spec: ModelSpec, layout: ParallelLayout, rank: int) -> int:
    """Elements of a rank that a token needs: of the experts its own, of tables that are looked up (nearly) none."""
    experts = spec.experts
    if experts is not None:
        whole = layout.expert_parallel  # the busiest rank has at least its part of the token's experts
        active = experts.routing.num_active
        count = -(-active // layout.tp) * layout.tp if whole else active
        spec = replace(spec, experts=replace(experts, count=min(count, experts.count)))
    elements = count_params(spec, layout, rank).weights
    if layout.stage_of(rank) == 0:
        vocab = split(spec.vocab_size, layout.tp, VOCAB_UNIT, what="vocabulary entries")[layout.tp_rank_of(rank)]
        is_head = spec.tie_embeddings and layout.pp == 1
        elements -= 0 if is_head else len(vocab) * (spec.embedding_size or spec.hidden_size)
        elements -= spec.max_position * spec.hidden_size if spec.rope is None else 0
    return elements


def _load_bytes(request: PlanRequest, config: EngineConfig, gpus: GpuCluster) -> float:
    """What the node that reads most must read from its disk: of each stage it has ranks of, no byte twice."""
    spec, layout = request.spec, config.layout
    alone = ParallelLayout(1, layout.pp, layout.layers)
    whole = [count_params(spec, alone, stage).weights for stage in range(layout.pp)]
    share = [count_params(spec, layout, rank).weights for rank in range(layout.world_size)]
    most = 0
    for first in range(0, layout.world_size, gpus.per_node):
        mine: dict[int, int] = {}
        for rank in range(first, min(first + gpus.per_node, layout.world_size)):
            stage = layout.stage_of(rank)
            mine[stage] = min(whole[stage], mine.get(stage, 0) + share[rank])
        most = max(most, sum(mine.values()))
    item = ITEM_BYTES[spec.dtype]
    total = request.stored_bytes or item * sum(whole)
    return most / sum(whole) * total


def _nodes_of_stage(layout: ParallelLayout, gpus: GpuCluster, stage: int) -> int:
    first, last = stage * layout.tp, (stage + 1) * layout.tp - 1
    return last // gpus.per_node - first // gpus.per_node + 1


def _uneven(spec: ModelSpec, layout: ParallelLayout) -> tuple[str, ...]:
    """What the ranks do not share evenly, as a start says it."""
    shares = split_heads(spec.num_heads, spec.num_kv_heads, layout.tp)
    heads = imbalance([share.q for share in shares], "attention heads")
    stages = imbalance([layout.layers_of(stage) for stage in range(layout.pp)], "layers")
    experts = None
    if layout.expert_parallel and spec.experts is not None:
        experts = imbalance(split(spec.experts.count, layout.tp, what="experts"), "experts")
    layers = stages and stages.replace("slowest rank", "largest stage")
    return tuple(text for text in (heads, layers, experts) if text)
