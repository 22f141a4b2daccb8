"""The flags of `tpserve bench ...`: one struct and one `Command` a benchmark, with the spellings of vLLM. Measures nothing."""

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Struct

from tpserve.bench.stream_load import MAX_STREAMS, StreamApi
from tpserve.cli.command import Command
from tpserve.cli.server_url import URL, server_url
from tpserve.cli.vllm import ANY, OFF, SOME_OF, switch, value_of
from tpserve.config.flags import Flag, WrongValue

MAX_NUMBER = 1 << 20
"""The upper bound of the numbers on these command lines."""
TARGET, LOAD, REPORT = "Server", "Load", "Report"


def _svg_path(text: str) -> Path:
    if Path(text).suffix != ".svg":
        raise WrongValue("an .svg file, which every browser shows and can print as another kind")
    return Path(text)


def _number(help: str, least: int = 1, alias: str = "") -> Flag:
    """The flag of a whole number. `alias`: vLLM's name for it."""
    return Flag(LOAD, help, at_least=least, at_most=MAX_NUMBER, aliases=(alias,) if alias else ())


def _ratio(help: str) -> Flag:
    return Flag(LOAD, help, at_least=0, below=1, metavar="R", aliases=("--random-range-ratio",))


def _file(help: str, *aliases: str) -> Flag:
    return Flag(REPORT, help, aliases=aliases)


_PLOT = Flag(REPORT, "Draw latencies, and throughput over time.", parse=_svg_path, metavar="FILE.svg")
_OUTPUT = "Write the figures there as JSON."
_RANGE = "Lengths are uniform from (1 - R) to (1 + R) times --input-len and --output-len."
_PREFIX = "Tokens of a prefix that all prompts share, before --input-len."


class StepFlags(Struct, frozen=True, kw_only=True):
    """The flags of `tpserve bench step`."""

    batch: Annotated[tuple[int, ...], Flag(LOAD, "Decoding sequences.")] = (1, 32, 256)
    context: Annotated[int, _number("Prompt tokens of each.")] = 1024
    subscribers: Annotated[tuple[int, ...], Flag(LOAD, "Receivers of the plans.")] = (2, 8, 64)
    steps: Annotated[int, _number("Steps to measure in each case.")] = 500
    transport: Annotated[Literal["ipc", "tcp"], Flag(LOAD, "UNIX sockets, or TCP on loopback.")] = "ipc"
    output: Annotated[Path | None, _file(_OUTPUT)] = None


class RooflineFlags(Struct, frozen=True, kw_only=True):
    """The flags of `tpserve bench roofline`."""

    shapes: Annotated[tuple[str, ...], Flag(LOAD, "Without MODEL: which of built-in, 100M and 1B. Default: all three.")] = ()
    batch: Annotated[tuple[int, ...], Flag(LOAD, "Sequences of a decode step.")] = (1, 16, 64)
    context: Annotated[int, _number("Tokens that each of them sees.")] = 512
    prefill: Annotated[int, _number("Tokens of the prompt of a prefill.")] = 1024
    steps: Annotated[int, _number("Steps to measure of each kind; of prefills three at most.")] = 20
    output: Annotated[Path | None, _file(_OUTPUT)] = None
    plot: Annotated[
        Path | None, Flag(REPORT, "Draw the roofline, a point for each step.", parse=_svg_path, metavar="FILE.svg")
    ] = None


class FrontendFlags(Struct, frozen=True, kw_only=True):
    """The flags of `tpserve bench frontend`."""

    endpoint: Annotated[StreamApi, Flag(LOAD, "API of the streams.")] = "completions"
    streams: Annotated[int, Flag(LOAD, "Streams at once.", at_least=1, at_most=MAX_STREAMS)] = 256
    output_len: Annotated[int, _number("Tokens of each.")] = 200
    rounds: Annotated[int, _number("How often all of them are opened and read to the end, after a first time.")] = 3
    rate: Annotated[
        float | Literal["inf"],
        Flag(LOAD, "Tokens a second of each stream; inf: as fast as they are read.", above=0, at_most=MAX_NUMBER),
    ] = "inf"
    floor: Annotated[bool, Flag(LOAD, "Measure a plain aiohttp handler that writes the same bytes, too.")] = True
    seed: Annotated[int, Flag(LOAD, "Seed of the tokens.")] = 0
    output: Annotated[Path | None, _file(_OUTPUT, "--output-json", "--json")] = None


class OfflineFlags(Struct, frozen=True, kw_only=True):
    """The flags that `latency` and `throughput` share."""

    output_len: Annotated[int, _number("Tokens to generate.", alias="--random-output-len")] = 128
    seed: Annotated[int, _number("Seed of the prompts, and of --load-format dummy.", least=0)] = 0
    output: Annotated[Path | None, _file(_OUTPUT, "--output-json")] = None
    plot: Annotated[Path | None, _PLOT] = None


class LatencyFlags(OfflineFlags, frozen=True, kw_only=True):
    """The flags of `tpserve bench latency`."""

    input_len: Annotated[int, _number("Tokens of a prompt.", alias="--random-input-len")] = 32
    batch_size: Annotated[int, _number("Prompts in a batch.")] = 8
    num_iters: Annotated[int, _number("Batches to measure.")] = 10
    num_iters_warmup: Annotated[int, _number("Batches before those, not measured.", least=0)] = 2


class ThroughputFlags(OfflineFlags, frozen=True, kw_only=True):
    """The flags of `tpserve bench throughput`."""

    input_len: Annotated[int, _number("Tokens of a prompt.", alias="--random-input-len")] = 512
    num_prompts: Annotated[int, _number("Prompts to measure.")] = 100
    num_warmups: Annotated[int, _number("Similar prompts before those, not measured.", least=0)] = 1
    range_ratio: Annotated[float, _ratio(_RANGE)] = 0.0
    prefix_len: Annotated[int, _number(_PREFIX, least=0, alias="--random-prefix-len")] = 0


class ServeFlags(Struct, frozen=True, kw_only=True):
    """The flags of `tpserve bench serve`. None: the flag is not given."""

    url: Annotated[
        str | None,
        Flag(
            TARGET,
            f"The server. Default: that of --host and --port, else {URL}.",
            aliases=("--base-url",),
            parse=server_url,
            metavar="URL",
        ),
    ] = None
    host: Annotated[str | None, Flag(TARGET, "The server's host, instead of --url.")] = None
    port: Annotated[int | None, Flag(TARGET, "The server's port, instead of --url.", at_least=1, at_most=65535)] = None
    backend: Annotated[
        Literal["tpserve", "vllm", "openai", "openai-chat", "sglang", "sglang-oai", "sglang-oai-chat", "vllm-chat"],
        Flag(
            TARGET,
            "Kind of server. All are measured in the same way; ...-chat means --endpoint chat.",
            aliases=("--endpoint-type",),
        ),
    ] = "tpserve"
    model: Annotated[str | None, Flag(TARGET, "Model to request. Default: the first that the server lists.")] = None
    served_model_name: Annotated[str | None, Flag(TARGET, "Name by which the server knows --model.")] = None
    api_key: Annotated[str | None, Flag(TARGET, "Key to send; better given as TPSERVE_API_KEY, which `ps` does not show.")] = None
    endpoint: Annotated[
        Literal["completions", "chat", "/v1/completions", "/v1/chat/completions"] | None,
        Flag(TARGET, "API to send requests to. Default: completions, or that of --backend."),
    ] = None
    num_prompts: Annotated[int | None, _number("Requests to measure. Default: 100, or all of the --dataset.")] = None
    num_warmups: Annotated[int, _number("Similar requests before those, not measured.", least=0)] = 1
    request_rate: Annotated[
        float | Literal["inf"],
        Flag(LOAD, "Requests sent a second, at random moments; inf: all at once.", above=0, at_most=MAX_NUMBER),
    ] = "inf"
    burstiness: Annotated[
        float | None,
        Flag(
            LOAD,
            "Shape of the gaps between requests: 1 is a Poisson process, less is burstier. Default: 1.",
            above=0,
            at_most=MAX_NUMBER,
        ),
    ] = None
    max_concurrency: Annotated[
        int | None, _number("Most requests open at the same time; further ones wait unsent. Default: no limit.")
    ] = None
    input_len: Annotated[int | None, _number("Tokens of a random prompt. Default: 512.", alias="--random-input-len")] = None
    output_len: Annotated[int | None, _number("Tokens to generate. Default: 128.", alias="--random-output-len")] = None
    range_ratio: Annotated[float | None, _ratio(f"{_RANGE} Default: 0.")] = None
    prefix_len: Annotated[int | None, _number(f"{_PREFIX} Default: 0.", least=0, alias="--random-prefix-len")] = None
    dataset_name: Annotated[
        Literal["random", "custom"] | None, Flag(LOAD, "random: prompts of --input-len; custom: those of --dataset.")
    ] = None
    dataset: Annotated[
        Path | None,
        Flag(
            LOAD,
            'Prompts from a file instead, with {"prompt": "...", "output_len": 128} on each line.',
            aliases=("--dataset-path",),
        ),
    ] = None
    ignore_eos: Annotated[
        bool, Flag(LOAD, "Generate past the model's end of sequence (on by default); --no-... stops there.")
    ] = True
    temperature: Annotated[float, Flag(LOAD, "0 is greedy.", at_least=0, at_most=MAX_NUMBER)] = 0.0
    seed: Annotated[int, Flag(LOAD, "Seed of prompts, lengths and send times.")] = 0
    goodput: Annotated[
        tuple[str, ...],
        Flag(REPORT, "Count the requests within these bounds: ttft:500 tpot:50 e2el:5000.", metavar="METRIC:MS [METRIC:MS ...]"),
    ] = ()
    output: Annotated[Path | None, _file(_OUTPUT)] = None
    save_result: Annotated[bool, _file("Write the figures to a file named as vLLM names it.")] = False
    result_dir: Annotated[Path | None, _file("Directory of that file. Default: the current one.")] = None
    result_filename: Annotated[str | None, _file("Name of that file.")] = None
    save_detailed: Annotated[bool, _file("Write every single request, too.", "--save-details")] = False
    plot: Annotated[Path | None, _PLOT] = None


# vLLM's flags that have no equivalent here

_VLLM_OFFLINE = {
    "--backend": value_of("the engine is tpserve's", "vllm", "tpserve"),
    "--dataset-name": value_of("prompts are random", "random"),
    "--disable-tqdm": switch("there is no progress bar"),
    "--n": value_of("each prompt has one answer", "1"),
    "--use-beam-search": switch("answers are greedy", OFF),
    "--profile": switch("--step-trace of `tpserve serve` writes one", OFF),
    "--async-engine": switch("there is one engine", OFF),
    "--disable-detokenize": switch("tokens are never made into text"),
}
_VLLM_SERVE = {
    "--tokenizer": value_of("the server counts the tokens", ANY),
    "--tokenizer-mode": value_of("the server counts the tokens", ANY),
    "--trust-remote-code": switch("no code is run"),
    "--disable-tqdm": switch("there is no bar, and on a terminal alone a line that counts"),
    "--percentile-metrics": value_of("all of them are reported", SOME_OF + "ttft,tpot,itl,e2el"),
    "--metric-percentiles": value_of("these are reported", SOME_OF + "50,90,99"),
    "--append-result": switch("a report is a file of its own", OFF),
    "--profile": switch("--step-trace of `tpserve serve` writes one", OFF),
    "--use-beam-search": switch("answers are drawn token by token", OFF),
    "--ready-check-timeout-sec": value_of("the server must be ready", "0"),
    "--logprobs": value_of("none are asked for", "0"),
    "--top-p": value_of("nothing is cut off", "1"),
    "--top-k": value_of("nothing is cut off", "-1", "0"),
    "--min-p": value_of("nothing is cut off", "0"),
}

# The commands

STEP = Command(
    "bench step",
    "The CPU time of a decode step on rank 0 without the model: scheduling, encoding and broadcasting the plan, building its\n"
    "tensors, applying its result. The device is a fake; scheduler, sockets and tensors are real.",
    StepFlags,
)
ROOFLINE = Command(
    "bench roofline",
    "Decode steps and a prefill on the CPU against the floor that this machine allows: bytes of weights and KV cache by the\n"
    "bandwidth, operations by the rate of a product, both measured in the same run. Of three shapes, or of MODEL; weights are\n"
    "random. Takes the engine's flags as `tpserve serve` does, such as -q int8 or --dtype float32. One rank, all cores.",
    RooflineFlags,
    takes_server_flags=True,
)
FRONTEND = Command(
    "bench frontend",
    "What the HTTP frontend takes to stream tokens, without a model: the real process, an engine that only sends tokens, and\n"
    "clients that compare every stream with what was sent for it. Takes MODEL, whose tokenizer is used, and the server's flags.",
    FrontendFlags,
    takes_server_flags=True,
)
LATENCY = Command(
    "bench latency",
    "One batch at a time, without a server: the time of prefill and of each later token. Greedy, past any end. Takes MODEL\n"
    "and the engine's flags as `tpserve serve` does, such as -tp 2.",
    LatencyFlags,
    takes_server_flags=True,
    vllm_flags=_VLLM_OFFLINE,
)
THROUGHPUT = Command(
    "bench throughput",
    "Many prompts at once, without a server: requests and tokens a second. Greedy, past any end. Takes MODEL and the engine's\n"
    "flags as `tpserve serve` does, such as -tp 2.",
    ThroughputFlags,
    takes_server_flags=True,
    vllm_flags=_VLLM_OFFLINE,
)
SERVE = Command(
    "bench serve",
    "A load against any running server with the OpenAI API: latency, throughput, failures. Every response is streamed;\n"
    "tokens are counted by the server's usage, or else by chunks. Flags are also taken as vLLM spells them.",
    ServeFlags,
    vllm_flags=_VLLM_SERVE,
)
