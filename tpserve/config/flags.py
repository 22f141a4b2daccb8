"""The server's flags.

Owns `Flags`, the only list of flags: the parser, the help, `TPSERVE_ARG_*` and docs/flags.md are derived from its fields. A
field's annotation holds its help text, its bounds and the origin of its name. Never parses and never guesses: `cli` fills a
`Flags`, `resolve` turns it into an `EngineConfig`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Struct

MODEL, LAYOUT, ENGINE, HTTP, OPERATION, LAUNCH = GROUPS = (
    "Model",
    "Parallelism",
    "Engine",
    "HTTP",
    "Operation",
    "Launch (tpserve serve only)",
)

Quantization = Literal["int8", "int8-head"]
"""How the weights are quantized while loading."""
SECRETS = ("api_key", "admin_api_key", "metrics_key")
"""Fields that are never shown, and never on the command line of a rank."""


class WrongValue(Exception):
    """A flag's value cannot be parsed; `str()` says what it must be."""


@dataclass(frozen=True)
class Flag:
    """The annotation of a field of `Flags`, or of another command's struct.

    `named_by`: where the name comes from. `aliases`: other spellings; `off_aliases`: other spellings that turn a switch off.
    `parse`: parses the text of a value that has no plain type, or raises WrongValue; `metavar`: its placeholder in help texts.
    """

    group: str
    help: str
    named_by: Literal["vLLM", "torchrun", "tpserve"] = "vLLM"
    short: str = ""
    aliases: tuple[str, ...] = ()
    off_aliases: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    parse: Callable[[str], Any] | None = None
    metavar: str = ""


class Flags(Struct, frozen=True, kw_only=True):
    """The flags as the user set them. None: not set."""

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
    tool_call_parser: Annotated[
        str | None,
        Flag(
            MODEL,
            "How the model writes tool calls, such as hermes, llama3_json, qwen3_coder or mistral. Default: found out from the "
            "tokenizer's files and the chat template; `tpserve template MODEL` shows it.",
        ),
    ] = None
    reasoning_parser: Annotated[
        str | None,
        Flag(MODEL, "How the model writes its reasoning, such as qwen3, deepseek_r1 or gpt_oss. Default: found out, too."),
    ] = None
    tool_strict_level: Annotated[
        Literal["auto", "function", "parameter"],
        Flag(
            MODEL,
            "To what tool calls are held. auto: to what a request asks (tool_choice, strict). function: always to names and "
            "form. parameter: always to the schemas of their arguments, too.",
        ),
    ] = "auto"
    generation_config: Annotated[
        str,
        Flag(
            MODEL,
            "Where requests' default sampling parameters come from. auto: generation_config.json of MODEL. none (or vllm): no "
            "defaults. Else a directory whose generation_config.json replaces MODEL's.",
        ),
    ] = "auto"
    override_generation_config: Annotated[
        dict[str, Any] | None,
        Flag(MODEL, "Default sampling parameters that override the file's, such as '{\"temperature\": 0.5}'."),
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
    quantization: Annotated[
        Quantization | None,
        Flag(
            MODEL,
            "Quantize the weights while loading, on the CPU only. int8: the layers' matrices, for each output channel, and the "
            "activations of their products, for each token; int8-head: the LM head, too. Default: "
            "none; checkpoints in block FP8 and MXFP4 are read without it, and dequantised.",
            short="-q",
        ),
    ] = None
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
            "Compare every byte of the weight files between nodes before loading, not only a sample of each file. Each node "
            "then reads its files twice.",
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
            aliases=("--tp", "--tp-size"),
            at_least=1,
        ),
    ] = None
    pipeline_parallel_size: Annotated[
        int | None,
        Flag(LAYOUT, "Stages that share the layers. Default: 1.", short="-pp", aliases=("--pp", "--pp-size"), at_least=1),
    ] = None
    pipeline_layer_map: Annotated[
        tuple[int, ...],
        Flag(LAYOUT, "Layers of each stage, such as 3,2. Default: even; earlier stages take the remainder.", "tpserve"),
    ] = ()
    enable_expert_parallel: Annotated[
        bool,
        Flag(
            LAYOUT,
            "Each rank of a stage holds a range of whole experts. By default each rank holds some channels of every expert.",
            short="-ep",
            aliases=("--ep",),
        ),
    ] = False
    data_parallel_size: Annotated[
        int, Flag(LAYOUT, "Only 1: start one server per replica.", short="-dp", aliases=("--dp", "--dp-size"), at_least=1)
    ] = 1
    device: Annotated[
        Literal["auto", "cuda", "cpu"],
        Flag(LAYOUT, "Where ranks run. auto: on GPUs if one is visible. cuda: ranks may share a GPU."),
    ] = "auto"
    enforce_eager: Annotated[bool, Flag(ENGINE, "On GPUs: launch each step kernel by kernel, without CUDA graphs.")] = False
    binding: Annotated[
        bool,
        Flag(
            LAYOUT,
            "Bind each rank to the cores near its GPU (on by default); --no-... leaves that to the system.",
            "tpserve",
            aliases=("--numa-bind",),
        ),
    ] = True
    all_reduce: Annotated[
        Literal["auto", "nccl", "gloo", "shm"],
        Flag(
            LAYOUT,
            "All-reduce backend. auto: nccl on GPUs (gloo when ranks share one); on the CPU shm, shared memory among the ranks "
            "of a host, or gloo where they cannot share it.",
            "tpserve",
        ),
    ] = "auto"

    max_model_len: Annotated[
        int | Literal["auto"] | None,
        Flag(
            ENGINE,
            "Longest sequence, prompt and output together, such as 4096, 32k (32,000) or 32K (32,768). auto: the model's, or "
            "less where the KV cache is smaller. Default: the model's; the start fails when it does not fit.",
            at_least=2,
        ),
    ] = None
    max_num_seqs: Annotated[int, Flag(ENGINE, "Most sequences in a step.", at_least=1)] = 256
    max_num_batched_tokens: Annotated[
        int | None, Flag(ENGINE, "Most tokens in a step. Default: 8192 on GPUs, 2048 on the CPU.", at_least=1)
    ] = None
    block_size: Annotated[int, Flag(ENGINE, "Tokens in a block of the KV cache.", at_least=1, at_most=1024)] = 16
    kv_cache_dtype: Annotated[
        Literal["auto", "int8"],
        Flag(
            ENGINE,
            "Type of the KV cache. auto: the model's. int8: integers and a scale for each head of a position, half the bytes of "
            "bfloat16, less precise; on the CPU only.",
        ),
    ] = "auto"
    enable_prefix_caching: Annotated[
        bool,
        Flag(
            ENGINE,
            "Compute a prefix that prompts share once (on by default); --no-... computes every prompt in full.",
            off_aliases=("--disable-radix-cache",),
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
            "Most requests in the queue; more are answered with 429.",
            "tpserve",
            aliases=("--max-num-queued-reqs", "--max-waiting-requests"),
            at_least=1,
        ),
    ] = 1024

    host: Annotated[str, Flag(HTTP, "Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1"
    port: Annotated[int, Flag(HTTP, "Port to listen on; 0 takes a free one.", at_least=0, at_most=65535)] = 8000
    ssl_certfile: Annotated[
        str | None, Flag(HTTP, "Certificate, with its chain, in PEM format: the server then speaks HTTPS alone.", metavar="FILE")
    ] = None
    ssl_keyfile: Annotated[
        str | None, Flag(HTTP, "Its key, unencrypted. Default: it is in the file of the certificate.", metavar="FILE")
    ] = None
    api_key: Annotated[
        str | None, Flag(HTTP, "Key that clients must send. Prefer TPSERVE_API_KEY, which `ps` does not show.")
    ] = None
    api_key_file: Annotated[
        str | None,
        Flag(
            HTTP,
            "File with a key on each line, any of which clients may send, and behind it name=NAME and limits such as "
            "tokens_per_minute=100000 (docs/serving.md); it is read again when it changes.",
            "tpserve",
            metavar="FILE",
        ),
    ] = None
    admin_api_key: Annotated[
        str | None,
        Flag(
            HTTP,
            "Key for /server_info, /pause and operators' other routes. Without it they are closed unless --host is loopback. "
            "Also TPSERVE_ADMIN_API_KEY.",
            "tpserve",
        ),
    ] = None
    metrics_key: Annotated[
        str | None,
        Flag(HTTP, "Key for /metrics. Without it /metrics is open. Also TPSERVE_METRICS_KEY.", "tpserve"),
    ] = None
    metrics_compat: Annotated[
        Literal["vllm"] | None,
        Flag(HTTP, "vllm: /metrics has vLLM's metrics under their own names, too, for routers and dashboards.", "tpserve"),
    ] = None
    allowed_origins: Annotated[
        tuple[str, ...],
        Flag(
            HTTP,
            "Origins of the web pages that may use the server, such as https://chat.example.com, or * for all; also a JSON list. "
            "Default: pages of this machine (http://localhost and the like).",
        ),
    ] = ()
    allowed_methods: Annotated[tuple[str, ...], Flag(HTTP, "Methods that pages of other origins may use; * for all.")] = ("*",)
    allowed_headers: Annotated[tuple[str, ...], Flag(HTTP, "Headers that pages of other origins may send; * for all.")] = ("*",)
    allow_credentials: Annotated[bool, Flag(HTTP, "Let pages of other origins send cookies.")] = False
    resume_window: Annotated[
        float,
        Flag(
            HTTP,
            "Seconds that an answer to a request with X-Resumable or background runs on without a reader, and is kept after its "
            "end; 0 keeps none.",
            "tpserve",
            at_least=0,
        ),
    ] = 300.0
    state_dir: Annotated[
        str | None,
        Flag(
            HTTP,
            "Directory on a local disk where such answers are kept, so that they go on when the frontend or the whole server was "
            "killed and is started again; it holds prompts and outputs. Default: in memory only.",
            "tpserve",
        ),
    ] = None
    request_timeout: Annotated[
        float | None,
        Flag(
            HTTP,
            "Seconds after which a request is ended, queued or running, unless its header X-Request-Timeout says otherwise. "
            "Default: none.",
            "tpserve",
            above=0,
        ),
    ] = None
    access_log: Annotated[
        str | None,
        Flag(
            HTTP,
            "File to which a JSON object is appended for each HTTP request (- for the standard output): key's name, status, "
            "times, tokens; never its text. It is opened anew when it was moved.",
            "tpserve",
            metavar="FILE",
        ),
    ] = None
    otlp_traces_endpoint: Annotated[
        str | None,
        Flag(
            HTTP,
            "Collector that gets a span for each request, by OTLP over HTTP, such as http://HOST:4318/v1/traces. Needs the extra "
            "tpserve[otel].",
            metavar="URL",
        ),
    ] = None
    root_path: Annotated[
        str,
        Flag(HTTP, "Path under which a proxy shows this server, such as /llm; requests come with it or without.", metavar="PATH"),
    ] = ""
    enable_force_include_usage: Annotated[
        bool, Flag(HTTP, "Every chunk of every stream has usage, as with include_usage and continuous_usage_stats.")
    ] = False
    enable_per_request_metrics: Annotated[
        bool, Flag(HTTP, "Answers with one choice have `metrics`: times to the first token, in the queue and between tokens.")
    ] = False
    return_tokens_as_token_ids: Annotated[
        bool, Flag(HTTP, "Log probabilities name tokens by their ids (token_id:5), unless a request says otherwise.")
    ] = False
    log_requests: Annotated[
        bool,
        Flag(
            HTTP,
            "Log a line for each request when it ends: id, model, tokens, times, status; never its text. Also vLLM's "
            "--enable-log-requests.",
            "tpserve",
            aliases=("--enable-log-requests",),
            off_aliases=("--disable-log-requests",),
        ),
    ] = False
    log_stats: Annotated[
        bool,
        Flag(
            HTTP,
            "Log a line about throughput every 10 s while there is traffic (on by default); --no-... turns it off.",
            "tpserve",
            off_aliases=("--disable-log-stats",),
        ),
    ] = True

    config: Annotated[
        str | None,
        Flag(
            OPERATION,
            "YAML file of flags by name, such as `max-model-len: 4096`; the command line and the environment win over it.",
            metavar="FILE.yaml",
        ),
    ] = None
    cluster_secret_file: Annotated[
        str | None,
        Flag(
            OPERATION,
            "Secret that the nodes share; the keys of their connections are derived from it. `tpserve secret FILE` makes one. "
            "Without it torchrun's store carries the keys of each run.",
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
        Flag(OPERATION, "Seconds for all ranks to connect; a download may take longer while it progresses.", "tpserve", above=0),
    ] = 600.0
    drain_timeout: Annotated[
        float,
        Flag(
            OPERATION,
            "Seconds that open requests have to finish after SIGTERM (torchrun kills after 30).",
            "tpserve",
            aliases=("--shutdown-timeout",),
            at_least=0,
        ),
    ] = 25.0
    recovery_timeout: Annotated[
        float,
        Flag(
            OPERATION,
            "Seconds without progress after which the service ends when a rank, an agent or a node was lost and is not back. "
            "Requests wait meanwhile.",
            "tpserve",
            at_least=0,
        ),
    ] = 120.0
    interface: Annotated[
        str | None,
        Flag(
            OPERATION,
            "Interface for all traffic between nodes: a name, a network (10.0.0.0/24) or an address. Default: the one with the "
            "route to the master address.",
            "tpserve",
        ),
    ] = None
    port_range: Annotated[
        str | None,
        Flag(
            OPERATION,
            "Ports that tpserve listens on between nodes, such as 30000-30100. gloo and NCCL have no such setting and use the "
            "kernel's range (net.ipv4.ip_local_port_range). Default: any free port.",
            "tpserve",
        ),
    ] = None
    step_trace: Annotated[
        str | None, Flag(OPERATION, "Directory where each rank writes its steps as Chrome trace events.", "tpserve")
    ] = None

    nproc_per_node: Annotated[
        int | None,
        Flag(LAUNCH, "Ranks on this node. Default: one per visible GPU, or as many as the layout needs.", "torchrun", at_least=1),
    ] = None
    nnodes: Annotated[int, Flag(LAUNCH, "Number of nodes; run the same command on each.", short="-n", at_least=1)] = 1
    node_rank: Annotated[int, Flag(LAUNCH, "This node's number; node 0 answers HTTP.", short="-r", at_least=0)] = 0
    master_addr: Annotated[str | None, Flag(LAUNCH, "Address of node 0; needed with several nodes.")] = None
    master_port: Annotated[int, Flag(LAUNCH, "Port on node 0 at which nodes meet.", at_least=1, at_most=65535)] = 29501
    headless: Annotated[bool, Flag(LAUNCH, "This node answers no HTTP; implied by --node-rank above 0.")] = False
