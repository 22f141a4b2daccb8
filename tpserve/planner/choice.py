"""The recommended layout, with reasons and warnings in sentences. Pure.

one GPU holds the model and the sequences   no parallelism
NVLink                                      TP inside a node, PP across nodes; the lowest floor of a token's time
PCIe                                        as little TP as possible
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tpserve.config.sizes import size
from tpserve.planner.estimate import Estimate, GpuCluster

FEW_SEQUENCES = 8
"""Without --concurrency, room for fewer sequences than this gives a warning."""


@dataclass(frozen=True)
class LayoutChoice:
    """The recommendation. `best`: None when no layout fits. `why`: the reasons."""

    best: Estimate | None
    why: tuple[str, ...]
    warnings: tuple[str, ...]


def choose(
    tried: Sequence[Estimate],
    fewest: Callable[[Callable[[Estimate], bool]], Estimate | None],
    gpus: GpuCluster,
    wanted: int | None,
    max_start_s: int | None,
) -> LayoutChoice:
    """Choose one of the layouts `tried`, those of one GPU and of all GPUs.

    `fewest`: finds the layout of the fewest GPUs, available or not, that passes a test; None without one. `wanted`: sequences at
    once. `max_start_s`: the limit for loading, in seconds; missing it gives a warning.
    """
    fitting = [found for found in tried if found.fits]
    longest = max((found.length for found in fitting), default=0)  # they differ with --context auto

    def enough(found: Estimate) -> bool:
        return found.fits and found.concurrency >= (wanted or 0) and found.length >= longest

    if not fitting:
        return LayoutChoice(None, (_nothing(tried, fewest(lambda found: found.fits and not found.crosses), gpus),), ())
    single = next((found for found in fitting if found.layout.world_size == 1), None)
    if single is not None and enough(single):
        best, why = single, [_no_parallelism(single, gpus)]
    else:
        best = min(fitting, key=lambda found: (found.crosses, not enough(found), -found.length, *cost_key(found, gpus)))
        why = [*_because(best, gpus)]
        if single is not None and single is not best:
            why.insert(
                0, f"One {gpus.noun} holds the model, but {_room(single)}{f', and {wanted} are wanted' if wanted else ''}."
            )
        why.extend(_smaller(best, fewest(lambda found: enough(found) and not found.crosses), wanted, gpus))
    why.extend(f"The parts are uneven: {text}; the others wait for it." for text in best.uneven)
    return LayoutChoice(best, tuple(why), tuple(_warnings(best, gpus, wanted, max_start_s)))


def cost_key(found: Estimate, gpus: GpuCluster) -> tuple[float, ...]:
    """The sort key of layouts that hold the same; the lowest is best."""
    layout = found.layout
    if gpus.nvlink:
        return found.token_s, layout.expert_parallel, layout.world_size
    return -layout.world_size, layout.tp, layout.expert_parallel


def _no_parallelism(single: Estimate, gpus: GpuCluster) -> str:
    more = f" With all {gpus.num_gpus}, start a server on each and balance between them." if gpus.num_gpus > 1 else ""
    ledger = single.ledgers[0]
    return (
        f"No parallelism needed: one {gpus.noun} holds the model ({size(ledger.weights)} of weights in {size(ledger.total)}) and "
        f"{_room(single)}; with more {gpus.noun}s every token would wait for communication.{more}"
    )


def _because(best: Estimate, gpus: GpuCluster) -> list[str]:
    layout, why = best.layout, list[str]()
    if layout.world_size == 1:
        return [f"One {gpus.noun} holds the model, and no larger layout holds as many sequences as requested."]
    if layout.tp > 1 and best.crosses:
        why.append(f"TP {layout.tp} over several nodes: no layout with each stage inside a node fits.")
    elif layout.tp > 1 and gpus.nvlink:
        where = "inside a node" if best.nodes > 1 else f"over {gpus.link}"
        why.append(
            f"TP {layout.tp} {where}: its {gpus.noun}s share every layer, so that a token waits for a part of each; the two "
            "all-reduces a layer need the fast links."
        )
    elif layout.tp > 1:
        why.append(f"TP {layout.tp}, though PCIe makes all-reduces slow: with less TP the model or the sequences do not fit.")
    if layout.pp > 1 and not gpus.nvlink:
        why.append(
            f"PP {layout.pp} over PCIe: stages pass activations on once, where TP would need two all-reduces a layer over the "
            "bus. One sequence is no faster with it; many keep all stages busy."
        )
    if layout.pp > 1 and best.nodes > 1:
        why.append(f"PP {layout.pp} across nodes: only the activations at the end of a stage cross the network.")
    elif layout.pp > 1 and gpus.nvlink:
        why.append(f"PP {layout.pp}: wider TP does not fit or leaves a rank with more to read.")
    return why


def _smaller(best: Estimate, fewest: Estimate | None, wanted: int | None, gpus: GpuCluster) -> list[str]:
    if fewest is None or fewest.layout.world_size >= best.layout.world_size:
        return []
    content = f"{wanted} sequences at once" if wanted else "the model and a sequence"
    count = fewest.layout.world_size
    return [f"{count} {gpus.noun}{'s' * (count > 1)} would hold {content}: {fewest.name}, {_room(fewest)}."]


def _nothing(tried: Sequence[Estimate], fewest: Estimate | None, gpus: GpuCluster) -> str:
    count = max(found.layout.world_size for found in tried)
    text = f"No layout fits {count} {gpus.noun}{'s' * (count > 1)}."
    if fewest is None:
        return f"{text} A shorter --context or smaller weights would help."
    nodes = f" on {fewest.nodes} nodes" if fewest.nodes > 1 else ""
    return f"{text} {fewest.layout.world_size} such {gpus.noun}s{nodes} would do: {fewest.name}, {_room(fewest)}."


def _room(found: Estimate) -> str:
    return f"its KV cache has room for {several(found.concurrency)} sequences of {found.length:,} tokens"


def several(number: float) -> str:
    """A number of sequences as text, with one decimal below 100."""
    return f"{number:.1f}" if number < 100 else f"{number:,.0f}"


def _warnings(best: Estimate, gpus: GpuCluster, wanted: int | None, max_start_s: int | None) -> list[str]:
    warnings = []
    if best.concurrency < (wanted or FEW_SEQUENCES):
        short = f"of the {wanted} wanted; the others wait" if wanted else "at once; further ones wait"
        warnings.append(
            f"KV cache for {several(best.concurrency)} sequences of {best.length:,} tokens {short}: a shorter "
            f"--context, more {gpus.noun}s, or more memory on each"
        )
    if best.crosses:
        warnings.append("TP across nodes: every layer waits twice for the network")
    if max_start_s is not None and best.load_s is not None and gpus.disk_rate is not None and best.load_s > max_start_s:
        needed = gpus.disk_rate * best.load_s / max_start_s / 1e9
        warnings.append(
            f"--max-start-time {max_start_s}s cannot be met: reading the weights alone takes {best.load_s:,.0f} s at "
            f"{gpus.disk_rate / 1e9:,.3g} GB/s a node; that takes {needed:,.3g} GB/s, or weights in the page cache"
        )
    return warnings
