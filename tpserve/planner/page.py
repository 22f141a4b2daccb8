"""The output of `tpserve plan`: a table, sentences and command lines, or the same as JSON. Decides nothing."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec.structs import asdict, replace

from tpserve.cli import server_flags
from tpserve.config.flags import Flags
from tpserve.config.sizes import size
from tpserve.models.param_count import count_params
from tpserve.planner.choice import LayoutChoice, several
from tpserve.planner.estimate import OTHERS_BYTES, Estimate, GpuCluster
from tpserve.planner.model import StoredWeights
from tpserve.planner.predictions import KernelWork, StepPrediction, total
from tpserve.types.layout import ParallelLayout
from tpserve.types.model_spec import ModelSpec
from tpserve.worker.sizing import CPU_CACHE_MOST, CPU_CACHE_SHARE

HEAD = "HEAD"
"""Stands for the address of node 0."""
COLUMNS = (
    *("layout", "nodes", "weights", "activations", "LM head", "graphs", "links", "KV cache"),
    *("KV tokens", "sequences", "ms/token", ""),
)
GB = 10**9
FLOATS = {"F64", "F32", "BF16", "F16"}
"""Dtypes of unquantized weights."""


@dataclass(frozen=True)
class PlanPage:
    """Everything to print. `flags`: the server's flags as given, without a layout."""

    flags: Flags
    spec: ModelSpec
    stored: StoredWeights | None
    gpus: GpuCluster
    wanted: int | None
    tried: Sequence[Estimate]
    choice: LayoutChoice
    predictions: Sequence[StepPrediction] = ()
    """Of the recommended layout, on GPUs."""


def as_text(page: PlanPage) -> str:
    """The plan as text."""
    lines = [*_about(page), "", *_table(page), *_refused(page.tried), "", *page.choice.why]
    lines += [f"Warning: {text}." for text in [*_mismatch(page), *page.choice.warnings]]
    best = page.choice.best
    if best is not None:
        if best.load_s is not None:
            lines.append(f"Loading takes at least {best.load_s:,.0f} s: the busiest node reads that long from its disk.")
        lines.append(f"\n{best.name}, to paste:")
        for serve, torchrun in commands(page, best):
            lines += [f"    {serve}", f"    {torchrun}"]
        lines.append("(one line of each pair, on its own node)" if best.nodes > 1 else "(one of the two)")
        lines += _predicted(page, best)
    return "\n".join(lines) + "\n"


def as_json(page: PlanPage) -> str:
    """The plan as JSON, with every figure in bytes, tokens or seconds."""
    best = page.choice.best
    fields = {
        "model": page.flags.model,
        "parameters": _parameters(page.spec),
        "checkpoint": page.stored,
        "gpus": page.gpus,
        "max_model_len": page.flags.max_model_len,
        "wanted_concurrency": page.wanted,
        "layouts": [_layout(page, each) for each in page.tried],
        "recommended": None if best is None else page.tried.index(best),
        "why": page.choice.why,
        "warnings": [*_mismatch(page), *page.choice.warnings],
        "predictions": page.predictions,
    }
    return msgspec.json.format(msgspec.json.encode(fields), indent=1).decode() + "\n"


def commands(page: PlanPage, found: Estimate) -> list[tuple[str, str]]:
    """The two command lines of each node, with `tpserve serve` and with torchrun."""
    flags, gpus = page.flags, page.gpus
    if flags.max_model_len == "auto" and page.wanted is not None:  # a server's "auto" makes room for one sequence only
        flags = replace(flags, max_model_len=found.length)
    layout, head = found.layout, flags.master_addr or HEAD
    more = server_flags.to_argv(replace(flags, model=None, enable_expert_parallel=layout.expert_parallel))
    model = [flags.model] if flags.model is not None else []
    server = [*model, "-tp", str(layout.tp), "-pp", str(layout.pp), *more]
    local = str(min(gpus.per_node, layout.world_size))
    if found.nodes == 1:
        return [(_line("tpserve serve", server), _line(f"torchrun --nproc-per-node {local} -m tpserve", server))]
    lines = []
    for node in range(found.nodes):
        launch = ["--nnodes", str(found.nodes), "--node-rank", str(node), "--master-addr", head]
        torchrun = f"torchrun --nnodes {found.nodes} --node_rank {node} --nproc_per_node {local} --master_addr {head} -m tpserve"
        headless = ["--headless"] if node else []
        lines.append((_line("tpserve serve", [*server, *launch, *headless]), _line(torchrun, server)))
    return lines


def _line(start: str, arguments: Sequence[str]) -> str:
    return f"{start} {shlex.join(arguments)}"


def _about(page: PlanPage) -> Iterator[str]:
    spec, gpus = page.spec, page.gpus
    model = page.flags.model or "the built-in model"
    cached = f"{spec.num_kv_heads} of keys and values" if spec.latent is None else "latents"
    experts = f", {spec.experts.routing.num_active} of {spec.experts.count} experts" if spec.experts is not None else ""
    yield (
        f"{model}: {_parameters(spec) / 1e9:,.2f} billion parameters, {spec.num_layers} layers, {spec.num_heads} heads, "
        f"{cached}{experts}"
    )
    if page.stored is not None:
        kinds = f", {' and '.join(page.stored.kinds)}" if page.stored.kinds else ""
        yield f"weight files: {page.stored.num_files}, {page.stored.num_bytes / GB:,.2f} GB{kinds}"
    where = f" on {gpus.nodes_of(gpus.num_gpus)} nodes" if gpus.num_gpus > gpus.per_node else ""
    wanted = f", {page.wanted} at once" if page.wanted else ""
    max_len = page.flags.max_model_len
    length = (
        f"sequences of {max_len:,} tokens"
        if isinstance(max_len, int)
        else f"sequences as long as fit, up to {spec.max_position:,}"
    )
    yield (
        f"{gpus.num_gpus} {gpus.noun}{'s' * (gpus.num_gpus > 1)}{where}, {size(gpus.memory)} and "
        f"{gpus.memory_rate / GB:,.0f} GB/s each, {gpus.link}; {length}{wanted}"
    )


def _table(page: PlanPage) -> list[str]:
    is_auto = page.flags.max_model_len == "auto"
    rows = [COLUMNS, *(_row(found, is_auto) for found in page.tried if found.fits)]
    if len(rows) == 1:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    cells = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:]), row[-1]]) for row in rows]
    share = f"{page.flags.gpu_memory_utilization:.0%} of its card less {size(OTHERS_BYTES)} for CUDA and the driver"
    if page.gpus.is_cpu:
        share = (
            f"KV cache: {CPU_CACHE_SHARE:.0%} of what stays free, at most {size(CPU_CACHE_MOST)} a node without --kv-cache-memory"
        )
    return [f"Of each rank, the fullest ({share}):", *map(str.rstrip, cells)]


def _row(found: Estimate, is_auto: bool) -> tuple[str, ...]:
    """The table's row of a layout, with the memory of its fullest rank."""
    length = f"sequences of {found.length:,} tokens"
    ledger = found.ledgers[found.decides]
    return (
        found.name,
        str(found.nodes),
        *map(size, (ledger.weights, ledger.activations, ledger.head, ledger.graphs, ledger.communication, ledger.kv_cache)),
        f"{found.kv_tokens:,}",
        several(found.concurrency),
        f"{found.token_s * 1e3:,.2f}",
        "; ".join([length] * is_auto + ["TP across nodes"] * found.crosses + list(found.uneven)),
    )


def _predicted(page: PlanPage, best: Estimate) -> list[str]:
    """The table of predictions, which has nothing that was measured."""
    if not page.predictions:
        return []
    steps, first = page.predictions, page.predictions[0]
    header = ["kernel", "launches", *(f"{step.batch}: {what}" for step in steps for what in ("bytes", "operations"))]
    rows = [header]
    for kernel, *others in zip(*(step.kernels for step in steps), strict=True):
        rows.append([kernel.name, f"{kernel.launches:,}", *(cell for each in (kernel, *others) for cell in _work(each))])
    rows.append(["all", f"{total(first.kernels).launches:,}", *(cell for step in steps for cell in _work(total(step.kernels)))])
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    batches = ", ".join(str(step.batch) for step in steps)
    return [
        f"\nPredictions, counted and not measured: a decode step of rank {first.rank} at {batches} sequences of {best.length:,} "
        "tokens, whether or not they fit:",
        *("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows),
    ]


def _work(kernel: KernelWork) -> tuple[str, str]:
    """Bytes, and billions of operations."""
    return size(kernel.num_bytes) if kernel.num_bytes else "-", f"{kernel.flops / 1e9:,.1f} G" if kernel.flops else "-"


def _refused(tried: Sequence[Estimate]) -> list[str]:
    return [f"{found.name} does not fit: {found.why_not}" for found in tried if not found.fits]


def _mismatch(page: PlanPage) -> list[str]:
    """A warning when the files hold another number of parameters than config.json describes.

    Quantized files are not checked, since they also hold scales and pack several numbers in one element. A tied LM head may be
    stored twice, and some files hold layers that are not used.
    """
    if page.stored is None or page.stored.elements is None or not set(page.stored.kinds) <= FLOATS:
        return []
    expected, stored = _parameters(page.spec), page.stored.elements
    spare = page.spec.vocab_size * page.spec.hidden_size if page.spec.tie_embeddings else 0
    if 0.99 * expected <= stored <= 1.05 * expected + spare:
        return []
    return [f"the weight files hold {stored / 1e9:,.2f} billion numbers, and config.json describes {expected / 1e9:,.2f}"]


def _parameters(spec: ModelSpec) -> int:
    return count_params(spec, ParallelLayout(1, 1, (spec.num_layers,)), 0).weights


def _layout(page: PlanPage, found: Estimate) -> dict[str, Any]:
    layout = found.layout
    plain = {"tp": layout.tp, "pp": layout.pp, "expert_parallel": layout.expert_parallel, "nodes": found.nodes}
    if not found.ledgers:
        return {**plain, "fits": False, "why_not": found.why_not}
    return {
        **plain,
        "layers": layout.layers,
        "fits": found.fits,
        "why_not": found.why_not,
        "ranks": [asdict(ledger) for ledger in found.ledgers],
        "decides": found.decides,
        "kv_tokens": found.kv_tokens,
        "max_concurrency": round(found.concurrency, 3),
        "token_floor_s": round(found.token_s, 6),
        "load_floor_s": found.load_s,
        "crosses_nodes": found.crosses,
        "uneven": found.uneven,
        "commands": [{"serve": serve, "torchrun": torchrun} for serve, torchrun in commands(page, found)],
    }
