"""From every rank's memory profile to one sequence length and one number of KV blocks, or to an error with a way out. Pure.

All ranks compute this from the same numbers and get the same result. A rank's memory, in bytes:

    [0, others) not ours | weights, tables | activations | head | graphs | communication | slots | KV cache | kept free
                                                                                         |<----- room ---->|
                                                                                         |<------------ free ------------>|
    kept free: by --gpu-memory-utilization
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tpserve.config.engine_config import EngineConfig
from tpserve.config.sizes import GIB, size
from tpserve.errors import UserError
from tpserve.models.param_count import ParamCount, count_params, largest_count, num_arrays
from tpserve.models.weight_bytes import ITEM_BYTES, HeldFormat, largest_weight_bytes
from tpserve.types.layout import ParallelLayout, even_layers
from tpserve.types.messages import MemoryLedger
from tpserve.types.model_spec import ModelSpec
from tpserve.types.window import blocks_needed, max_length

AUTO_LEAST = 1024
"""The shortest length that `--max-model-len auto` accepts; a shorter context is of little use. A given number may be lower."""
CPU_CACHE_MOST = 4 * GIB
CPU_CACHE_SHARE = 0.4
"""The KV cache's part of what the CPU's memory has free beside weights and LM head."""
KV_SCALE_BYTES = 4
"""Beside each head of a position in a KV cache of int8."""
MAX_GRAPH_ROWS = 512
"""A decode step of more rows is no graph."""
_MOST_FACTOR = 64
"""The search for a larger layout stops at so many times the number of ranks."""


@dataclass(frozen=True)
class MemoryProfile:
    """One rank's memory in bytes. `share`: the limit for this rank; `block`: one KV block over all cache arrays.

    `graphs` and `communication`: those of `MemoryLedger`.
    """

    total: int
    others: int
    share: int
    weights: int
    activations: int
    head: int
    room: int
    free: int
    block: int
    graphs: int = 0
    communication: int = 0


@dataclass(frozen=True)
class KVCacheConfig:
    """The longest sequence, the number of KV blocks on every rank, and the rank whose memory decided them."""

    max_model_len: int
    num_blocks: int
    rank: int


def cpu_profile(free: int, weights: int, head: int, block: int, local_ranks: int) -> MemoryProfile:
    """The profile of a rank on the CPU. `free`: its share of the memory that is free after loading."""
    free -= head
    room = min(CPU_CACHE_MOST // local_ranks, int(free * CPU_CACHE_SHARE))
    share = free + head + weights
    return MemoryProfile(share, 0, share, weights, 0, head, room, free, block)


def fit_kv_cache(ranks: Sequence[MemoryProfile], spec: ModelSpec, config: EngineConfig) -> KVCacheConfig:
    """What all ranks can hold. `refusal` checks whether it is enough."""
    length = config.max_model_len
    if config.fit_max_model_len:
        length = min(_longest(rank, spec, config) for rank in ranks)
    blocks = [_blocks(rank, config, length) for rank in ranks]
    smallest = min(range(len(ranks)), key=lambda rank: (blocks[rank], ranks[rank].free))
    return KVCacheConfig(length, blocks[smallest], smallest)


def least_length(config: EngineConfig) -> int:
    """The smallest length of the longest sequence with which the server starts."""
    return min(AUTO_LEAST, config.max_model_len) if config.fit_max_model_len else config.max_model_len


def held_format(config: EngineConfig, *, library: bool = True) -> HeldFormat:
    """How the ranks hold weights. `library`: whether they have the library of CPU kernels."""
    return HeldFormat(config.dtype, config.device == "cpu" and library, config.quantization)


def position_bytes(count: ParamCount, config: EngineConfig) -> int:
    """Bytes of one position of a KV block, in all cache arrays of a rank."""
    scales = KV_SCALE_BYTES * count.cached_heads if config.kv_cache_dtype == "int8" else 0
    return ITEM_BYTES[config.kv_cache_dtype] * count.cached + scales


def kv_bytes_read(spec: ModelSpec, config: EngineConfig, rank: int, context: int, rows: int = 1) -> int:
    """Bytes of the KV cache that the last `rows` of `context` positions of a sequence see, in all layers of a rank."""
    layers = config.layout.layers_of(config.layout.stage_of(rank))
    per_layer = position_bytes(count_params(spec, config.layout, rank), config) // num_arrays(spec, layers)
    seen = {
        layer: context if group.window is None else min(context, group.window + rows - 1)
        for group in spec.cache
        for layer in group.layers
    }
    return per_layer * sum(seen[layer] for layer in layers)


def slot_bytes(config: EngineConfig, length: int) -> int:
    """Bytes of the token ids of all slots, on the device."""
    return config.max_num_seqs * (length + 1) * 4


def sent_bytes(spec: ModelSpec, config: EngineConfig, rank: int) -> int:
    """Bytes on the device of activations that travel to the next stage: as many tensors as there are plans in flight.

    gloo sends them from the host's memory.
    """
    layout = config.layout
    if config.device != "cuda" or config.all_reduce == "gloo" or layout.stage_of(rank) == layout.pp - 1:
        return 0
    rows = min(config.max_num_batched_tokens, config.max_num_seqs * config.max_model_len)
    return (layout.pp + 1) * rows * spec.hidden_size * ITEM_BYTES[config.dtype]


def _configured_blocks(rank: MemoryProfile, config: EngineConfig) -> int | None:
    """The number of blocks that the user configured; None when it is measured."""
    if config.kv_cache_memory is not None:
        return config.kv_cache_memory // rank.block
    return config.num_gpu_blocks_override


def _blocks(rank: MemoryProfile, config: EngineConfig, length: int) -> int:
    configured = _configured_blocks(rank, config)
    return max(0, (rank.room - slot_bytes(config, length)) // rank.block) if configured is None else configured


def _longest(rank: MemoryProfile, spec: ModelSpec, config: EngineConfig) -> int:
    """The longest sequence whose blocks and slots fit the rank, in whole blocks up to max_model_len."""
    configured = _configured_blocks(rank, config)

    def fits(length: int) -> bool:
        blocks = _blocks_per_sequence(spec, config, length)
        return blocks * rank.block + slot_bytes(config, length) <= rank.room if configured is None else blocks <= configured

    return max_length(fits, config.block_size, config.max_model_len)


def _blocks_per_sequence(spec: ModelSpec, config: EngineConfig, length: int) -> int:
    """Number of blocks that one sequence of `length` tokens needs."""
    return blocks_needed(length, spec.windows, config.block_size)


# Errors, with a way out


def refusal(
    found: KVCacheConfig, ranks: Sequence[MemoryProfile], spec: ModelSpec, config: EngineConfig, per_node: int
) -> UserError | None:
    """Why this server cannot start, with a way out; None when it can. `per_node`: number of ranks that a node can run."""
    rank = ranks[found.rank]
    configured = _configured_blocks(rank, config)
    if configured is not None and configured * rank.block + slot_bytes(config, found.max_model_len) > rank.free:
        return _too_large(found, rank, config)
    least = least_length(config)
    needed = _blocks_per_sequence(spec, config, least) * rank.block
    if found.num_blocks * rank.block >= needed and found.max_model_len >= least:
        return None
    fits = min(_longest(each, spec, config) for each in ranks)
    if config.kv_cache_memory is not None:
        room = f"--kv-cache-memory {round(config.kv_cache_memory / GIB, 5):g} is"
    elif configured is not None:
        room = f"--num-gpu-blocks-override {configured} is"
    else:
        room = f"rank {found.rank} has {size(max(rank.room, 0))} left for it,"
    helps = [f"--max-model-len {fits}"] if fits > 1 else []
    gib = -(-needed * 100 // GIB) / 100  # rounded up to hundredths
    if gib * GIB + slot_bytes(config, least) > rank.free:
        helps.append(wider(rank, spec, config, per_node))
    elif config.num_gpu_blocks_override is not None:
        helps.append(f"--num-gpu-blocks-override {needed // rank.block}")
    else:
        helps.append(f"--kv-cache-memory {gib:g} ({size(rank.free)} are free)")
    what = "auto takes no less" if config.fit_max_model_len else "--max-model-len"
    return UserError(
        f"one sequence of {least:,} tokens ({what}) needs {size(needed)} of KV cache a rank, and {room} "
        f"enough for {fits:,}: pass {', or '.join(helps)}",
        param="max_model_len",
    )


def _too_large(found: KVCacheConfig, rank: MemoryProfile, config: EngineConfig) -> UserError:
    """The error for a configured cache that exceeds free memory."""
    most = max(0, rank.free - slot_bytes(config, found.max_model_len))
    if config.kv_cache_memory is not None:
        name, value, at_most = "kv_cache_memory", f"{round(config.kv_cache_memory / GIB, 5):g}", f"{most * 100 // GIB / 100:g}"
    else:
        name, value, at_most = "num_gpu_blocks_override", str(found.num_blocks), str(most // rank.block)
    return UserError(
        f"--{name.replace('_', '-')} {value} does not fit: beside weights, activations and LM head rank {found.rank} has "
        f"{size(most)} free: pass at most {at_most}, or leave it out",
        param=name,
    )


def weights_refusal(
    ranks: Sequence[MemoryProfile], spec: ModelSpec, config: EngineConfig, per_node: int
) -> tuple[int, UserError] | None:
    """The first rank whose weights do not fit, and the error; None when all fit. Before loading, only `free` is measured."""
    short = [i for i, rank in enumerate(ranks) if rank.weights > rank.free]
    if not short:
        return None
    first, layout = short[0], config.layout
    rank = ranks[first]
    return first, UserError(
        f"the weights of rank {first} take {size(rank.weights)} (TP {layout.tp} x PP {layout.pp}, {config.dtype}), and "
        f"{size(max(0, rank.free))} are free for it: pass {wider(rank, spec, config, per_node)}, or free the memory"
    )


def wider(rank: MemoryProfile, spec: ModelSpec, config: EngineConfig, per_node: int) -> str:
    """The first larger layout, of ranks with as much memory as `rank`, that holds the model and one sequence, as flags.

    Uses today's bytes of activations, LM head, graphs and communication; more ranks never need more.
    """
    length = least_length(config)
    positions = _blocks_per_sequence(spec, config, length) * config.block_size
    for layout in _layouts(spec, config.layout, per_node):
        weights = largest_weight_bytes(spec, layout, held_format(config))
        cache = position_bytes(largest_count(spec, layout), config) * positions
        rest = rank.activations + rank.head + rank.graphs + rank.communication
        each = weights + cache + rest + slot_bytes(config, length)
        if each <= rank.share:
            nodes = -(-layout.world_size // per_node)
            where = f" on {nodes} nodes" if nodes > 1 else ""
            return f"-tp {layout.tp} -pp {layout.pp} ({layout.world_size} ranks{where}, about {size(each)} each)"
    return "larger --tensor-parallel-size and --pipeline-parallel-size on more ranks"


def _layouts(spec: ModelSpec, now: ParallelLayout, per_node: int) -> Iterator[ParallelLayout]:
    """Layouts of twice, four times, ... as many ranks. Those that keep a stage inside a node come first, largest TP first."""
    factor = 2
    while factor <= _MOST_FACTOR:
        world = now.world_size * factor
        widest = min(world, spec.num_heads, spec.experts.count if now.expert_parallel and spec.experts is not None else world)
        widths = [tp for tp in range(1, widest + 1) if world % tp == 0 and world // tp <= spec.num_layers]
        for tp in sorted(widths, key=lambda tp: (tp > max(per_node, now.tp), -tp)):
            yield ParallelLayout(tp, world // tp, even_layers(spec.num_layers, world // tp), now.expert_parallel)
        factor *= 2


# Reports


def ledger_of(rank: MemoryProfile, found: KVCacheConfig, config: EngineConfig) -> MemoryLedger:
    """The memory ledger of a rank with this KV cache."""
    return MemoryLedger(
        total=rank.total,
        others=rank.others,
        weights=rank.weights,
        activations=rank.activations,
        head=rank.head,
        slots=slot_bytes(config, found.max_model_len),
        kv_cache=found.num_blocks * rank.block,
        num_blocks=found.num_blocks,
        block_size=config.block_size,
        max_model_len=found.max_model_len,
        graphs=rank.graphs,
        communication=rank.communication,
    )


def ledger_line(rank: int, ledger: MemoryLedger, config: EngineConfig) -> str:
    """One rank's memory in one line."""
    scope = f"on the device, {size(ledger.others)} not ours" if config.device == "cuda" else "for it"
    on_card = f"graphs {size(ledger.graphs)}, communication {size(ledger.communication)}, " if config.device == "cuda" else ""
    return (
        f"memory of rank {rank} (stage {config.layout.stage_of(rank)}): {size(ledger.total)} {scope}, weights "
        f"{size(ledger.weights)}, activations {size(ledger.activations)}, LM head rows {size(ledger.head)}, "
        f"{on_card}slots {size(ledger.slots)}, KV cache {size(ledger.kv_cache)}"
    )


def report(ledgers: Sequence[MemoryLedger], found: KVCacheConfig, spec: ModelSpec, config: EngineConfig) -> list[str]:
    """Log lines in vLLM's words: the fullest rank of each stage, the KV cache's size, the concurrency.

    The size in tokens counts sequences of the greatest length: with windows, a shorter sequence needs more blocks per token.
    """
    layout = config.layout

    def left(rank: int) -> int:
        ledger = ledgers[rank]
        work = ledger.activations + ledger.head + ledger.graphs + ledger.communication + ledger.slots
        return ledger.total - ledger.others - ledger.weights - work - ledger.kv_cache

    stages = [range(stage * layout.tp, (stage + 1) * layout.tp) for stage in range(layout.pp)]
    fullest = [found.rank if found.rank in stage else min(stage, key=left) for stage in stages]
    ledger = ledgers[found.rank]
    each = _blocks_per_sequence(spec, config, ledger.max_model_len)
    tokens = ledger.num_blocks * ledger.block_size * -(-ledger.max_model_len // ledger.block_size) // each
    windows = f", {each:,} for a sequence of {ledger.max_model_len:,} tokens" if any(spec.windows) else ""
    device = "GPU" if config.device == "cuda" else "CPU"
    lines = [ledger_line(rank, ledgers[rank], config) for rank in fullest]
    lines.append(f"{device} KV cache size: {tokens:,} tokens ({ledger.num_blocks:,} blocks of {ledger.block_size}{windows})")
    if config.fit_max_model_len:
        some = f"{ledger.max_model_len:,} of" if ledger.max_model_len < config.max_model_len else "all of"
        lines.append(f"max_model_len auto: {some} the model's {config.max_model_len:,} tokens fit the KV cache")
    lines.append(f"Maximum concurrency for {ledger.max_model_len:,} tokens per request: {ledger.num_blocks / each:.2f}x")
    return lines
