"""What of vLLM's command line is not here, and what to do instead; and docs/from-vllm.md, which is generated from it:
`python -m tpserve.config.vllm > docs/from-vllm.md`. A test checks that the page is current, and each row against the parser.

Owns no flag. A flag that is planned is refused too, by its name, until it is served.
"""

import re
import sys
from collections.abc import Iterable, Mapping

from tpserve.config.option import OPTIONS

ALWAYS = {
    "--enable-chunked-prefill": "prompts are always computed in chunks",
    "--long-prefill-token-threshold": "prompts are always computed in chunks",
    "--async-scheduling": "a plan is always sent before the results of the one before are in",
    "--num-scheduler-steps": "plans are sent ahead of results",
    "--stream-interval": "tokens are sent as they come, those of a step together",
    "--enforce-eager": "steps are never captured in graphs",
    "--max-seq-len-to-capture": "steps are never captured in graphs",
    "--cuda-graph-sizes": "steps are never captured in graphs",
    "--cudagraph-capture-sizes": "steps are never captured in graphs",
    "--max-cudagraph-capture-size": "steps are never captured in graphs",
    "--compilation-config": "nothing is compiled",
    "--optimization-level": "nothing is compiled",
    "--performance-mode": "there is one",
    "--attention-backend": "there is one for each kind of device",
    "--attention-config": "there is one for each kind of device",
    "--moe-backend": "there is one for each kind of device",
    "--all2all-backend": "experts need no all-to-all",
    "--disable-cascade-attn": "there is one kind of attention",
    "--disable-sliding-window": "a model's windows are always used",
    "--disable-hybrid-kv-cache-manager": "layers with windows and without always share one pool of blocks",
    "--calculate-kv-scales": "the cache has the model's type",
    "--disable-log-requests": "requests are never logged",
    "--enable-log-outputs": "requests are never logged",
    "--max-log-len": "requests are never logged",
    "--disable-uvicorn-access-log": "requests are never logged",
    "--disable-access-log-for-endpoints": "requests are never logged",
    "--disable-log-stats": "--log-level warning leaves the line of statistics out",
    "--enable-server-load-tracking": "statistics are at /metrics",
    "--enable-prompt-tokens-details": "usage always has the prompt's cached tokens",
    "--enable-request-id-headers": "a request's X-Request-Id always comes back",
    "--sse-keep-alive-interval": "a comment is sent every 10 s while there is nothing to say",
    "--prefix-caching-hash-algo": "blocks are always known by BLAKE2b, which nobody can make collide",
    "--scheduling-policy": "a request's `priority` is always honoured",
    "--preemption-mode": "a sequence that gave way is always computed again",
    "--swap-space": "a sequence that gave way is computed again",
    "--logprobs-mode": "log probabilities are those of the model, before temperature and filters",
    "--max-logprobs": "20 at most",
    "--chat-template-content-format": "a message's content is a text or a list of texts",
    "--response-role": "answers are the assistant's",
    "--disable-fastapi-docs": "there are no such pages",
    "--api-server-count": "one process answers HTTP",
    "--numa-bind": "each rank runs on the cores near its GPU, unless --no-binding",
    "--distributed-timeout-seconds": "a rank that is silent for 4 s is noticed",
    "--use-tqdm-on-load": "progress is always told",
    "--max-parallel-loading-workers": "each rank reads its own part only",
    "--safetensors-load-strategy": "files are mapped, and each rank reads its own part only",
    "--pt-load-map-location": "each rank reads its own part only",
    "--tokenizer-mode": "tokenizer.json, tokenizer.model and vocab.json with merges.txt are found",
    "--skip-tokenizer-init": "the tokenizer is always loaded",
    "--config-format": "config.json is read",
    "--hf-config-path": "config.json is read from MODEL",
    "--model-impl": "there is one",
    "--task": "every model generates",
    "--runner": "every model generates",
    "--convert": "every model generates",
    "--pooler-config": "every model generates",
    "--limit-mm-per-prompt": "text only",
    "--mm-processor-kwargs": "text only",
    "--mm-processor-cache-gb": "text only",
    "--media-io-kwargs": "text only",
    "--allowed-local-media-path": "text only",
    "--language-model-only": "text only",
    "--worker-cls": "there is one",
    "--worker-extension-cls": "no code is loaded by name",
    "--scheduler-cls": "no code is loaded by name",
    "--logits-processors": "no code is loaded by name",
    "--middleware": "no code is loaded by name",
    "--tool-parser-plugin": "no code is loaded by name",
    "--reasoning-parser-plugin": "no code is loaded by name",
    "--trust-remote-code": "no code of a repository is ever run; docs/models.md lists the models that are served",
    "--code-revision": "no code of a repository is ever run",
}
"""Flag to what is so without it: leave it out."""

ON = frozenset(
    {
        *("--enable-chunked-prefill", "--async-scheduling", "--use-tqdm-on-load"),
        *("--enable-prompt-tokens-details", "--enable-request-id-headers"),
    }
)
"""Those of them that cannot be turned off."""

INSTEAD = {
    "--kv-cache-memory-bytes": "--kv-cache-memory, in GiB",
    "--max-num-queued-reqs": "--max-queued-requests",
    "--max-waiting-requests": "--max-queued-requests",
    "--shutdown-timeout": "--drain-timeout",
    "--uvicorn-log-level": "--log-level",
    "--log-config-file": "--log-level",
    "--disable-custom-all-reduce": "--all-reduce nccl",
    "--otlp-traces-endpoint": "--step-trace for steps, /metrics for requests",
    "--collect-detailed-traces": "--step-trace",
    "--profiler-config": "--step-trace",
    "--device-ids": "CUDA_VISIBLE_DEVICES in the environment",
    "--config": "TPSERVE_ARG_<FLAG> in the environment, such as TPSERVE_ARG_MAX_MODEL_LEN",
    "--hf-token": "HF_TOKEN in the environment",
    "--enable-force-include-usage": "stream_options.include_usage in the request",
    "--default-chat-template-kwargs": "chat_template_kwargs in the request",
    "--uds": "a proxy in front, for UNIX sockets",
    "--ssl-keyfile": "a proxy in front, for TLS",
    "--ssl-certfile": "a proxy in front, for TLS",
    "--ssl-ca-certs": "a proxy in front, for TLS",
    "--ssl-cert-reqs": "a proxy in front, for TLS",
    "--root-path": "a proxy in front",
    "--data-parallel-address": "one server per replica, and a load balancer",
    "--data-parallel-rpc-port": "one server per replica, and a load balancer",
    "--data-parallel-rank": "one server per replica, and a load balancer",
    "--data-parallel-start-rank": "one server per replica, and a load balancer",
    "--data-parallel-size-local": "one server per replica, and a load balancer",
    "--data-parallel-backend": "one server per replica, and a load balancer",
    "--data-parallel-hybrid-lb": "one server per replica, and a load balancer",
    "--data-parallel-external-lb": "one server per replica, and a load balancer",
    "--hf-overrides": "a copy of config.json with the field changed",
    "--rope-scaling": "a copy of config.json with the field changed",
    "--rope-theta": "a copy of config.json with the field changed",
}
"""Flag to what does the same here."""

PLANNED = {
    "--quantization": "checkpoints in block FP8 and MXFP4 are read without it, and dequantised",
    "--kv-cache-dtype": "the cache has the model's type",
    "--enable-lora": "",
    "--lora-modules": "",
    "--max-loras": "",
    "--max-lora-rank": "",
    "--max-cpu-loras": "",
    "--lora-dtype": "",
    "--speculative-config": "",
    "--speculative-model": "",
    "--num-speculative-tokens": "",
    "--spec-method": "",
    "--spec-model": "",
    "--spec-tokens": "",
    "--enable-auto-tool-choice": "",
    "--tool-call-parser": "",
    "--tool-server": "",
    "--reasoning-parser": "",
    "--reasoning-config": "",
    "--structured-outputs-config": "",
    "--guided-decoding-backend": "",
    "--cpu-offload-gb": "",
    "--kv-offloading-size": "",
    "--enable-sleep-mode": "",
    "--kv-transfer-config": "",
    "--kv-events-config": "",
    "--decode-context-parallel-size": "",
    "--prefill-context-parallel-size": "",
    "--enable-eplb": "",
    "--enable-prompt-embeds": "",
}
"""Flag to what holds until then."""

SHORT = {
    "-q": "--quantization", "-O": "--optimization-level", "-cc": "--compilation-config", "-ac": "--attention-config",
    "-sc": "--speculative-config", "-asc": "--api-server-count", "-dcp": "--decode-context-parallel-size",
    "-pcp": "--prefill-context-parallel-size", "-dpn": "--data-parallel-rank", "-dpr": "--data-parallel-start-rank",
    "-dpl": "--data-parallel-size-local", "-dpa": "--data-parallel-address", "-dpp": "--data-parallel-rpc-port",
    "-dpb": "--data-parallel-backend", "-dph": "--data-parallel-hybrid-lb", "-dpe": "--data-parallel-external-lb",
}  # fmt: skip
"""vLLM's short forms of these."""

BUT = {
    "--host": "loopback unless said; vLLM listens everywhere",
    "--api-key": "one key",
    "--seed": "of --load-format dummy alone: requests have seeds of their own, and a request without one a random one",
    "--max-model-len": "a length that does not fit is refused, `auto` takes what fits",
    "--max-num-batched-tokens": "8192 on GPUs, 2048 on the CPU, unless said",
    "--distributed-executor-backend": "`mp`, `auto` and `external_launcher` all mean torchrun's ranks; `ray` is refused",
    "--data-parallel-size": "1 alone",
    "--load-format": "`auto`, `safetensors`, `dummy`",
}
"""Flag that is the same but for this."""

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

HEAD = """# Coming from vLLM

Generated by `python -m tpserve.config.vllm > docs/from-vllm.md`; do not edit.

`vllm serve MODEL ...` becomes `tpserve serve MODEL ...`, `from vllm import LLM` becomes `from tpserve import LLM`. What is not
served is refused by name when it is given, with these words, never ignored; short forms, `--no-...` and `--...-config.name` too.
Ray's flags (`--worker-use-ray`, `--ray-address`, `--num-gpus`, `--distributed-executor-backend ray`) are refused with the tpserve
command that does the same; `ray start`, `ray status` and a controller have no counterpart: `tpserve serve` on each node is all.
"""


def why_refused(flag: str) -> str | None:
    """What to say to who gives `flag`; None for a flag that is not known here."""
    flag = full_name(flag)
    if flag in ALWAYS:
        return f"{ALWAYS[flag]}: leave it out"
    if flag in INSTEAD:
        return f"use {INSTEAD[flag]}"
    if flag in PLANNED:
        return f"it is planned, and not served yet{f' ({PLANNED[flag]})' if PLANNED[flag] else ''}: leave it out"
    return None


def asks_nothing(flag: str) -> bool:
    """Whether `flag` turned off is what is here anyway, as it is by default in vLLM."""
    return flag not in ON and why_refused(flag) is not None


def full_name(flag: str) -> str:
    """Of a short form (`-q`, `-O3`), a switch turned off (`--no-...`), or a member of a JSON value (`--...-config.name`)."""
    if not flag.startswith("--"):
        return SHORT.get("-O" if re.fullmatch(r"-O([0-9]|[.].*)", flag) else flag, flag)
    flag = flag.partition(".")[0]
    return "--" + flag.removeprefix("--no-") if flag.startswith("--no-") else flag


def means_nothing(variables: Iterable[str]) -> list[str]:
    """A line for each of vLLM's variables that are set."""
    lines = []
    for name in variables:
        instead = ENVIRONMENT.get(name, "nothing: `tpserve serve --help` lists all flags")
        nothing, _, why = instead.partition("nothing: ")
        lines.append(f"{name} is set and means nothing here: {f'use {instead}' if nothing else why}")
    return lines


def markdown() -> str:
    """The whole page."""
    same = [option for option in OPTIONS.values() if option.about.named_by == "vLLM"]
    lines = [
        HEAD,
        "## The same\n",
        ", ".join(f"`{option.flag}`" for option in same) + ": [flags.md](flags.md) has their meaning. But:\n",
    ]
    lines += _table("| flag | here |", BUT)
    for title, table in (("Always so", ALWAYS), ("Otherwise here", INSTEAD), ("Planned", PLANNED), ("Environment", ENVIRONMENT)):
        lines += [f"## {title}\n", *_table("| vLLM | tpserve |", table)]
    lines.append("`CUDA_VISIBLE_DEVICES`, `HF_*`, `NCCL_*` and `GLOO_*` mean what they mean there.")
    return "\n".join(lines) + "\n"


def _table(head: str, rows: Mapping[str, str]) -> list[str]:
    return [head, "|---|---|", *(f"| `{name}` | {text.removeprefix('nothing: ')} |" for name, text in rows.items()), ""]


if __name__ == "__main__":
    sys.stdout.write(markdown())
