"""The configuration that the flags resolve to: `EngineConfig`.

Owns what must be equal on all ranks and what decides an answer. `resolve` makes it; in it nothing is "auto" any more, except
`all_reduce` on the CPU, which depends on the hosts of the ranks.
"""

from typing import Any, Literal

from msgspec import Struct, to_builtins

from tpserve.config.flags import SECRETS, Quantization
from tpserve.types.layout import ParallelLayout
from tpserve.types.model_files import Snapshot
from tpserve.types.sampling import SamplingDefaults


class EngineConfig(Struct, frozen=True, kw_only=True):
    """The resolved configuration, made once by `resolve`. Values that must be measured are in `MemoryLedger` instead.

    `model` and `tokenizer` are directories on this node. `chat_template` is a template's text or the name of one of the
    tokenizer's; None: the tokenizer's default. With a `snapshot` the weights may still have to be downloaded into `model`.
    `max_model_len` is an upper bound when `fit_max_model_len` is set: the ledger then holds the length that fits.
    `vocab_size` and `eos_ids` are the model's. `kv_cache_memory` is in bytes per rank. `port_range` is (0, 0) when the kernel
    chooses ports.
    """

    model: str
    tokenizer: str
    vocab_size: int
    eos_ids: tuple[int, ...]
    chat_template: str | None
    tool_call_parser: str | None
    reasoning_parser: str | None
    tool_strict_level: Literal["auto", "function", "parameter"]
    sampling_defaults: SamplingDefaults
    snapshot: Snapshot | None
    served_model_name: tuple[str, ...]
    dtype: Literal["bfloat16", "float16", "float32"]
    quantization: Quantization | None
    load_format: Literal["auto", "safetensors", "dummy"]
    verify_weights: bool
    seed: int
    layout: ParallelLayout
    device: Literal["cuda", "cpu"]
    enforce_eager: bool
    binding: bool
    all_reduce: Literal["auto", "nccl", "gloo", "shm"]
    max_model_len: int
    fit_max_model_len: bool
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_cache_dtype: Literal["bfloat16", "float16", "float32", "int8"]
    enable_prefix_caching: bool
    gpu_memory_utilization: float
    kv_cache_memory: int | None
    num_gpu_blocks_override: int | None
    max_queued_requests: int
    host: str
    port: int
    ssl_certfile: str | None
    ssl_keyfile: str | None
    api_key: str | None
    api_key_file: str | None
    admin_api_key: str | None
    metrics_key: str | None
    metrics_compat: Literal["vllm"] | None
    allowed_origins: tuple[str, ...]
    allowed_methods: tuple[str, ...]
    allowed_headers: tuple[str, ...]
    allow_credentials: bool
    resume_window: float
    state_dir: str | None
    request_timeout: float | None
    access_log: str | None
    otlp_traces_endpoint: str | None
    root_path: str
    enable_force_include_usage: bool
    enable_per_request_metrics: bool
    return_tokens_as_token_ids: bool
    log_requests: bool
    log_stats: bool
    cluster_secret_file: str | None
    log_level: Literal["debug", "info", "warning", "error"]
    start_timeout: float
    drain_timeout: float
    recovery_timeout: float
    interface: str | None
    port_range: tuple[int, int]
    step_trace: str | None

    def shared(self) -> dict[str, Any]:
        """The fields that must be equal on all ranks: otherwise their tokens differ or their collectives hang."""
        return {name: value for name, value in to_builtins(self).items() if name not in _LOCAL}

    def of_answers(self) -> dict[str, Any]:
        """The fields that decide which answer a request gets, with all its bits."""
        return {name: value for name, value in to_builtins(self).items() if name in _OF_ANSWERS}

    def redacted(self) -> dict[str, Any]:
        """All fields, for operators; a secret that is set becomes "***"."""
        return {name: "***" if name in SECRETS and value is not None else value for name, value in to_builtins(self).items()}


_OF_ANSWERS = {
    *("vocab_size", "eos_ids", "chat_template", "tool_call_parser", "reasoning_parser", "tool_strict_level", "sampling_defaults"),
    *("served_model_name", "dtype", "quantization", "load_format", "seed", "layout", "device", "all_reduce", "kv_cache_dtype"),
}
_LOCAL = {
    *("model", "tokenizer", "chat_template", "tool_call_parser", "reasoning_parser", "tool_strict_level"),
    *("sampling_defaults", "snapshot", "served_model_name"),
    *("max_queued_requests", "host", "port", *SECRETS, "cluster_secret_file", "log_level", "step_trace"),
    *("interface", "port_range", "allowed_origins", "allowed_methods", "allowed_headers", "allow_credentials", "log_requests"),
    *("log_stats", "resume_window", "state_dir", "request_timeout", "access_log", "otlp_traces_endpoint", "root_path"),
    *("enable_force_include_usage", "enable_per_request_metrics", "return_tokens_as_token_ids"),
}
