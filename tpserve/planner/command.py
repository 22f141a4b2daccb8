"""`tpserve plan MODEL --gpus 16 --gpu-memory 80GB`: its flags, and the steps to the page. Never loads torch, needs no GPU.

All other flags are the server's and mean the same. Exit code: 0 when a layout fits, 1 when none does, 2 for a mistake.
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
from tpserve.config.flags import Flag, Flags
from tpserve.errors import UserError
from tpserve.hub.locate import describe
from tpserve.models.load_config import load_model_config
from tpserve.planner import page, quantities
from tpserve.planner.choice import choose, cost_key
from tpserve.planner.estimate import Estimate, GpuCluster, PlanRequest, config_of, estimate, layouts
from tpserve.planner.model import stored
from tpserve.planner.predictions import BATCHES, StepPrediction, predict
from tpserve.types.model_spec import ModelSpec

CARDS, LOAD, START, OUTPUT = "GPUs", "What is served", "Start", "Output"
DEFAULT_GPUS_PER_NODE = 8
DEFAULT_CONTEXT = 8192
DEFAULT_RATE = 3_350_000_000_000
_MAX_GPUS = 1024
_MAX_WORLD_SIZE = 256
"""Larger worlds than there are GPUs are tried up to this size, to say how many GPUs would hold the model."""
_PLANNED_FLAGS = (
    *("tensor_parallel_size", "pipeline_parallel_size", "pipeline_layer_map", "max_model_len"),
    *("nproc_per_node", "nnodes", "node_rank", "headless"),
)
"""Flags of the server whose values are the result of the plan."""


class PlanFlags(Struct, frozen=True, kw_only=True):
    """The flags of `tpserve plan`. None: the flag is not given."""

    gpus: Annotated[
        int | None,
        Flag(
            CARDS,
            "Number of GPUs, or with --device cpu of ranks, on all nodes.",
            at_least=1,
            at_most=_MAX_GPUS,
            aliases=("--ranks",),
        ),
    ] = None
    gpus_per_node: Annotated[
        int | None,
        Flag(
            CARDS,
            f"GPUs of a node. Default: {DEFAULT_GPUS_PER_NODE}, or with --device cpu all ranks.",
            at_least=1,
            at_most=_MAX_GPUS,
            aliases=("--ranks-per-node",),
        ),
    ] = None
    gpu_memory: Annotated[
        int | None,
        Flag(
            CARDS,
            "Memory of each GPU, as sold (80GB), or better as nvidia-smi shows it (81559MiB); --device cpu: of each rank.",
            parse=quantities.memory,
            metavar="SIZE",
            aliases=("--rank-memory",),
        ),
    ] = None
    interconnect: Annotated[
        Literal["nvlink", "pcie"], Flag(CARDS, "Links between the GPUs of a node; pcie prefers pipeline stages.")
    ] = "nvlink"
    memory_bandwidth: Annotated[
        int | None,
        Flag(
            CARDS,
            "Memory bandwidth of a GPU, such as 864GB/s for an L40S. Default: 3350GB/s, an H100's. With --device cpu that of a "
            "rank, as `tpserve bench roofline` measures it; there is no default.",
            parse=quantities.rate,
            metavar="RATE",
        ),
    ] = None
    context: Annotated[
        int | Literal["auto"] | None,
        Flag(
            LOAD,
            "Tokens of a sequence, prompt and output; the server's --max-model-len. auto: the longest that fits, with room for "
            f"--concurrency sequences if given. Default: {DEFAULT_CONTEXT}, or the model's if less.",
            at_least=2,
        ),
    ] = None
    concurrency: Annotated[
        int | None, Flag(LOAD, "Sequences of that length that must fit at once. Default: any number.", at_least=1)
    ] = None
    disk_rate: Annotated[
        int | None,
        Flag(START, "Read rate of a node's disk, such as 2GB/s.", parse=quantities.rate, metavar="RATE"),
    ] = None
    max_start_time: Annotated[
        int | None,
        Flag(START, "Limit for loading the weights, such as 120s; needs --disk-rate.", parse=quantities.duration, metavar="TIME"),
    ] = None
    json: Annotated[bool, Flag(OUTPUT, "Everything as JSON, with every layout's ranks and command lines.")] = False


COMMAND = Command(
    "plan",
    "Shows which layouts of tensor and pipeline parallel ranks hold a model, and recommends one with its command lines. Reads\n"
    "config.json and the headers of the weight files only, and needs no GPU. Takes MODEL and the server's flags\n"
    "as `tpserve serve` does, such as --dtype, --enable-expert-parallel, --gpu-memory-utilization or --master-addr.",
    PlanFlags,
    takes_server_flags=True,
)


def run(argv: Sequence[str]) -> int:
    """Print a plan; returns the exit code. Raises UserError, or HelpWanted."""
    plan, server_argv, _ = COMMAND.parse(argv)
    given_flags, note = server_flags.read_line(server_argv, env.overrides())
    if note:
        sys.stderr.write(f"tpserve plan: {note}\n")
    gpus = _cluster(plan, given_flags.device == "cpu")
    for name in _PLANNED_FLAGS:
        if getattr(given_flags, name) != OPTIONS[name].default:
            instead = "give --context" if name == "max_model_len" else "leave it out"
            raise UserError(f"{OPTIONS[name].flag} is a result of `tpserve plan`: {instead}", param=name)
    flags, files, spec = load_model_config(given_flags, describe)
    flags, given_flags = (_with_plan(each, plan, spec) for each in (flags, given_flags))
    on_disk = stored(files)
    request = PlanRequest(flags, files, spec, None if on_disk is None else on_disk.num_bytes, plan.concurrency or 1)
    only_experts = flags.enable_expert_parallel

    def tried(world_size: int) -> list[Estimate]:
        return [estimate(request, gpus, layout) for layout in layouts(spec, world_size, only_experts=only_experts)]

    def fewest(passes: Callable[[Estimate], bool]) -> Estimate | None:
        for world_size in _world_sizes(gpus):
            if passing := [each for each in tried(world_size) if passes(each)]:
                return min(passing, key=lambda each: cost_key(each, gpus))
        return None

    results = [each for size in sorted({1, gpus.num_gpus}) for each in tried(size)]
    choice = choose(results, fewest, gpus, plan.concurrency, plan.max_start_time)
    predictions = () if choice.best is None or gpus.is_cpu else _predictions(request, gpus, choice.best)
    plan_page = page.PlanPage(given_flags, spec, on_disk, gpus, plan.concurrency, results, choice, predictions)
    sys.stdout.write(page.as_json(plan_page) if plan.json else page.as_text(plan_page))
    return 0 if choice.best is not None else 1


def _predictions(request: PlanRequest, gpus: GpuCluster, best: Estimate) -> tuple[StepPrediction, ...]:
    """Decode steps of the rank that decides the size of the cache."""
    config = config_of(request, gpus, best.layout)
    return tuple(
        StepPrediction(best.decides, batch, predict(request.spec, config, best.decides, batch, best.length)) for batch in BATCHES
    )


def _cluster(plan: PlanFlags, is_cpu: bool) -> GpuCluster:
    """The GPUs that the flags describe, or the ranks on the CPU. Raises UserError for missing or contradictory flags."""
    if plan.gpus is None or plan.gpu_memory is None:
        missing = "--gpus" if plan.gpus is None else "--gpu-memory"
        raise UserError(f"{missing} is missing: `tpserve plan MODEL --gpus 16 --gpu-memory 80GB`", param=missing)
    if is_cpu and plan.memory_bandwidth is None:
        raise UserError(
            "--device cpu needs the bandwidth that a rank has: give --memory-bandwidth, too, such as the 40GB/s that "
            "`tpserve bench roofline` measures",
            param="memory_bandwidth",
        )
    per_node = plan.gpus_per_node or (plan.gpus if is_cpu else DEFAULT_GPUS_PER_NODE)
    if plan.gpus > per_node and plan.gpus % per_node:
        divisor = max(size for size in range(1, per_node + 1) if plan.gpus % size == 0)
        raise UserError(
            f"--gpus {plan.gpus} is no multiple of {per_node} GPUs a node: nodes must be alike; give --gpus-per-node {divisor}",
            param="gpus_per_node",
        )
    if plan.max_start_time is not None and plan.disk_rate is None:
        raise UserError("--max-start-time needs the speed of the disk: give --disk-rate, too, such as 2GB/s", param="disk_rate")
    return GpuCluster(
        num_gpus=plan.gpus,
        per_node=per_node,
        memory=plan.gpu_memory,
        memory_rate=plan.memory_bandwidth or DEFAULT_RATE,
        nvlink=is_cpu or plan.interconnect == "nvlink",
        disk_rate=plan.disk_rate,
        is_cpu=is_cpu,
        library=env.cpu_kernels_allowed(),
    )


def _with_plan(flags: Flags, plan: PlanFlags, spec: ModelSpec) -> Flags:
    """The server's flags with the length and the concurrency of the plan. Raises UserError."""
    if flags.enable_expert_parallel and spec.experts is None:
        raise UserError("--enable-expert-parallel, but the model has no experts: leave it out", param="enable_expert_parallel")
    limit = spec.max_position
    if isinstance(plan.context, int) and plan.context > limit:
        raise UserError(f"--context {plan.context} is beyond the model's {limit:,} tokens: give at most that", param="context")
    context = plan.context or min(DEFAULT_CONTEXT, limit)
    return replace(flags, max_model_len=context, max_num_seqs=max(flags.max_num_seqs, plan.concurrency or 1))


def _world_sizes(gpus: GpuCluster) -> Iterator[int]:
    """Numbers of GPUs in ascending order: parts of a node, whole nodes, and more nodes than there are."""
    node = gpus.per_node
    yield from (size for size in range(1, node) if node % size == 0)
    yield from range(node, gpus.num_gpus, node)
    size = max(node, gpus.num_gpus)
    while size <= max(_MAX_WORLD_SIZE, gpus.num_gpus):
        yield size
        size *= 2
