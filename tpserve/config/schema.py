"""The list of flags, and what they become.

Owns `Flags`, the only list of flags there is: the parser, the help, `TPSERVE_ARG_*` and docs/flags.md are read off its
fields. A field's annotation carries its help text, its bounds and where its name comes from. Never parses, never guesses:
`cli` fills a `Flags`, `resolve` turns it into an `EngineConfig`, in which nothing is "auto" any more (but
`all_reduce` on the CPU: which ranks share a host is known once they meet).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Struct, to_builtins

from tpserve.types.layout import ParallelLayout
from tpserve.types.model_files import Snapshot
from tpserve.types.sampling import SamplingDefaults

MODEL, LAYOUT, ENGINE, HTTP, OPERATION, LAUNCH = GROUPS = (
    "Model",
    "Parallelism",
    "Engine",
    "HTTP",
    "Operation",
    "Launch (tpserve serve only)",
)

SECRETS = ("api_key", "admin_api_key", "metrics_key")
"""Fields that are never shown, and not on the command lines of ranks."""


class WrongValue(Exception):
    """A flag's value cannot be read; says what it should have been."""


@dataclass(frozen=True)
class Flag:
    """What a field of `Flags`, or of another command's struct, is besides its name, type and default.

    `named_by`: who named the flag first. `also`: other spellings that are taken; `also_off`: of a switch, what turns it
    off. `reads`: makes of a text a value that no plain
    type is, or raises WrongValue; `shown` stands for such a value in help texts.
    """

    group: str
    help: str
    named_by: Literal["vLLM", "torchrun", "tpserve"] = "vLLM"
    short: str = ""
    also: tuple[str, ...] = ()
    also_off: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    reads: Callable[[str], Any] | None = None
    shown: str = ""


class Flags(Struct, frozen=True, kw_only=True):
    """What the user said. None means "not said"."""

    model: Annotated[
        str | None,
        Flag(
            MODEL,
            "Model directory, or repository id on Hugging Face (ORG/NAME); the same as the positional MODEL. Without it the "
            "built-in model is served.",
        ),
    ] = None
    revision: Annotated[str | None, Flag(MODEL, "Branch, tag or commit of a repository. Default: main.")] = None
    tokenizer: Annotated[
        str | None, Flag(MODEL, "Directory or repository of the tokenizer and its chat template. Default: MODEL.")
    ] = None
    tokenizer_revision: Annotated[
        str | None,
        Flag(MODEL, "Branch, tag or commit of the tokenizer's repository. Default: MODEL's for its own, main for another."),
    ] = None
    chat_template: Annotated[
        str | None,
        Flag(
            MODEL,
            "Chat template: a file, the Jinja text itself, or the name of one of the tokenizer's. Default: the tokenizer's.",
        ),
    ] = None
    generation_config: Annotated[
        str,
        Flag(
            MODEL,
            "Where requests' default sampling parameters come from. auto: generation_config.json of MODEL. none (or vllm): there "
            "are none. Else a directory whose generation_config.json is read in place of MODEL's.",
        ),
    ] = "auto"
    override_generation_config: Annotated[
        dict[str, Any] | None,
        Flag(MODEL, "Default sampling parameters that are stronger than the file's, such as '{\"temperature\": 0.5}'."),
    ] = None
    download_dir: Annotated[
        str | None, Flag(MODEL, "Cache for repositories, shared with other programs. Default: HF_HUB_CACHE, else below HF_HOME.")
    ] = None
    served_model_name: Annotated[
        tuple[str, ...], Flag(MODEL, "Names under which the API serves the model; answers carry the first. Default: MODEL.")
    ] = ()
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Flag(MODEL, "Type of weights and activations. auto: the checkpoint's, but bfloat16 for a float32 checkpoint on GPUs."),
    ] = "auto"
    load_format: Annotated[
        Literal["auto", "safetensors", "dummy"],
        Flag(
            MODEL, "Where weights come from. auto: safetensors, or else pytorch_model*.bin. dummy: random numbers, to try sizes."
        ),
    ] = "auto"
    verify_weights: Annotated[
        bool,
        Flag(
            MODEL,
            "Compare every byte of the weight files between nodes before loading, not only a sample of each file; each node "
            "reads its files once more.",
            "tpserve",
        ),
    ] = False
    seed: Annotated[int, Flag(MODEL, "Seed of the random numbers of --load-format dummy.", at_least=0, at_most=2**63 - 1)] = 0

    tensor_parallel_size: Annotated[
        int | None,
        Flag(
            LAYOUT,
            "Ranks that share each layer. Default: number of ranks / --pipeline-parallel-size.",
            short="-tp",
            also=("--tp", "--tp-size"),
            at_least=1,
        ),
    ] = None
    pipeline_parallel_size: Annotated[
        int | None,
        Flag(LAYOUT, "Stages that share the layers. Default: 1.", short="-pp", also=("--pp", "--pp-size"), at_least=1),
    ] = None
    pipeline_layer_map: Annotated[
        tuple[int, ...],
        Flag(LAYOUT, "Layers of each stage, such as 3,2. Default: even, earlier stages take the odd ones.", "tpserve"),
    ] = ()
    enable_expert_parallel: Annotated[
        bool,
        Flag(
            LAYOUT,
            "The ranks of a stage hold whole experts, each a range of them; without it each holds some channels of every expert.",
            short="-ep",
            also=("--ep",),
        ),
    ] = False
    data_parallel_size: Annotated[
        int, Flag(LAYOUT, "Only 1: start one server per replica.", short="-dp", also=("--dp", "--dp-size"), at_least=1)
    ] = 1
    device: Annotated[
        Literal["auto", "cuda", "cpu"],
        Flag(LAYOUT, "Where ranks run. auto: on GPUs if one is visible. cuda: ranks may share a GPU."),
    ] = "auto"
    binding: Annotated[
        bool,
        Flag(
            LAYOUT,
            "Each rank runs on the cores near its GPU (on by default); --no-... leaves that to the system.",
            "tpserve",
            also=("--numa-bind",),
        ),
    ] = True
    all_reduce: Annotated[
        Literal["auto", "nccl", "gloo", "shm"],
        Flag(
            LAYOUT,
            "What adds up the ranks' parts. auto: nccl on GPUs (gloo when ranks share one); on the CPU shm, a page of memory "
            "that the ranks of a host share, or gloo where they cannot.",
            "tpserve",
        ),
    ] = "auto"

    max_model_len: Annotated[
        int | Literal["auto"] | None,
        Flag(
            ENGINE,
            "Longest sequence, prompt and output together, such as 4096, 32k (32,000) or 32K (32,768). auto: the model's, or as "
            "much of it as fits the KV cache. Default: the model's, refused when it does not fit.",
            at_least=2,
        ),
    ] = None
    max_num_seqs: Annotated[int, Flag(ENGINE, "Most sequences in a step.", at_least=1)] = 256
    max_num_batched_tokens: Annotated[
        int | None, Flag(ENGINE, "Most tokens in a step. Default: 8192 on GPUs, 2048 on the CPU.", at_least=1)
    ] = None
    block_size: Annotated[int, Flag(ENGINE, "Tokens in a block of the KV cache.", at_least=1, at_most=1024)] = 16
    enable_prefix_caching: Annotated[
        bool,
        Flag(
            ENGINE,
            "Prompts that begin alike are computed once (on by default); --no-... computes every prompt whole.",
            also_off=("--disable-radix-cache",),
        ),
    ] = True
    gpu_memory_utilization: Annotated[
        float, Flag(ENGINE, "Share of each GPU's memory that tpserve may take.", above=0, at_most=1)
    ] = 0.9
    kv_cache_memory: Annotated[
        float | None,
        Flag(ENGINE, "Size of each rank's KV cache in GiB, such as 4 or 0.5, instead of measuring.", "tpserve", above=0),
    ] = None
    num_gpu_blocks_override: Annotated[
        int | None, Flag(ENGINE, "Number of KV cache blocks, instead of measuring.", at_least=1)
    ] = None
    max_queued_requests: Annotated[
        int,
        Flag(
            ENGINE,
            "Most requests that wait; further ones are answered with 429.",
            "tpserve",
            also=("--max-num-queued-reqs", "--max-waiting-requests"),
            at_least=1,
        ),
    ] = 1024

    host: Annotated[str, Flag(HTTP, "Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1"
    port: Annotated[int, Flag(HTTP, "Port to listen on; 0 takes a free one.", at_least=0, at_most=65535)] = 8000
    api_key: Annotated[
        str | None, Flag(HTTP, "Key that clients must send. Better given as TPSERVE_API_KEY, which `ps` does not show.")
    ] = None
    admin_api_key: Annotated[
        str | None,
        Flag(
            HTTP,
            "Key for /server_info, which is closed without it unless --host is loopback. Also TPSERVE_ADMIN_API_KEY.",
            "tpserve",
        ),
    ] = None
    metrics_key: Annotated[
        str | None,
        Flag(HTTP, "Key for /metrics, which needs none without it. Also TPSERVE_METRICS_KEY.", "tpserve"),
    ] = None
    allowed_origins: Annotated[
        tuple[str, ...],
        Flag(
            HTTP,
            "Origins of the web pages that may use the server, such as https://chat.example.com, or * for all; a JSON list is "
            "taken too. Default: pages of this machine (http://localhost and the like).",
        ),
    ] = ()
    allowed_methods: Annotated[tuple[str, ...], Flag(HTTP, "Methods that pages of other origins may use; * for all.")] = ("*",)
    allowed_headers: Annotated[tuple[str, ...], Flag(HTTP, "Headers that pages of other origins may send; * for all.")] = ("*",)
    allow_credentials: Annotated[bool, Flag(HTTP, "Let pages of other origins send cookies.")] = False
    log_requests: Annotated[
        bool,
        Flag(
            HTTP,
            "Log a line for each request when it has ended: id, model, tokens, times, status; never its text. Also vLLM's "
            "--enable-log-requests.",
            "tpserve",
            also=("--enable-log-requests",),
            also_off=("--disable-log-requests",),
        ),
    ] = False
    log_stats: Annotated[
        bool,
        Flag(
            HTTP,
            "Log a line about throughput every 10 s while there is traffic (on by default); --no-... leaves it out.",
            "tpserve",
            also_off=("--disable-log-stats",),
        ),
    ] = True

    config: Annotated[
        str | None,
        Flag(
            OPERATION,
            "YAML file of flags by name, such as `max-model-len: 4096`; the command line and the environment are stronger.",
            shown="FILE.yaml",
        ),
    ] = None
    cluster_secret_file: Annotated[
        str | None,
        Flag(
            OPERATION,
            "Secret that the nodes share, from which the keys of their links are derived; `tpserve secret FILE` makes one. "
            "Without it the keys of each run travel over torchrun's store.",
            "tpserve",
        ),
    ] = None
    require_secret: Annotated[bool, Flag(OPERATION, "Refuse several nodes without --cluster-secret-file.", "tpserve")] = False
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Flag(OPERATION, "How much the first rank of a node logs; other ranks log warnings and errors.", "tpserve"),
    ] = "info"
    start_timeout: Annotated[
        float,
        Flag(OPERATION, "Seconds until all ranks must have met; a download may take longer while it moves.", "tpserve", above=0),
    ] = 600.0
    drain_timeout: Annotated[
        float,
        Flag(
            OPERATION,
            "Seconds for open requests when told to end (torchrun kills after 30).",
            "tpserve",
            also=("--shutdown-timeout",),
            at_least=0,
        ),
    ] = 25.0
    interface: Annotated[
        str | None,
        Flag(
            OPERATION,
            "Interface between nodes, for all traffic alike: a name, a network (10.0.0.0/24) or an address. Default: the one "
            "that leads to the master address.",
            "tpserve",
        ),
    ] = None
    port_range: Annotated[
        str | None,
        Flag(
            OPERATION,
            "Ports that tpserve listens on between nodes, such as 30000-30100; gloo and NCCL know none and take the kernel's "
            "(net.ipv4.ip_local_port_range). Default: free ones.",
            "tpserve",
        ),
    ] = None
    step_trace: Annotated[
        str | None, Flag(OPERATION, "Directory to which each rank writes its steps, as Chrome trace events.", "tpserve")
    ] = None

    nproc_per_node: Annotated[
        int | None,
        Flag(LAUNCH, "Ranks on this node. Default: one per visible GPU, or what the layout asks for.", "torchrun", at_least=1),
    ] = None
    nnodes: Annotated[int, Flag(LAUNCH, "Number of nodes; run the same command on each.", short="-n", at_least=1)] = 1
    node_rank: Annotated[int, Flag(LAUNCH, "This node's number; node 0 answers HTTP.", short="-r", at_least=0)] = 0
    master_addr: Annotated[str | None, Flag(LAUNCH, "Address of node 0; needed with several nodes.")] = None
    master_port: Annotated[int, Flag(LAUNCH, "Port on node 0 at which nodes meet.", at_least=1, at_most=65535)] = 29501
    headless: Annotated[bool, Flag(LAUNCH, "This node answers no HTTP; implied by --node-rank above 0.")] = False


class EngineConfig(Struct, frozen=True, kw_only=True):
    """All that a server was resolved to; made once by `resolve`. What must be measured is not here but in the memory ledger.

    `model` and `tokenizer` are directories on this node; `chat_template` is a text, or the name of one of the tokenizer's, None
    for its default; with a `snapshot` the weights may still have to be downloaded into `model`.
    `max_model_len` is the most there can be: with `fit_max_model_len` the ledger says how much of it there is.
    `kv_cache_memory` is in bytes, of each rank. `port_range` is (0, 0) where the kernel chooses.
    """

    model: str
    tokenizer: str
    chat_template: str | None
    sampling_defaults: SamplingDefaults
    snapshot: Snapshot | None
    served_model_name: tuple[str, ...]
    dtype: Literal["bfloat16", "float16", "float32"]
    load_format: Literal["auto", "safetensors", "dummy"]
    verify_weights: bool
    seed: int
    layout: ParallelLayout
    device: Literal["cuda", "cpu"]
    binding: bool
    all_reduce: Literal["auto", "nccl", "gloo", "shm"]
    max_model_len: int
    fit_max_model_len: bool
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    enable_prefix_caching: bool
    gpu_memory_utilization: float
    kv_cache_memory: int | None
    num_gpu_blocks_override: int | None
    max_queued_requests: int
    host: str
    port: int
    api_key: str | None
    admin_api_key: str | None
    metrics_key: str | None
    allowed_origins: tuple[str, ...]
    allowed_methods: tuple[str, ...]
    allowed_headers: tuple[str, ...]
    allow_credentials: bool
    log_requests: bool
    log_stats: bool
    cluster_secret_file: str | None
    log_level: Literal["debug", "info", "warning", "error"]
    start_timeout: float
    drain_timeout: float
    interface: str | None
    port_range: tuple[int, int]
    step_trace: str | None

    def shared(self) -> dict[str, Any]:
        """What must be equal on all ranks, or their tokens would differ or their collectives hang."""
        return {name: value for name, value in to_builtins(self).items() if name not in _LOCAL}

    def shown(self) -> dict[str, Any]:
        """All of it for an operator's eyes: of secrets only whether they are set."""
        return {name: "***" if name in SECRETS and value is not None else value for name, value in to_builtins(self).items()}


_LOCAL = {
    *("model", "tokenizer", "chat_template", "sampling_defaults", "snapshot", "served_model_name"),
    *("max_queued_requests", "host", "port", *SECRETS, "cluster_secret_file", "log_level", "step_trace"),
    *("interface", "port_range", "allowed_origins", "allowed_methods", "allowed_headers", "allow_credentials", "log_requests"),
    "log_stats",
}
