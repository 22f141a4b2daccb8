"""vLLM's flags that are none of tpserve's: what each becomes here. Pure.

A row of `KNOWN` says how a flag is read (a switch, or with a value), which of its values ask for what holds anyway, and what to
say of the others. `translate` takes a command line of vLLM's apart: what holds anyway is noted, what has another name here is
renamed, and whatever cannot be honoured is refused, all of it and not the first alone. docs/from-vllm.md is generated from this
table (`from_vllm`); a test checks each row against the parser. Flags that only have another name stand in `schema`, as `also`.
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
"""What may stand in `holds` beside plain values: a JSON object, or NAME=N, of zeros alone; some of these, joined by commas."""

Reads = Literal["switch", "value", "maybe", "many"]
Title = Literal["Always so", "Otherwise here", "Planned"]


@dataclass(frozen=True)
class Known:
    """A flag of vLLM's. `holds`: the values that ask for what is so anyway. `why`: what is so, or what does the same."""

    title: Title
    reads: Reads
    why: str
    holds: tuple[str, ...] = ()

    def asks_for_what_holds(self, value: str) -> bool:
        return any(_alike(value, held) for held in self.holds)

    def refusal(self) -> str:
        """Why it is refused, and the way out."""
        if self.title == "Otherwise here":
            return f"use {self.why}"
        if self.title == "Planned":
            return f"it is planned, and not served yet{f' ({self.why})' if self.why else ''}: leave it out"
        return f"{self.why}: leave it out"


def _alike(value: str, held: str) -> bool:
    if held in (ANY, value):
        return True
    if held.startswith(SOME_OF):
        return set(value.split(",")) <= set(held.removeprefix(SOME_OF).split(","))
    if held == ZEROS:
        return set(re.findall(r"\d+", value)) == {"0"}
    try:
        return float(value) == float(held) if not held.startswith("{") else json.loads(value) == json.loads(held)
    except ValueError:
        return False


def switch(why: str, *holds: str) -> Known:
    """A switch that asks for what holds; with `holds`, only so."""
    return Known("Always so", "switch", why, holds or (ON, OFF))


def value_of(why: str, *holds: str) -> Known:
    """A flag of which some values ask for what holds."""
    return Known("Always so", "value", why, holds)


def _instead(what: str, *holds: str, reads: Reads = "value") -> Known:
    return Known("Otherwise here", reads, what, holds)


def _planned(why: str = "", *holds: str, reads: Reads = "value") -> Known:
    return Known("Planned", reads, why, (*holds, OFF) if reads == "switch" else holds)


_NO_GRAPHS = "steps are never captured in graphs"
_CHUNKS = "prompts are always computed in chunks"
_ONE_BACKEND = "there is one for each kind of device"
_NEVER_LOGGED = "the text of a request is never logged"
_GENERATES = "every model generates"
_NO_CODE = "no code is loaded by name"
_OWN_PART = "each rank reads its own part only"
_PROXY = "a proxy in front"
_REPLICAS = "one server per replica, and a load balancer"
_COPY = "a copy of config.json with the field changed"

KNOWN: dict[str, Known] = {
    "--enable-chunked-prefill": switch(_CHUNKS, ON),
    "--long-prefill-token-threshold": value_of(_CHUNKS, "0"),
    "--max-num-partial-prefills": value_of(_CHUNKS, "1"),
    "--max-long-partial-prefills": value_of(_CHUNKS, "1"),
    "--async-scheduling": switch("a plan is always sent before the results of the one before are in", ON),
    "--disable-async-output-proc": switch("a plan is always sent before the results of the one before are in", OFF),
    "--num-scheduler-steps": value_of("plans are sent ahead of results", ANY),
    "--stream-interval": value_of("tokens are sent as they come, those of a step together", "1"),
    "--use-v2-block-manager": switch("there is one"),
    "--enforce-eager": switch(_NO_GRAPHS),
    "--max-seq-len-to-capture": value_of(_NO_GRAPHS, "0"),
    "--cuda-graph-sizes": Known("Always so", "many", _NO_GRAPHS),
    "--cudagraph-capture-sizes": Known("Always so", "many", _NO_GRAPHS),
    "--max-cudagraph-capture-size": value_of(_NO_GRAPHS, "0"),
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
    "--calculate-kv-scales": switch("the cache has the model's type", OFF),
    "--enable-log-outputs": switch(_NEVER_LOGGED, OFF),
    "--max-log-len": value_of(_NEVER_LOGGED, ANY),
    "--disable-uvicorn-access-log": switch(_NEVER_LOGGED),
    "--disable-access-log-for-endpoints": value_of(_NEVER_LOGGED, ANY),
    "--uvicorn-log-level": value_of("there is no uvicorn; --log-level is tpserve's", "info", "warning", "error", "critical"),
    "--disable-frontend-multiprocessing": switch("the frontend is a process of its own", OFF),
    "--enable-server-load-tracking": switch("statistics are at /metrics", OFF),
    "--enable-prompt-tokens-details": switch("usage always has the prompt's cached tokens", ON),
    "--enable-request-id-headers": switch("a request's X-Request-Id always comes back", ON),
    "--sse-keep-alive-interval": value_of("a comment is sent every 10 s while there is nothing to say", "10"),
    "--prefix-caching-hash-algo": value_of(
        "blocks are always known by BLAKE2b, which nobody can make collide", "sha256", "sha256_cbor", "sha256_cbor_64bit"
    ),
    "--scheduling-policy": value_of("a request's `priority` is always honoured, first come first otherwise", "fcfs", "priority"),
    "--preemption-mode": value_of("a sequence that gave way is always computed again", "recompute"),
    "--swap-space": value_of("a sequence that gave way is computed again, nothing is swapped", "0"),
    "--logprobs-mode": value_of("log probabilities are those of the model, before temperature and filters", "raw_logprobs"),
    "--max-logprobs": value_of("20 at most", "20"),
    "--chat-template-content-format": value_of("a message's content is a text or a list of texts", "auto"),
    "--response-role": value_of("answers are the assistant's", "assistant"),
    "--disable-fastapi-docs": switch("there are no such pages"),
    "--api-server-count": value_of("one process answers HTTP", "1"),
    "--distributed-executor-backend": value_of("ranks are torchrun's", "mp", "auto", "external_launcher", "uni"),
    "--distributed-timeout-seconds": value_of("a rank that is silent for 4 s is noticed"),
    "--use-tqdm-on-load": switch("progress is always told", ON),
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
    "--logits-processors": Known("Always so", "many", _NO_CODE),
    "--middleware": value_of(_NO_CODE),
    "--tool-parser-plugin": value_of(_NO_CODE),
    "--reasoning-parser-plugin": value_of(_NO_CODE),
    "--trust-remote-code": switch("no code of a repository is ever run; docs/models.md lists the models that are served"),
    "--code-revision": value_of("no code of a repository is ever run"),
    "--log-config-file": _instead("--log-level"),
    "--otlp-traces-endpoint": _instead("--step-trace for steps, /metrics for requests"),
    "--collect-detailed-traces": _instead("--step-trace"),
    "--profiler-config": _instead("--step-trace"),
    "--device-ids": _instead("CUDA_VISIBLE_DEVICES in the environment"),
    "--hf-token": _instead("HF_TOKEN in the environment", "", reads="maybe"),
    "--enable-force-include-usage": _instead("stream_options.include_usage in the request", OFF, reads="switch"),
    "--default-chat-template-kwargs": _instead("chat_template_kwargs in the request", "{}"),
    "--uds": _instead(f"{_PROXY}, for UNIX sockets"),
    "--ssl-keyfile": _instead(f"{_PROXY}, for TLS"),
    "--ssl-certfile": _instead(f"{_PROXY}, for TLS"),
    "--ssl-ca-certs": _instead(f"{_PROXY}, for TLS"),
    "--ssl-cert-reqs": _instead(f"{_PROXY}, for TLS", "0"),
    "--root-path": _instead(_PROXY),
    "--data-parallel-address": _instead(_REPLICAS),
    "--data-parallel-rpc-port": _instead(_REPLICAS),
    "--data-parallel-rank": _instead(_REPLICAS, "0"),
    "--data-parallel-start-rank": _instead(_REPLICAS, "0"),
    "--data-parallel-size-local": _instead(_REPLICAS, "1"),
    "--data-parallel-backend": _instead(_REPLICAS, "mp"),
    "--data-parallel-hybrid-lb": _instead(_REPLICAS, OFF, reads="switch"),
    "--data-parallel-external-lb": _instead(_REPLICAS, OFF, reads="switch"),
    "--hf-overrides": _instead(_COPY, "{}"),
    "--rope-scaling": _instead(_COPY),
    "--rope-theta": _instead(_COPY),
    "--quantization": _planned("checkpoints in block FP8 and MXFP4 are read without it, and dequantised"),
    "--kv-cache-dtype": _planned("the cache has the model's type", "auto"),
    "--enable-lora": _planned(reads="switch"),
    "--lora-modules": _planned(reads="many"),
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
    "--enable-auto-tool-choice": _planned(reads="switch"),
    "--tool-call-parser": _planned(),
    "--tool-server": _planned(),
    "--enable-reasoning": _planned(reads="switch"),
    "--reasoning-parser": _planned(),
    "--reasoning-config": _planned(),
    "--structured-outputs-config": _planned(),
    "--guided-decoding-backend": _planned("", "auto"),
    "--cpu-offload-gb": _planned("", "0"),
    "--kv-offloading-size": _planned("", "0"),
    "--enable-sleep-mode": _planned(reads="switch"),
    "--kv-transfer-config": _planned(),
    "--kv-events-config": _planned(),
    "--decode-context-parallel-size": _planned("", "1"),
    "--prefill-context-parallel-size": _planned("", "1"),
    "--enable-eplb": _planned(reads="switch"),
    "--enable-prompt-embeds": _planned(reads="switch"),
}  # fmt: skip

MAPPED = {"--kv-cache-memory-bytes": "--kv-cache-memory"}
"""Flag whose value is in bytes to the one in GiB."""

SHORT = {
    "-q": "--quantization", "-O": "--optimization-level", "-cc": "--compilation-config", "-ac": "--attention-config",
    "-sc": "--speculative-config", "-asc": "--api-server-count", "-dcp": "--decode-context-parallel-size",
    "-pcp": "--prefill-context-parallel-size", "-dpn": "--data-parallel-rank", "-dpr": "--data-parallel-start-rank",
    "-dpl": "--data-parallel-size-local", "-dpa": "--data-parallel-address", "-dpp": "--data-parallel-rpc-port",
    "-dpb": "--data-parallel-backend", "-dph": "--data-parallel-hybrid-lb", "-dpe": "--data-parallel-external-lb",
}  # fmt: skip
"""vLLM's short forms of these."""

ENVIRONMENT = {
    "VLLM_HOST_IP": "--interface, with the address",
    "VLLM_API_KEY": "TPSERVE_API_KEY",
    "VLLM_PORT": "--port-range",
    "VLLM_LOGGING_LEVEL": "--log-level",
    "VLLM_ATTENTION_BACKEND": "nothing: there is one for each kind of device",
    "VLLM_WORKER_MULTIPROC_METHOD": "nothing: ranks are torchrun's",
    "VLLM_USE_V1": "nothing: there is one engine",
}
"""Variable of the environment to what does the same; of others a start says that they mean nothing here."""


class GivenVllmFlag(NamedTuple):
    """One of vLLM's flags on a command line. `said`: as it was spelt; `value`: `ON` or `OFF` of a switch; None: it has none."""

    said: str
    flag: str
    value: str | None
    known: Known

    @property
    def holds(self) -> bool:
        """Whether it asks for what is so anyway. A member of a JSON value (`--x.y`) never does: the rest of it is not known."""
        return self.value is not None and "." not in self.said and self.known.asks_for_what_holds(self.value)

    def refusal(self) -> str:
        return f"{self.said} is refused: {self.known.refusal()}"


class Translation(NamedTuple):
    """A command line of vLLM's: the rest of it in tpserve's flags, what asks for what holds, and what is refused."""

    argv: list[str]
    holding: list[GivenVllmFlag]
    refused: list[GivenVllmFlag]


def translate(argv: Sequence[str], known: Mapping[str, Known] = KNOWN) -> Translation:
    """Take the flags of `known` out of a command line whose names have dashes. Raises WrongValue for a size that is none."""
    result = Translation([], [], [])
    rest = list(argv)
    while rest:
        said, equals, text = (arg := rest.pop(0)).partition("=")
        flag, value = full_name(said), text if equals else None
        if flag in MAPPED:
            given = value if value is not None else rest.pop(0) if rest else ""
            result.argv.append(f"{MAPPED[flag]}={human_number(given) / (1 << 30)!r}")
        elif flag not in known:
            result.argv.append(arg)
        else:
            given_flag = GivenVllmFlag(said, flag, _take(known[flag].reads, said, value, rest), known[flag])
            (result.holding if given_flag.holds else result.refused).append(given_flag)
    return result


def _take(reads: Reads, said: str, value: str | None, rest: list[str]) -> str | None:
    """The value of a flag, those that follow it in `rest` taken away."""
    if reads == "switch":
        on = value is None or value.lower() in ("1", "true")
        return OFF if said.startswith("--no-") == on else ON
    if value is not None or (compact := re.fullmatch(r"-O(\d)", said)):
        return value if value is not None else compact[1] if compact else None
    taken: list[str] = []
    while rest and not _is_flag(rest[0]) and (reads == "many" or not taken):
        taken.append(rest.pop(0))
    return " ".join(taken) if taken else "" if reads == "maybe" else None


def _is_flag(arg: str) -> bool:
    return arg.startswith("-") and not re.fullmatch(r"-\d+(\.\d+)?", arg)


def of_keyword(name: str, value: Any) -> GivenVllmFlag | None:
    """A keyword argument of a Python caller as the flag it would be; None for one that is not vLLM's. None as a value asks for
    nothing, and holds."""
    flag = "--" + name.replace("_", "-")
    if flag not in KNOWN:
        return None
    if KNOWN[flag].reads == "switch" and isinstance(value, bool | None):
        return GivenVllmFlag(name, flag, ON if value else OFF, KNOWN[flag])
    return GivenVllmFlag(name, flag, json.dumps(value) if isinstance(value, dict) else str(value), KNOWN[flag])


def full_name(flag: str) -> str:
    """Of a short form (`-q`, `-O3`), a switch turned off (`--no-...`), or a member of a JSON value (`--...-config.name`)."""
    if not flag.startswith("--"):
        return SHORT.get("-O" if re.fullmatch(r"-O([0-9]|[.].*)", flag) else flag, flag)
    flag = flag.partition(".")[0]
    return "--" + flag.removeprefix("--no-") if flag.startswith("--no-") else flag


def holding_line(given: Iterable[GivenVllmFlag]) -> str:
    """What a start says of flags that ask for what holds; empty without any."""
    by_reason: dict[str, list[str]] = {}
    for each in given:
        by_reason.setdefault(each.known.why, []).append(each.said + _shown(each))
    shown = [f"{', '.join(flags)} ({why})" for why, flags in by_reason.items()]
    return f"these flags ask for what holds anyway: {', '.join(shown)}" if shown else ""


def _shown(given: GivenVllmFlag) -> str:
    written = given.value in (ON, OFF, "", None) or (given.said.startswith("-O") and given.said != "-O")
    return "" if written else f" {given.value}"


def ignored_variables(variables: Iterable[str]) -> list[str]:
    """A line for each of vLLM's variables that are set."""
    lines = []
    for name in variables:
        instead = ENVIRONMENT.get(name, "nothing: `tpserve serve --help` lists all flags")
        nothing, _, why = instead.partition("nothing: ")
        lines.append(f"{name} is set and means nothing here: {f'use {instead}' if nothing else why}")
    return lines
