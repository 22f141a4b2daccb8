"""vLLM's flags that tpserve does not have, and what each becomes. Pure.

A row of `VLLM_FLAGS` says how a flag is read (a switch, or with a value), which values are accepted because tpserve already
works that way, and what the error for any other value says. `translate` splits a vLLM command line: accepted flags are listed,
renamed flags are rewritten, and all others are refused together, not one at a time. docs/from-vllm.md is generated from this
table (`vllm_page`); a test checks each row against the parser. Flags that only have another name are `aliases` in
`config.flags`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from tpserve.cli.option import human_number

ON, OFF = "on", "off"
ANY = "any value"
ZEROS = "zeros"
SOME_OF = "some of "
"""Patterns in `VllmFlag.accepts`, besides plain values. ZEROS: a JSON object or NAME=N whose numbers are all 0. SOME_OF: a
comma-separated subset of what follows."""

FlagKind = Literal["switch", "value", "maybe", "many"]
Title = Literal["Built in", "Use instead", "Planned"]


@dataclass(frozen=True)
class VllmFlag:
    """A vLLM flag. `accepts`: the values that match how tpserve already works. `why`: how it works, or what to use instead."""

    title: Title
    kind: FlagKind
    why: str
    accepts: tuple[str, ...] = ()

    def accepts_value(self, value: str) -> bool:
        """Whether `value` matches one of `accepts`."""
        return any(_matches(value, pattern) for pattern in self.accepts)

    def refusal(self) -> str:
        """The reason of the refusal and the way out, as the end of a sentence."""
        if self.title == "Use instead":
            return f"use {self.why}"
        if self.title == "Planned":
            return f"it is planned and not supported yet{f' ({self.why})' if self.why else ''}: leave it out"
        return f"{self.why}: leave it out"


def _matches(value: str, pattern: str) -> bool:
    if pattern in (ANY, value):
        return True
    if pattern.startswith(SOME_OF):
        return set(value.split(",")) <= set(pattern.removeprefix(SOME_OF).split(","))
    if pattern == ZEROS:
        return set(re.findall(r"\d+", value)) == {"0"}
    try:
        return json.loads(value) == json.loads(pattern) if pattern.startswith("{") else float(value) == float(pattern)
    except ValueError:
        return False


def switch(why: str, *accepts: str) -> VllmFlag:
    """A switch, accepted as ON and as OFF unless `accepts` lists one of them."""
    return VllmFlag("Built in", "switch", why, accepts or (ON, OFF))


def value_of(why: str, *accepts: str) -> VllmFlag:
    """A flag with a value, accepted for the values in `accepts`."""
    return VllmFlag("Built in", "value", why, accepts)


def _instead(what: str, *accepts: str, kind: FlagKind = "value") -> VllmFlag:
    return VllmFlag("Use instead", kind, what, accepts)


def _planned(why: str = "", *accepts: str, kind: FlagKind = "value") -> VllmFlag:
    return VllmFlag("Planned", kind, why, (*accepts, OFF) if kind == "switch" else accepts)


_GRAPHS = "on GPUs decode steps are graphs of up to 512 rows, unless --enforce-eager"
_CHUNKS = "prompts are always computed in chunks"
_ONE_BACKEND = "there is one for each kind of device"
_NEVER_LOGGED = "the text of a request is never logged"
_GENERATES = "every model generates"
_NO_CODE = "no code is loaded by name"
_LLGUIDANCE = "structured output is llguidance's"
_OWN_PART = "each rank reads its own part only"
_PROXY = "a proxy in front"
_REPLICAS = "one server per replica, and a load balancer"
_COPY = "a copy of config.json with the field changed"

VLLM_FLAGS: dict[str, VllmFlag] = {
    "--enable-chunked-prefill": switch(_CHUNKS, ON),
    "--long-prefill-token-threshold": value_of(_CHUNKS, "0"),
    "--max-num-partial-prefills": value_of(_CHUNKS, "1"),
    "--max-long-partial-prefills": value_of(_CHUNKS, "1"),
    "--async-scheduling": switch("scheduling is always asynchronous", ON),
    "--disable-async-output-proc": switch("scheduling is always asynchronous", OFF),
    "--num-scheduler-steps": value_of("plans are sent ahead of results", ANY),
    "--stream-interval": value_of("the tokens of a step are sent as soon as it ends", "1"),
    "--use-v2-block-manager": switch("there is one"),
    "--max-seq-len-to-capture": value_of("graphs serve every length", ANY),
    "--cuda-graph-sizes": VllmFlag("Built in", "many", _GRAPHS),
    "--cudagraph-capture-sizes": VllmFlag("Built in", "many", _GRAPHS),
    "--max-cudagraph-capture-size": value_of(_GRAPHS, "512"),
    "--compilation-config": value_of("nothing is compiled", "0", '{"level": 0}', '{"mode": 0}', '{"cudagraph_mode": "NONE"}'),
    "--optimization-level": value_of("nothing is compiled", "0"),
    "--performance-mode": value_of("there is one", "balanced"),
    "--attention-backend": value_of(_ONE_BACKEND, "auto"),
    "--attention-config": value_of(_ONE_BACKEND),
    "--moe-backend": value_of(_ONE_BACKEND, "auto"),
    "--all2all-backend": value_of("experts need no all-to-all"),
    "--disable-cascade-attn": switch("there is one kind of attention"),
    "--disable-sliding-window": switch("a model's windows are always used", OFF),
    "--disable-hybrid-kv-cache-manager": switch("layers with windows and without always share one pool of blocks"),
    "--disable-custom-all-reduce": switch("on GPUs the sums are NCCL's, or gloo's where --all-reduce says so"),
    "--calculate-kv-scales": switch("a cache of int8 has its scales from each key and value", OFF),
    "--enable-log-outputs": switch(_NEVER_LOGGED, OFF),
    "--max-log-len": value_of(_NEVER_LOGGED, ANY),
    "--disable-uvicorn-access-log": switch(_NEVER_LOGGED),
    "--disable-access-log-for-endpoints": value_of(_NEVER_LOGGED, ANY),
    "--uvicorn-log-level": value_of("there is no uvicorn; --log-level is tpserve's", "info", "warning", "error", "critical"),
    "--disable-frontend-multiprocessing": switch("the frontend is a process of its own", OFF),
    "--enable-server-load-tracking": switch("GET /load always counts", ON),
    "--enable-tokenizer-info-endpoint": switch("GET /tokenizer_info is always there", ON),
    "--enable-prompt-tokens-details": switch("usage always has the prompt's cached tokens", ON),
    "--enable-request-id-headers": switch("a request's X-Request-Id always comes back", ON),
    "--sse-keep-alive-interval": value_of("a comment is sent after every 10 s without a token", "10"),
    "--prefix-caching-hash-algo": value_of(
        "block hashes are always BLAKE2b, which is collision resistant", "sha256", "sha256_cbor", "sha256_cbor_64bit"
    ),
    "--scheduling-policy": value_of("by a request's `priority`, then first come, first served", "fcfs", "priority"),
    "--preemption-mode": value_of("a preempted sequence is always recomputed", "recompute"),
    "--swap-space": value_of("a preempted sequence is recomputed, nothing is swapped", "0"),
    "--logprobs-mode": value_of("log probabilities are those of the model, before temperature and filters", "raw_logprobs"),
    "--max-logprobs": value_of("20 at most", "20"),
    "--enable-auto-tool-choice": switch("a model whose calls can be read may always call", ON),
    "--enable-reasoning": switch("reasoning is split off wherever a model writes it", ON),
    "--guided-decoding-backend": value_of(_LLGUIDANCE, ANY),
    "--structured-outputs-config": value_of(_LLGUIDANCE, '{"backend": "auto"}', '{"backend": "guidance"}'),
    "--chat-template-content-format": value_of("a message's content is a text or a list of texts", "auto"),
    "--response-role": value_of("answers are the assistant's", "assistant"),
    "--disable-fastapi-docs": switch("there are no such pages"),
    "--api-server-count": value_of("one process answers HTTP", "1"),
    "--distributed-executor-backend": value_of("ranks are torchrun's", "mp", "auto", "external_launcher", "uni"),
    "--distributed-timeout-seconds": value_of("a rank that is silent for 4 s is noticed"),
    "--use-tqdm-on-load": switch("progress is always shown", ON),
    "--max-parallel-loading-workers": value_of(_OWN_PART, ANY),
    "--safetensors-load-strategy": value_of(f"files are mapped, and {_OWN_PART}", "lazy"),
    "--pt-load-map-location": value_of(_OWN_PART, "cpu"),
    "--model-loader-extra-config": value_of(_OWN_PART, "{}"),
    "--tokenizer-mode": value_of("tokenizer.json, tokenizer.model and vocab.json with merges.txt are found", "auto", "hf"),
    "--skip-tokenizer-init": switch("the tokenizer is always loaded", OFF),
    "--config-format": value_of("config.json is read", "auto", "hf"),
    "--hf-config-path": value_of("config.json is read from MODEL"),
    "--model-impl": value_of("there is one", "auto", "vllm"),
    "--task": value_of(_GENERATES, "auto", "generate"),
    "--runner": value_of(_GENERATES, "auto", "generate"),
    "--convert": value_of(_GENERATES, "auto", "none"),
    "--pooler-config": value_of(_GENERATES),
    "--limit-mm-per-prompt": value_of("text only", ZEROS),
    "--mm-processor-kwargs": value_of("text only", "{}"),
    "--mm-processor-cache-gb": value_of("text only", "0"),
    "--media-io-kwargs": value_of("text only", "{}"),
    "--allowed-local-media-path": value_of("text only"),
    "--language-model-only": switch("text only"),
    "--worker-cls": value_of("there is one", "auto"),
    "--worker-extension-cls": value_of(_NO_CODE),
    "--scheduler-cls": value_of(_NO_CODE),
    "--logits-processors": VllmFlag("Built in", "many", _NO_CODE),
    "--middleware": value_of(_NO_CODE),
    "--tool-parser-plugin": value_of(_NO_CODE),
    "--reasoning-parser-plugin": value_of(_NO_CODE),
    "--trust-remote-code": switch("no code of a repository is ever run; docs/models.md lists the models that are served"),
    "--code-revision": value_of("no code of a repository is ever run"),
    "--log-config-file": _instead("--log-level"),
    "--collect-detailed-traces": _instead("--step-trace"),
    "--profiler-config": _instead("--step-trace"),
    "--device-ids": _instead("CUDA_VISIBLE_DEVICES in the environment"),
    "--hf-token": _instead("HF_TOKEN in the environment", "", kind="maybe"),
    "--default-chat-template-kwargs": _instead("chat_template_kwargs in the request", "{}"),
    "--uds": _instead(f"{_PROXY}, for UNIX sockets"),
    "--ssl-ca-certs": _instead(f"{_PROXY}, for certificates of clients"),
    "--ssl-cert-reqs": _instead(f"{_PROXY}, for certificates of clients", "0"),
    "--data-parallel-address": _instead(_REPLICAS),
    "--data-parallel-rpc-port": _instead(_REPLICAS),
    "--data-parallel-rank": _instead(_REPLICAS, "0"),
    "--data-parallel-start-rank": _instead(_REPLICAS, "0"),
    "--data-parallel-size-local": _instead(_REPLICAS, "1"),
    "--data-parallel-backend": _instead(_REPLICAS, "mp"),
    "--data-parallel-hybrid-lb": _instead(_REPLICAS, OFF, kind="switch"),
    "--data-parallel-external-lb": _instead(_REPLICAS, OFF, kind="switch"),
    "--hf-overrides": _instead(_COPY, "{}"),
    "--rope-scaling": _instead(_COPY),
    "--rope-theta": _instead(_COPY),
    "--enable-lora": _planned(kind="switch"),
    "--lora-modules": _planned(kind="many"),
    "--max-loras": _planned(),
    "--max-lora-rank": _planned(),
    "--max-cpu-loras": _planned(),
    "--lora-dtype": _planned(),
    "--speculative-config": _planned(),
    "--speculative-model": _planned(),
    "--num-speculative-tokens": _planned(),
    "--num-lookahead-slots": _planned("", "0"),
    "--spec-method": _planned(),
    "--spec-model": _planned(),
    "--spec-tokens": _planned(),
    "--tool-server": _planned(),
    "--reasoning-config": _planned("a request's `thinking_token_budget` needs no tokens named"),
    "--cpu-offload-gb": _planned("", "0"),
    "--kv-offloading-size": _planned("", "0"),
    "--enable-sleep-mode": _planned(kind="switch"),
    "--kv-transfer-config": _planned(),
    "--kv-events-config": _planned(),
    "--decode-context-parallel-size": _planned("", "1"),
    "--prefill-context-parallel-size": _planned("", "1"),
    "--enable-eplb": _planned(kind="switch"),
    "--enable-prompt-embeds": _planned(kind="switch"),
}  # fmt: skip

MAPPED = {"--kv-cache-memory-bytes": "--kv-cache-memory"}
"""A flag with a value in bytes -> the tpserve flag with the same value in GiB."""

SHORT = {
    "-O": "--optimization-level", "-cc": "--compilation-config", "-ac": "--attention-config",
    "-sc": "--speculative-config", "-asc": "--api-server-count", "-dcp": "--decode-context-parallel-size",
    "-pcp": "--prefill-context-parallel-size", "-dpn": "--data-parallel-rank", "-dpr": "--data-parallel-start-rank",
    "-dpl": "--data-parallel-size-local", "-dpa": "--data-parallel-address", "-dpp": "--data-parallel-rpc-port",
    "-dpb": "--data-parallel-backend", "-dph": "--data-parallel-hybrid-lb", "-dpe": "--data-parallel-external-lb",
}  # fmt: skip
"""vLLM's short forms -> the full flags above."""

ENVIRONMENT = {
    "VLLM_HOST_IP": "--interface, with the address",
    "VLLM_API_KEY": "TPSERVE_API_KEY",
    "VLLM_PORT": "--port-range",
    "VLLM_LOGGING_LEVEL": "--log-level",
    "VLLM_ATTENTION_BACKEND": "nothing: there is one for each kind of device",
    "VLLM_WORKER_MULTIPROC_METHOD": "nothing: ranks are torchrun's",
    "VLLM_USE_V1": "nothing: there is one engine",
}
"""An environment variable -> what to use instead. Other VLLM_ variables get a general warning."""


class GivenVllmFlag(NamedTuple):
    """A vLLM flag on a command line. `spelling`: the name as typed; `flag`: its full name; `value`: ON or OFF of a switch, None
    when the value is missing."""

    spelling: str
    flag: str
    value: str | None
    entry: VllmFlag

    @property
    def is_accepted(self) -> bool:
        """Whether tpserve already works this way. Never for one field of a JSON value (`--x.y`): the other fields are unknown."""
        return self.value is not None and "." not in self.spelling and self.entry.accepts_value(self.value)

    def refusal(self) -> str:
        """The sentence of the error."""
        return f"{self.spelling} is refused: {self.entry.refusal()}"


class Translation(NamedTuple):
    """A vLLM command line, split. `argv`: the other arguments, renamed flags rewritten."""

    argv: list[str]
    accepted: list[GivenVllmFlag]
    refused: list[GivenVllmFlag]


def translate(argv: Sequence[str], table: Mapping[str, VllmFlag] = VLLM_FLAGS) -> Translation:
    """Take the flags of `table` out of a command line with normalized dashes.

    Raises WrongValue when a size in bytes is not a number.
    """
    result = Translation([], [], [])
    rest = list(argv)
    while rest:
        spelling, equals, text = (arg := rest.pop(0)).partition("=")
        flag, value = full_name(spelling), text if equals else None
        if flag in MAPPED:
            num_bytes = value if value is not None else rest.pop(0) if rest else ""
            result.argv.append(f"{MAPPED[flag]}={human_number(num_bytes) / (1 << 30)!r}")
        elif flag not in table:
            result.argv.append(arg)
        else:
            given = GivenVllmFlag(spelling, flag, _pop_value(table[flag].kind, spelling, value, rest), table[flag])
            (result.accepted if given.is_accepted else result.refused).append(given)
    return result


def _pop_value(kind: FlagKind, spelling: str, value: str | None, rest: list[str]) -> str | None:
    """The value of a flag. Removes the arguments that belong to it from the front of `rest`."""
    if kind == "switch":
        on = value is None or value.lower() in ("1", "true")
        return OFF if spelling.startswith("--no-") == on else ON
    if value is not None or (compact := re.fullmatch(r"-O(\d)", spelling)):
        return value if value is not None else compact[1] if compact else None
    taken: list[str] = []
    while rest and not _is_flag(rest[0]) and (kind == "many" or not taken):
        taken.append(rest.pop(0))
    return " ".join(taken) if taken else "" if kind == "maybe" else None


def _is_flag(arg: str) -> bool:
    return arg.startswith("-") and not re.fullmatch(r"-\d+(\.\d+)?", arg)


def from_keyword(name: str, value: Any) -> GivenVllmFlag | None:
    """A keyword argument of `LLM` as a vLLM flag; None when vLLM has no such flag."""
    flag = "--" + name.replace("_", "-")
    if flag not in VLLM_FLAGS:
        return None
    if VLLM_FLAGS[flag].kind == "switch" and isinstance(value, bool | None):
        return GivenVllmFlag(name, flag, ON if value else OFF, VLLM_FLAGS[flag])
    return GivenVllmFlag(name, flag, json.dumps(value) if isinstance(value, dict) else str(value), VLLM_FLAGS[flag])


def full_name(flag: str) -> str:
    """The full flag of a short form (`-q`, `-O3`), a negated switch (`--no-...`) or a field of a JSON value
    (`--...-config.name`)."""
    if not flag.startswith("--"):
        return SHORT.get("-O" if re.fullmatch(r"-O([0-9]|[.].*)", flag) else flag, flag)
    flag = flag.partition(".")[0]
    return "--" + flag.removeprefix("--no-") if flag.startswith("--no-") else flag


def accepted_line(accepted: Iterable[GivenVllmFlag]) -> str:
    """The log line that lists accepted flags, grouped by reason; empty without any."""
    by_reason: dict[str, list[str]] = {}
    for given in accepted:
        by_reason.setdefault(given.entry.why, []).append(given.spelling + _value_suffix(given))
    groups = [f"{', '.join(flags)} ({why})" for why, flags in by_reason.items()]
    return f"these flags change nothing here: {', '.join(groups)}" if groups else ""


def _value_suffix(given: GivenVllmFlag) -> str:
    in_spelling = given.value in (ON, OFF, "", None) or (given.spelling.startswith("-O") and given.spelling != "-O")
    return "" if in_spelling else f" {given.value}"


def ignored_variables(variables: Iterable[str]) -> list[str]:
    """A warning for each vLLM environment variable that is set."""
    lines = []
    for name in variables:
        instead = ENVIRONMENT.get(name, "nothing: `tpserve serve --help` lists all flags")
        nothing, _, why = instead.partition("nothing: ")
        lines.append(f"{name} is set and has no effect: {f'use {instead}' if nothing else why}")
    return lines
