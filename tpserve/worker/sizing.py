"""What fits: from what every rank measured to one length and one number of KV blocks, or to what would help. Pure.

All ranks compute this from the same numbers and come to the same end. A rank's memory, in bytes:

    [0, others) not ours | weights, tables | activations | head | slots | KV cache | kept free by --gpu-memory-utilization
                                                                 |<----- room ---->|
                                                                 |<---------------------- free ---------------------->|
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tpserve.config.schema import EngineConfig
from tpserve.config.sizes import GIB, size
from tpserve.errors import UserError
from tpserve.models.param_count import count_params, largest_count
from tpserve.types.layout import ParallelLayout, even_layers
from tpserve.types.messages import MemoryLedger
from tpserve.types.model_spec import ModelSpec
from tpserve.types.window import blocks_needed, max_length

AUTO_LEAST = 1024
"""A context shorter than this is of little use: `--max-model-len auto` refuses to go below it (a number given may)."""
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_MOST_FACTOR = 64
"""How many times as many ranks are looked at for a layout that fits."""


@dataclass(frozen=True)
class MemoryProfile:
    """One rank's memory in bytes. `share`: what the rank may take in all; `block`: a KV block in all cache arrays."""

    total: int
    others: int
    share: int
    weights: int
    activations: int
    head: int
    room: int
    free: int
    block: int


@dataclass(frozen=True)
class KVCacheConfig:
    """The longest sequence, the number of KV blocks of every rank, and the rank that decided it."""

    max_model_len: int
    num_blocks: int
    rank: int


def fit_kv_cache(ranks: Sequence[MemoryProfile], spec: ModelSpec, config: EngineConfig) -> KVCacheConfig:
    """What all ranks can hold. Whether it is enough is for `refusal` to say."""
    length = config.max_model_len
    if config.fit_max_model_len:
        length = min(_longest(rank, spec, config) for rank in ranks)
    blocks = [_blocks(rank, config, length) for rank in ranks]
    decides = min(range(len(ranks)), key=lambda rank: (blocks[rank], ranks[rank].free))
    return KVCacheConfig(length, blocks[decides], decides)


def least_length(config: EngineConfig) -> int:
    """The longest sequence must be this long at least, or the server does not start."""
    return min(AUTO_LEAST, config.max_model_len) if config.fit_max_model_len else config.max_model_len


def weight_bytes(spec: ModelSpec, config: EngineConfig, rank: int) -> int:
    """Of a rank's share of the model."""
    return ITEM_BYTES[config.dtype] * count_params(spec, config.layout, rank).weights


def slot_bytes(config: EngineConfig, length: int) -> int:
    """Tokens of all slots, on the device."""
    return config.max_num_seqs * (length + 1) * 4


def _given(rank: MemoryProfile, config: EngineConfig) -> int | None:
    """The number of blocks that was said instead of measured."""
    if config.kv_cache_memory is not None:
        return config.kv_cache_memory // rank.block
    return config.num_gpu_blocks_override


def _blocks(rank: MemoryProfile, config: EngineConfig, length: int) -> int:
    given = _given(rank, config)
    return max(0, (rank.room - slot_bytes(config, length)) // rank.block) if given is None else given


def _longest(rank: MemoryProfile, spec: ModelSpec, config: EngineConfig) -> int:
    """The longest sequence whose blocks and slots the rank has room for: whole blocks, or the longest there may be."""
    given = _given(rank, config)

    def fits(length: int) -> bool:
        blocks = _sequence(spec, config, length)
        return blocks * rank.block + slot_bytes(config, length) <= rank.room if given is None else blocks <= given

    return max_length(fits, config.block_size, config.max_model_len)


def _sequence(spec: ModelSpec, config: EngineConfig, length: int) -> int:
    """Blocks with which one sequence of a length can be served."""
    return blocks_needed(length, spec.windows, config.block_size)


# What does not fit, and what would


def refusal(
    found: KVCacheConfig, ranks: Sequence[MemoryProfile], spec: ModelSpec, config: EngineConfig, per_node: int
) -> UserError | None:
    """Why this server cannot start, with what would help; None when it can. `per_node`: ranks that a node has place for."""
    rank = ranks[found.rank]
    if (given := _given(rank, config)) is not None and given * rank.block + slot_bytes(config, found.max_model_len) > rank.free:
        return _too_large(found, rank, config)
    least = least_length(config)
    needed = _sequence(spec, config, least) * rank.block
    if found.num_blocks * rank.block >= needed and found.max_model_len >= least:
        return None
    fits = min(_longest(each, spec, config) for each in ranks)
    if config.kv_cache_memory is not None:
        room = f"--kv-cache-memory {round(config.kv_cache_memory / GIB, 5):g} is"
    elif given is not None:
        room = f"--num-gpu-blocks-override {given} is"
    else:
        room = f"rank {found.rank} has {size(max(rank.room, 0))} left for it,"
    helps = [f"--max-model-len {fits}"] if fits > 1 else []
    gib = -(-needed * 100 // GIB) / 100  # in steps of a hundredth, none too few
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
    most = max(0, rank.free - slot_bytes(config, found.max_model_len))
    if config.kv_cache_memory is not None:
        name, said, at_most = "kv_cache_memory", f"{round(config.kv_cache_memory / GIB, 5):g}", f"{most * 100 // GIB / 100:g}"
    else:
        name, said, at_most = "num_gpu_blocks_override", str(found.num_blocks), str(most // rank.block)
    return UserError(
        f"--{name.replace('_', '-')} {said} does not fit: beside weights, activations and LM head rank {found.rank} has "
        f"{size(most)} free: pass at most {at_most}, or leave it out",
        param=name,
    )


def weights_refusal(
    ranks: Sequence[MemoryProfile], spec: ModelSpec, config: EngineConfig, per_node: int
) -> tuple[int, UserError] | None:
    """The rank whose weights do not fit, and what to say; None when all do. For before loading: only `free` is measured."""
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
    """The first layout of more ranks, each with as much memory as `rank`, that holds the model and one sequence.

    Activations and LM head are taken as they are now, which they do not exceed with more ranks.
    """
    length = least_length(config)
    item = ITEM_BYTES[config.dtype]
    entries = _sequence(spec, config, length) * config.block_size
    for layout in _layouts(spec, config.layout, per_node):
        most = largest_count(spec, layout)
        each = item * (most.weights + most.cached * entries) + rank.activations + rank.head + slot_bytes(config, length)
        if each <= rank.share:
            nodes = -(-layout.world_size // per_node)
            where = f" on {nodes} nodes" if nodes > 1 else ""
            return f"-tp {layout.tp} -pp {layout.pp} ({layout.world_size} ranks{where}, about {size(each)} each)"
    return "larger --tensor-parallel-size and --pipeline-parallel-size on more ranks"


def _layouts(spec: ModelSpec, now: ParallelLayout, per_node: int) -> Iterator[ParallelLayout]:
    """Twice, four times, ... as many ranks; of the same number first those that keep a stage inside a node, widest first."""
    factor = 2
    while factor <= _MOST_FACTOR:
        world = now.world_size * factor
        widest = min(world, spec.num_heads, spec.experts.count if now.expert_parallel and spec.experts is not None else world)
        widths = [tp for tp in range(1, widest + 1) if world % tp == 0 and world // tp <= spec.num_layers]
        for tp in sorted(widths, key=lambda tp: (tp > max(per_node, now.tp), -tp)):
            yield ParallelLayout(tp, world // tp, even_layers(spec.num_layers, world // tp), now.expert_parallel)
        factor *= 2


# In words


def ledger_of(rank: MemoryProfile, found: KVCacheConfig, config: EngineConfig) -> MemoryLedger:
    """The memory of a rank as it will be."""
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
    )


def ledger_line(rank: int, ledger: MemoryLedger, config: EngineConfig) -> str:
    """One rank's memory in one line."""
    whole = f"on the device, {size(ledger.others)} not ours" if config.device == "cuda" else "for it"
    return (
        f"memory of rank {rank} (stage {config.layout.stage_of(rank)}): {size(ledger.total)} {whole}, weights "
        f"{size(ledger.weights)}, activations {size(ledger.activations)}, LM head rows {size(ledger.head)}, "
        f"slots {size(ledger.slots)}, KV cache {size(ledger.kv_cache)}"
    )


def report(ledgers: Sequence[MemoryLedger], found: KVCacheConfig, spec: ModelSpec, config: EngineConfig) -> list[str]:
    """What was decided, in the words that operators look for; of each stage the rank whose memory is fullest.

    The size in tokens is that of as many sequences of the greatest length as fit: with windows a short one takes more a token.
    """
    layout = config.layout

    def left(rank: int) -> int:
        ledger = ledgers[rank]
        return ledger.total - ledger.others - ledger.weights - ledger.activations - ledger.head - ledger.slots - ledger.kv_cache

    stages = [range(stage * layout.tp, (stage + 1) * layout.tp) for stage in range(layout.pp)]
    fullest = [found.rank if found.rank in stage else min(stage, key=left) for stage in stages]
    ledger = ledgers[found.rank]
    each = _sequence(spec, config, ledger.max_model_len)
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
