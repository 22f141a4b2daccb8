"""Resolves flags, model and machine to an `EngineConfig`. Pure; the only place where "auto" and unset flags become values.

Every error that can be found before a process starts is raised here, in one sentence with the way out.
"""

import shlex
from typing import Literal, NamedTuple

from tpserve.config.engine_config import EngineConfig
from tpserve.config.flags import Flags, Quantization
from tpserve.config.sizes import GIB
from tpserve.config.web_pages import name_list, origin_list
from tpserve.errors import UserError
from tpserve.types.layout import ParallelLayout, even_layers
from tpserve.types.machine import Machine
from tpserve.types.model_files import ModelFiles
from tpserve.types.model_spec import ModelSpec
from tpserve.types.window import blocks_needed, max_length

BATCHED_TOKENS = {"cuda": 8192, "cpu": 2048}


class Grid(NamedTuple):
    """Sizes of a layout: tensor-parallel ranks by pipeline stages."""

    tp: int
    pp: int


def resolve(flags: Flags, files: ModelFiles, spec: ModelSpec, machine: Machine) -> EngineConfig:
    """Make the configuration: everything that needs no loaded model. Raises UserError."""
    assert flags.model is not None, "the caller fills in the built-in model"
    device = _device(flags, machine)
    return EngineConfig(
        model=files.directory,
        tokenizer=files.tokenizer,
        vocab_size=spec.vocab_size,
        eos_ids=spec.eos_ids,
        chat_template=files.chat_template,
        tool_call_parser=flags.tool_call_parser,
        reasoning_parser=flags.reasoning_parser,
        tool_strict_level=flags.tool_strict_level,
        sampling_defaults=files.sampling_defaults,
        snapshot=files.snapshot,
        served_model_name=flags.served_model_name or (flags.model,),
        dtype=(dtype := _dtype(flags, spec, device)),
        quantization=_quantization(flags, device, dtype),
        load_format=flags.load_format,
        verify_weights=flags.verify_weights,
        seed=flags.seed,
        layout=_layout(flags, spec, machine),
        device=device,
        enforce_eager=flags.enforce_eager,
        binding=flags.binding,
        all_reduce=_all_reduce(flags, machine, device),
        max_model_len=(max_model_len := _max_model_len(flags, spec)),
        fit_max_model_len=flags.max_model_len == "auto",
        max_num_seqs=flags.max_num_seqs,
        max_num_batched_tokens=flags.max_num_batched_tokens or max(BATCHED_TOKENS[device], flags.max_num_seqs),
        block_size=flags.block_size,
        kv_cache_dtype=_kv_cache_dtype(flags, dtype, device),
        enable_prefix_caching=flags.enable_prefix_caching,
        gpu_memory_utilization=flags.gpu_memory_utilization,
        kv_cache_memory=None if flags.kv_cache_memory is None else int(flags.kv_cache_memory * GIB),
        num_gpu_blocks_override=_num_blocks(flags, spec, max_model_len),
        max_queued_requests=flags.max_queued_requests,
        host=flags.host,
        port=flags.port,
        ssl_certfile=flags.ssl_certfile,
        ssl_keyfile=flags.ssl_keyfile,
        api_key=flags.api_key,
        api_key_file=flags.api_key_file,
        admin_api_key=flags.admin_api_key,
        metrics_key=flags.metrics_key,
        metrics_compat=flags.metrics_compat,
        allowed_origins=origin_list(flags.allowed_origins),
        allowed_methods=name_list("allowed_methods", flags.allowed_methods),
        allowed_headers=name_list("allowed_headers", flags.allowed_headers),
        allow_credentials=flags.allow_credentials,
        request_timeout=flags.request_timeout,
        access_log=flags.access_log,
        otlp_traces_endpoint=flags.otlp_traces_endpoint,
        root_path=f"/{path}" if (path := flags.root_path.strip("/")) else "",
        enable_force_include_usage=flags.enable_force_include_usage,
        enable_per_request_metrics=flags.enable_per_request_metrics,
        return_tokens_as_token_ids=flags.return_tokens_as_token_ids,
        log_requests=flags.log_requests,
        log_stats=flags.log_stats,
        resume_window=flags.resume_window,
        state_dir=_state_dir(flags),
        cluster_secret_file=_secret_file(flags, machine),
        log_level=flags.log_level,
        start_timeout=flags.start_timeout,
        drain_timeout=flags.drain_timeout,
        recovery_timeout=flags.recovery_timeout,
        interface=flags.interface,
        port_range=_port_range(flags.port_range),
        step_trace=flags.step_trace,
    )


def _state_dir(flags: Flags) -> str | None:
    """The directory for answers. Raises UserError when none are kept at all."""
    if flags.state_dir is not None and not flags.resume_window:
        raise UserError("--state-dir needs a --resume-window above 0: with 0 no answers are kept", param="state_dir")
    return flags.state_dir


def _secret_file(flags: Flags, machine: Machine) -> str | None:
    if flags.require_secret and flags.cluster_secret_file is None and machine.nnodes > 1:
        raise UserError(
            "--require-secret needs --cluster-secret-file: make one with `tpserve secret FILE` and copy it to every node",
            param="cluster_secret_file",
        )
    return flags.cluster_secret_file


def num_local_ranks(flags: Flags, num_gpus: int) -> int:
    """Number of ranks that `tpserve serve` starts on this node: --nproc-per-node, else one per GPU, else what the layout needs.

    On a single node --tensor-parallel-size wins over the number of GPUs: `-tp 2` on eight GPUs starts two ranks.
    Raises UserError.
    """
    if flags.nproc_per_node is not None:
        return flags.nproc_per_node
    pp = flags.pipeline_parallel_size or max(1, len(flags.pipeline_layer_map))
    use_gpus = num_gpus > 0 and flags.device != "cpu"
    if use_gpus and (flags.nnodes > 1 or flags.tensor_parallel_size is None):
        return num_gpus
    world = (flags.tensor_parallel_size or 1) * pp
    if world % flags.nnodes:
        raise UserError(
            f"{world} ranks (--tensor-parallel-size x --pipeline-parallel-size) cannot be divided among {flags.nnodes} nodes: "
            f"choose sizes whose product is a multiple of {flags.nnodes}, or give each node its --nproc-per-node"
        )
    return world // flags.nnodes


def num_all_ranks(flags: Flags, nproc: int) -> int:
    """Number of ranks on all nodes, of which `nproc` are on this one.

    Nodes may differ in size, so --tensor-parallel-size decides if it is set.
    """
    if flags.nnodes > 1 and flags.tensor_parallel_size is not None:
        world = flags.tensor_parallel_size * (flags.pipeline_parallel_size or max(1, len(flags.pipeline_layer_map)))
        if nproc + flags.nnodes - 1 <= world:  # every other node has at least one rank
            return world
    return nproc * flags.nnodes


def _device(flags: Flags, machine: Machine) -> Literal["cuda", "cpu"]:
    gpus = machine.num_gpus
    if flags.device == "cpu" or (flags.device == "auto" and not gpus):
        return "cpu"
    if not gpus:
        raise UserError(
            "--device cuda, but no GPU is visible: see nvidia-smi, CUDA_VISIBLE_DEVICES and torch's build, or pass --device cpu",
            param="device",
        )
    if flags.device == "auto" and machine.local_world_size > gpus:
        raise UserError(
            f"{_count(machine.local_world_size)} on this node but {gpus} visible GPUs: start at most {gpus} a node, "
            "or pass --device cpu, or --device cuda to let ranks share a GPU",
            param="device",
        )
    return "cuda"


def _all_reduce(flags: Flags, machine: Machine, device: str) -> Literal["auto", "nccl", "gloo", "shm"]:
    shares_gpus = device == "cuda" and machine.local_world_size > machine.num_gpus
    if flags.all_reduce == "auto" and device == "cuda":
        return "gloo" if shares_gpus else "nccl"
    why = ""
    if flags.all_reduce == "nccl" and device == "cpu":
        why = "is for GPUs, and the ranks run on the CPU"
    elif flags.all_reduce == "nccl" and shares_gpus:
        why = f"needs a GPU for each rank, but {_count(machine.local_world_size)} share {machine.num_gpus}"
    elif flags.all_reduce == "shm" and device == "cuda":
        why = "is for the CPU, and the ranks run on GPUs"
    if why:
        raise UserError(f"--all-reduce {flags.all_reduce} {why}: leave it out, or pass --all-reduce gloo", param="all_reduce")
    return flags.all_reduce


def _dtype(flags: Flags, spec: ModelSpec, device: str) -> Literal["bfloat16", "float16", "float32"]:
    if flags.dtype != "auto":
        return flags.dtype
    return "bfloat16" if spec.dtype == "float32" and device == "cuda" else spec.dtype


def _quantization(flags: Flags, device: str, dtype: str) -> Quantization | None:
    """Whether the library of CPU kernels is there, which int8 needs, is known to the ranks only."""
    why = ""
    if flags.quantization is not None and device == "cuda":
        why = "is for the CPU, and the ranks run on GPUs: leave it out, or pass --device cpu"
    elif flags.quantization is not None and dtype == "float16":
        why = "computes with bfloat16 or float32 activations, and the model's are float16: pass --dtype bfloat16 too"
    if why:
        raise UserError(f"--quantization {flags.quantization} {why}", param="quantization")
    return flags.quantization


def _kv_cache_dtype(
    flags: Flags, dtype: Literal["bfloat16", "float16", "float32"], device: str
) -> Literal["bfloat16", "float16", "float32", "int8"]:
    if flags.kv_cache_dtype == "auto":
        return dtype
    if device == "cuda" or dtype == "float16":
        why = "is for the CPU, and the ranks run on GPUs" if device == "cuda" else "is not for a model in float16"
        way_out = "leave it out" + ("" if device == "cuda" else ", or pass --dtype bfloat16")
        raise UserError(f"--kv-cache-dtype {flags.kv_cache_dtype} {why}: {way_out}", param="kv_cache_dtype")
    return flags.kv_cache_dtype


def _max_model_len(flags: Flags, spec: ModelSpec) -> int:
    length = spec.max_position if flags.max_model_len is None else flags.max_model_len
    if length == "auto":
        return spec.max_position
    if length > spec.max_position:
        raise UserError(
            f"--max-model-len {length} is beyond the model's {spec.max_position} positions: pass at most that",
            param="max_model_len",
        )
    return length


def _num_blocks(flags: Flags, spec: ModelSpec, max_model_len: int) -> int | None:
    num_blocks, size = flags.num_gpu_blocks_override, flags.block_size
    if num_blocks is not None and flags.kv_cache_memory is not None:
        raise UserError(
            f"--num-gpu-blocks-override {num_blocks} and --kv-cache-memory {flags.kv_cache_memory:g} both size the KV cache: "
            "pass one of them",
            param="kv_cache_memory",
        )
    least = blocks_needed(max_model_len, spec.windows, size)
    if num_blocks is not None and flags.max_model_len != "auto" and num_blocks < least:
        fits = max_length(lambda length: blocks_needed(length, spec.windows, size) <= num_blocks, size, max_model_len)
        shorter = f", or --max-model-len {fits}" if fits else ""
        raise UserError(
            f"--num-gpu-blocks-override {num_blocks}, of {size} tokens each, are too few for one sequence of {max_model_len:,}: "
            f"pass at least {least}{shorter}",
            param="num_gpu_blocks_override",
        )
    return num_blocks


def _port_range(text: str | None) -> tuple[int, int]:
    """(first, last), inclusive; (0, 0) without a range. Raises UserError."""
    if text is None:
        return 0, 0
    first, _, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last) < 65536):
        raise UserError(f"--port-range must be two ports such as 30000-30100, not {text!r}", param="port_range")
    return int(first), int(last)


def _layout(flags: Flags, spec: ModelSpec, machine: Machine) -> ParallelLayout:
    """The layout of all ranks. Raises UserError when ranks, flags and model do not fit together."""
    unequal = machine.world_size != machine.local_world_size * machine.nnodes
    if machine.launcher == "serve" and unequal and flags.tensor_parallel_size is None:
        raise UserError(
            f"the {machine.nnodes} nodes start {machine.world_size} ranks together and this one {machine.local_world_size}: "
            "pass the same --nproc-per-node on every node, or for unequal nodes --tensor-parallel-size",
            param="nproc_per_node",
        )
    layer_map = flags.pipeline_layer_map
    pp = flags.pipeline_parallel_size or len(layer_map) or _default_stages(flags, spec, machine.world_size)
    tp = flags.tensor_parallel_size or max(1, machine.world_size // pp)
    if tp * pp != machine.world_size:
        raise UserError(_mismatch(Grid(tp, pp), flags, spec, machine), param="tensor_parallel_size")
    if pp > spec.num_layers:
        raise UserError(
            f"--pipeline-parallel-size {pp}, but the model has {spec.num_layers} layers, so that a stage would be empty: "
            f"use at most {spec.num_layers} stages",
            param="pipeline_parallel_size",
        )
    if tp > spec.num_heads:
        raise UserError(
            f"--tensor-parallel-size {tp}, but the model has {spec.num_heads} attention heads, so that a rank would hold none: "
            f"use at most {spec.num_heads}",
            param="tensor_parallel_size",
        )
    return ParallelLayout(tp, pp, _stages(layer_map, pp, spec.num_layers), _expert_parallel(flags, spec, tp))


def _expert_parallel(flags: Flags, spec: ModelSpec, tp: int) -> bool:
    if not flags.enable_expert_parallel:
        return False
    why = ""
    if spec.experts is None:
        why = "but the model has no experts: leave it out"
    elif tp > spec.experts.count:
        why = f"but {tp} ranks would share {spec.experts.count} experts, so that a rank would hold none: "
        why += f"leave it out, or use --tensor-parallel-size {spec.experts.count} at most"
    if why:
        raise UserError(f"--enable-expert-parallel, {why}", param="enable_expert_parallel")
    return True


def _default_stages(flags: Flags, spec: ModelSpec, world_size: int) -> int:
    """One stage; without --tensor-parallel-size and with more ranks than heads, the fewest stages that leave no rank empty."""
    if flags.tensor_parallel_size is None and world_size > spec.num_heads:
        for pp in range(2, spec.num_layers + 1):
            if world_size % pp == 0 and world_size // pp <= spec.num_heads:
                return pp
    return 1


def _stages(layer_map: tuple[int, ...], pp: int, num_layers: int) -> tuple[int, ...]:
    """Layers per stage. Raises UserError when --pipeline-layer-map does not fit the model."""
    even = even_layers(num_layers, pp)
    if not layer_map:
        return even
    if len(layer_map) != pp or sum(layer_map) != num_layers:
        value, example = ",".join(map(str, layer_map)), ",".join(map(str, even))
        raise UserError(
            f"--pipeline-layer-map {value} is {len(layer_map)} stages and {sum(layer_map)} layers together, but there are "
            f"{pp} stages and {num_layers} layers: pass {pp} numbers that add up to {num_layers}, such as {example}",
            param="pipeline_layer_map",
        )
    return layer_map


def _mismatch(requested: Grid, flags: Flags, spec: ModelSpec, machine: Machine) -> str:
    """The error for a layout that does not match the number of ranks, with a command line that works."""
    nodes, per_node = machine.nnodes, machine.local_world_size
    ranks = f"{nodes} nodes x {per_node} ranks = {machine.world_size} ranks" if nodes > 1 else _count(machine.world_size)
    wanted = requested.tp * requested.pp
    layout = f"--tensor-parallel-size {requested.tp} x --pipeline-parallel-size {requested.pp} = {wanted}"
    fit = _nearest_grid(requested, flags, spec, machine)
    if fit is None:
        command = _command(requested, flags, nodes, machine)
        return f"{ranks} were started but {layout}: start {_count(wanted)}, `{command}`"
    return f"{ranks} were started but {layout}: run `{_command(fit, flags, nodes, machine)}`"


def _count(ranks: int) -> str:
    return f"{ranks} rank" + "s" * (ranks != 1)


def _nearest_grid(requested: Grid, flags: Flags, spec: ModelSpec, machine: Machine) -> Grid | None:
    """The layout of all started ranks that is nearest to `requested`; None if the user should rather start the missing ranks."""
    world = machine.world_size
    wanted = requested.tp * requested.pp
    could_start = wanted % machine.nnodes == 0 and (not machine.num_gpus or wanted <= machine.num_gpus * machine.nnodes)
    model_allows = requested.tp <= spec.num_heads and requested.pp <= spec.num_layers
    if wanted > world and could_start and model_allows:
        return None
    grids = [Grid(tp, world // tp) for tp in range(1, world + 1) if world % tp == 0]
    grids = [g for g in grids if g.tp <= spec.num_heads and g.pp <= spec.num_layers]
    if not grids:
        return None
    keeps_tp = flags.tensor_parallel_size is not None

    def distance(grid: Grid) -> tuple[bool, bool, int]:
        changes_request = grid.tp != requested.tp if keeps_tp else grid.pp != requested.pp
        return changes_request, grid.pp != requested.pp, abs(grid.tp - machine.local_world_size)

    return min(grids, key=distance)


def _command(grid: Grid, flags: Flags, nodes: int, machine: Machine) -> str:
    """The command line that starts this layout on this number of nodes."""
    per_node = grid.tp * grid.pp // nodes
    model = f"{shlex.quote(flags.model or '')} -tp {grid.tp} -pp {grid.pp}"
    llm = f"LLM({flags.model!r}, tensor_parallel_size={grid.tp}, pipeline_parallel_size={grid.pp})"
    if machine.launcher == "LLM":
        return llm
    if machine.launcher == "script" and nodes == 1:
        return f"torchrun --nproc-per-node {per_node} SCRIPT` with `{llm}"
    if machine.launcher == "script":
        return f"torchrun --nnodes {nodes} --node_rank I --nproc_per_node {per_node} --master_addr HEAD SCRIPT` with `{llm}"
    if machine.launcher == "torchrun" and nodes == 1:
        return f"torchrun --nproc-per-node {per_node} -m tpserve {model}"
    if machine.launcher == "torchrun":
        return f"torchrun --nnodes {nodes} --node_rank I --nproc_per_node {per_node} --master_addr HEAD -m tpserve {model}"
    if nodes == 1:
        return f"tpserve serve {model} --nproc-per-node {per_node}"
    return f"tpserve serve {model} --nnodes {nodes} --node-rank I --master-addr {flags.master_addr or 'HEAD'}"
