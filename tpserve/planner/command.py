"""`tpserve plan MODEL --gpus 16 --gpu-memory 80GB`: its flags, and the way from them to a page. Never loads torch, needs no GPU.

All other flags are the server's, and mean the same. Exit code 0 when a layout fits, 1 when none does, 2 for a mistake.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal

from msgspec import Struct
from msgspec.structs import replace

from tpserve.cli import server_flags
from tpserve.cli.command import Command
from tpserve.cli.option import OPTIONS
from tpserve.config import env
from tpserve.config.schema import Flag, Flags
from tpserve.errors import UserError
from tpserve.hub.locate import describe
from tpserve.models.load_config import load_model_config
from tpserve.planner import page, quantities
from tpserve.planner.choice import choose, cost_key
from tpserve.planner.estimate import Estimate, GpuCluster, PlanRequest, estimate, layouts
from tpserve.planner.model import stored
from tpserve.types.model_spec import ModelSpec

CARDS, LOAD, START, OUTPUT = "GPUs", "What is served", "Start", "Output"
NODE = 8
CONTEXT = 8192
_MOST_GPUS = 1024
_MOST_TRIED = 256
"""So many GPUs are looked at when fewer do not do."""
_DECIDED = (
    *("tensor_parallel_size", "pipeline_parallel_size", "pipeline_layer_map", "device", "max_model_len"),
    *("nproc_per_node", "nnodes", "node_rank", "headless"),
)
"""Flags of the server that the plan is about."""


class PlanFlags(Struct, frozen=True, kw_only=True):
    """The flags of `tpserve plan`. None: not said."""

    gpus: Annotated[int | None, Flag(CARDS, "GPUs there are in all.", at_least=1, at_most=_MOST_GPUS)] = None
    gpus_per_node: Annotated[int | None, Flag(CARDS, f"GPUs of a node. Default: {NODE}.", at_least=1, at_most=_MOST_GPUS)] = None
    gpu_memory: Annotated[
        int | None,
        Flag(
            CARDS,
            "Memory of each, as it is sold (80GB), or better as nvidia-smi shows it (81559MiB).",
            parse=quantities.memory,
            metavar="SIZE",
        ),
    ] = None
    interconnect: Annotated[
        Literal["nvlink", "pcie"], Flag(CARDS, "What links the GPUs of a node: pcie prefers pipeline stages.")
    ] = "nvlink"
    memory_bandwidth: Annotated[
        int,
        Flag(
            CARDS,
            "What a GPU reads of its memory in a second, such as 864GB/s of an L40S. Default: 3350GB/s, an H100's.",
            parse=quantities.rate,
            metavar="RATE",
        ),
    ] = 3_350_000_000_000
    context: Annotated[
        int | Literal["auto"] | None,
        Flag(
            LOAD,
            "Tokens of a sequence, prompt and output; the server's --max-model-len. auto: as many as fit, for --concurrency "
            f"sequences where that is said. Default: {CONTEXT}, or the model's if less.",
            at_least=2,
        ),
    ] = None
    concurrency: Annotated[
        int | None, Flag(LOAD, "Sequences of that length that are to fit at once. Default: not said.", at_least=1)
    ] = None
    disk_rate: Annotated[
        int | None,
        Flag(START, "What a node reads of its disk in a second, such as 2GB/s.", parse=quantities.rate, metavar="RATE"),
    ] = None
    max_start_time: Annotated[
        int | None,
        Flag(START, "What loading may take, such as 120s; needs --disk-rate.", parse=quantities.duration, metavar="TIME"),
    ] = None
    json: Annotated[bool, Flag(OUTPUT, "Everything as JSON, with every layout's ranks and command lines.")] = False


COMMAND = Command(
    "plan",
    "Which layouts of tensor and pipeline parallel ranks hold a model, from config.json and the headers of its files alone: no\n"
    "weights are read and no GPU is needed. Says which to take, why, and the lines to paste. Takes MODEL and the server's flags\n"
    "as `tpserve serve` does, such as --dtype, --enable-expert-parallel, --gpu-memory-utilization or --master-addr.",
    PlanFlags,
    takes_server_flags=True,
)


def run(argv: Sequence[str]) -> int:
    """Print a plan; returns the exit code. Raises UserError, or HelpWanted."""
    plan, rest, _ = COMMAND.parse(argv)
    said, notice = server_flags.read_line(rest, env.overrides())
    if notice:
        sys.stderr.write(f"tpserve plan: {notice}\n")
    gpus = _cards(plan)
    for name in _DECIDED:
        if getattr(said, name) != OPTIONS[name].default:
            instead = "give --context" if name == "max_model_len" else "leave it out"
            raise UserError(f"{OPTIONS[name].flag} is what `tpserve plan` is to find: {instead}", param=name)
    flags, files, spec = load_model_config(said, describe)
    flags, said = (_flags(given, plan, spec) for given in (flags, said))
    on_disk = stored(files)
    request = PlanRequest(flags, files, spec, None if on_disk is None else on_disk.num_bytes, plan.concurrency or 1)
    only_experts = flags.enable_expert_parallel

    def tried(world_size: int) -> list[Estimate]:
        return [estimate(request, gpus, layout) for layout in layouts(spec, world_size, only_experts=only_experts)]

    def fewest(passes: Callable[[Estimate], bool]) -> Estimate | None:
        for world_size in _worlds(gpus):
            if found := [each for each in tried(world_size) if passes(each)]:
                return min(found, key=lambda each: cost_key(each, gpus))
        return None

    results = [each for size in sorted({1, gpus.num_gpus}) for each in tried(size)]
    choice = choose(results, fewest, gpus, plan.concurrency, plan.max_start_time)
    found = page.PlanPage(said, spec, on_disk, gpus, plan.concurrency, results, choice)
    sys.stdout.write(page.as_json(found) if plan.json else page.as_text(found))
    return 0 if choice.best is not None else 1


def _cards(plan: PlanFlags) -> GpuCluster:
    """The flags of the GPUs, checked against each other."""
    if plan.gpus is None or plan.gpu_memory is None:
        missing = "--gpus" if plan.gpus is None else "--gpu-memory"
        raise UserError(f"{missing} is missing: `tpserve plan MODEL --gpus 16 --gpu-memory 80GB`", param=missing)
    per_node = plan.gpus_per_node or NODE
    if plan.gpus > per_node and plan.gpus % per_node:
        alike = max(size for size in range(1, per_node + 1) if plan.gpus % size == 0)
        raise UserError(
            f"--gpus {plan.gpus} is no multiple of {per_node} GPUs a node: nodes are to be alike; give --gpus-per-node {alike}",
            param="gpus_per_node",
        )
    if plan.max_start_time is not None and plan.disk_rate is None:
        raise UserError("--max-start-time is a question of the disk: give --disk-rate, too, such as 2GB/s", param="disk_rate")
    return GpuCluster(plan.gpus, per_node, plan.gpu_memory, plan.memory_bandwidth, plan.interconnect == "nvlink", plan.disk_rate)


def _flags(given: Flags, plan: PlanFlags, spec: ModelSpec) -> Flags:
    """The server's flags as the plan means them."""
    if given.enable_expert_parallel and spec.experts is None:
        raise UserError("--enable-expert-parallel, but the model has no experts: leave it out", param="enable_expert_parallel")
    most = spec.max_position
    if isinstance(plan.context, int) and plan.context > most:
        raise UserError(f"--context {plan.context} is beyond the model's {most:,} tokens: give at most that", param="context")
    context = plan.context or min(CONTEXT, most)
    return replace(given, max_model_len=context, max_num_seqs=max(given.max_num_seqs, plan.concurrency or 1))


def _worlds(gpus: GpuCluster) -> Iterator[int]:
    """Numbers of GPUs, growing: parts of a node, nodes, and more of them than there are."""
    node = gpus.per_node
    yield from (size for size in range(1, node) if node % size == 0)
    yield from range(node, gpus.num_gpus, node)
    size = max(node, gpus.num_gpus)
    while size <= max(_MOST_TRIED, gpus.num_gpus):
        yield size
        size *= 2
