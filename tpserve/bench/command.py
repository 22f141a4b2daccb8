"""`tpserve bench ...`: the command lines of the benchmarks. Owns their flags; what measures is loaded when it is wanted."""

import datetime
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Struct
from msgspec.structs import asdict

from tpserve.cli.command import Command, HelpWanted, wants_help
from tpserve.cli.server_url import URL, server_url
from tpserve.cli.vllm import ANY, OFF, SOME_OF, switch, value_of
from tpserve.config import env
from tpserve.config.schema import Flag, WrongValue
from tpserve.errors import UserError
from tpserve.host.network import LOOPBACK, host_port

MOST = 1 << 20
"""No number on these command lines is sensibly larger."""
GOODPUT = ("ttft", "tpot", "e2el")
TARGET, LOAD, REPORT = "Server", "Load", "Report"


def run(argv: Sequence[str]) -> int:
    """Run a benchmark; returns the exit code. Raises UserError, or HelpWanted."""
    if argv[:1] and argv[0] in BENCHMARKS:
        _, command, measure = BENCHMARKS[argv[0]]
        flags, engine, notice = command.parse(argv[1:])
        if notice:
            sys.stderr.write(f"tpserve {command.name}: {notice}\n")
        return measure(flags, engine)
    if wants_help(argv):
        rows = [f"  tpserve bench {name:<12}{about}" for name, (about, _, _) in BENCHMARKS.items()]
        raise HelpWanted("\n".join(["Benchmarks; each has a --help of its own:", *rows]))
    said = f"tpserve bench {argv[0]}: there is no such benchmark" if argv else "tpserve bench: say which one"
    raise UserError(f"{said}: {', '.join(BENCHMARKS)}")


# The flags


def _picture(text: str) -> Path:
    if Path(text).suffix != ".svg":
        raise WrongValue("an .svg file, which every browser shows and can print as another kind")
    return Path(text)


def _number(help: str, least: int = 1, also: str = "") -> Flag:
    """A whole number. `also`: what vLLM calls it."""
    return Flag(LOAD, help, at_least=least, at_most=MOST, aliases=(also,) if also else ())


def _ratio(help: str) -> Flag:
    return Flag(LOAD, help, at_least=0, below=1, metavar="R", aliases=("--random-range-ratio",))


def _file(help: str, *also: str) -> Flag:
    return Flag(REPORT, help, aliases=also)


_PLOT = Flag(REPORT, "Draw latencies, and throughput over time.", parse=_picture, metavar="FILE.svg")
_FIGURES = "Write the figures there as JSON."
_RANGE = "Lengths are uniform from (1 - R) to (1 + R) times those."
_PREFIX = "Tokens before them that all prompts share."


class StepFlags(Struct, frozen=True, kw_only=True):
    """Of `bench step`."""

    batch: Annotated[tuple[int, ...], Flag(LOAD, "Decoding sequences.")] = (1, 32, 256)
    context: Annotated[int, _number("Prompt tokens of each.")] = 1024
    subscribers: Annotated[tuple[int, ...], Flag(LOAD, "Receivers of the plans.")] = (2, 8, 64)
    steps: Annotated[int, _number("Steps to measure in each case.")] = 500
    transport: Annotated[Literal["ipc", "tcp"], Flag(LOAD, "UNIX sockets, or TCP on loopback.")] = "ipc"
    output: Annotated[Path | None, _file(_FIGURES)] = None


class OfflineFlags(Struct, frozen=True, kw_only=True):
    """Of every benchmark of the engine without a server."""

    output_len: Annotated[int, _number("Tokens to generate.", also="--random-output-len")] = 128
    seed: Annotated[int, _number("Of prompts, and of --load-format dummy.", least=0)] = 0
    output: Annotated[Path | None, _file(_FIGURES, "--output-json")] = None
    plot: Annotated[Path | None, _PLOT] = None


class LatencyFlags(OfflineFlags, frozen=True, kw_only=True):
    """Of `bench latency`."""

    input_len: Annotated[int, _number("Tokens of a prompt.", also="--random-input-len")] = 32
    batch_size: Annotated[int, _number("Prompts in a batch.")] = 8
    num_iters: Annotated[int, _number("Batches to measure.")] = 10
    num_iters_warmup: Annotated[int, _number("Batches before, not measured.", least=0)] = 2


class ThroughputFlags(OfflineFlags, frozen=True, kw_only=True):
    """Of `bench throughput`."""

    input_len: Annotated[int, _number("Tokens of a prompt.", also="--random-input-len")] = 512
    num_prompts: Annotated[int, _number("Prompts to measure.")] = 100
    num_warmups: Annotated[int, _number("Like prompts before, not measured.", least=0)] = 1
    range_ratio: Annotated[float, _ratio(_RANGE)] = 0.0
    prefix_len: Annotated[int, _number(_PREFIX, least=0, also="--random-prefix-len")] = 0


class ServeFlags(Struct, frozen=True, kw_only=True):
    """Of `bench serve`. None: not said."""

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
        Flag(TARGET, "Whose server it is: all are measured alike, ...-chat by --endpoint chat.", aliases=("--endpoint-type",)),
    ] = "tpserve"
    model: Annotated[str | None, Flag(TARGET, "Model to ask for. Default: the first that the server names.")] = None
    served_model_name: Annotated[str | None, Flag(TARGET, "Name by which the server knows --model.")] = None
    api_key: Annotated[str | None, Flag(TARGET, "Key to send; better given as TPSERVE_API_KEY, which `ps` does not show.")] = None
    endpoint: Annotated[
        Literal["completions", "chat", "/v1/completions", "/v1/chat/completions"] | None,
        Flag(TARGET, "What is asked. Default: completions, or what --backend says."),
    ] = None
    num_prompts: Annotated[int | None, _number("Requests to measure. Default: 100, or all of the --dataset.")] = None
    num_warmups: Annotated[int, _number("Like requests before, not measured.", least=0)] = 1
    request_rate: Annotated[
        float | Literal["inf"],
        Flag(LOAD, "Requests sent a second, at random moments; inf: all at once.", above=0, at_most=MOST),
    ] = "inf"
    burstiness: Annotated[
        float | None, Flag(LOAD, "Of those: 1 is a Poisson process, less is burstier. Default: 1.", above=0, at_most=MOST)
    ] = None
    max_concurrency: Annotated[int | None, _number("Most requests open at once; others wait unsent. Default: no limit.")] = None
    input_len: Annotated[int | None, _number("Tokens of a random prompt. Default: 512.", also="--random-input-len")] = None
    output_len: Annotated[int | None, _number("Tokens to generate. Default: 128.", also="--random-output-len")] = None
    range_ratio: Annotated[float | None, _ratio(f"{_RANGE} Default: 0.")] = None
    prefix_len: Annotated[int | None, _number(f"{_PREFIX} Default: 0.", least=0, also="--random-prefix-len")] = None
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
    ignore_eos: Annotated[bool, Flag(LOAD, "Generate on past the model's end (on by default); --no-... stops there.")] = True
    temperature: Annotated[float, Flag(LOAD, "0 is greedy.", at_least=0, at_most=MOST)] = 0.0
    seed: Annotated[int, Flag(LOAD, "Of prompts, lengths and moments.")] = 0
    goodput: Annotated[
        tuple[str, ...],
        Flag(REPORT, "Count what is within bounds: ttft:500 tpot:50 e2el:5000.", metavar="METRIC:MS [METRIC:MS ...]"),
    ] = ()
    output: Annotated[Path | None, _file(_FIGURES)] = None
    save_result: Annotated[bool, _file("Write them to a file with a name as vLLM's.")] = False
    result_dir: Annotated[Path | None, _file("Where that file is. Default: this directory.")] = None
    result_filename: Annotated[str | None, _file("Its name.")] = None
    save_detailed: Annotated[bool, _file("And every request by itself.", "--save-details")] = False
    plot: Annotated[Path | None, _PLOT] = None


# From flags to what measures


def _run_step(flags: StepFlags, _: list[str]) -> int:
    env.set_omp_spin()
    from tpserve.bench.step import run as run_step

    return run_step(**asdict(flags))


def _run_latency(flags: LatencyFlags, engine: list[str]) -> int:
    from tpserve.bench.offline import LatencyWorkload, latency

    workload = asdict(flags)
    output, plot = workload.pop("output"), workload.pop("plot")
    return latency(LatencyWorkload(**workload), engine, output, plot)


def _run_throughput(flags: ThroughputFlags, engine: list[str]) -> int:
    from tpserve.bench.offline import ThroughputWorkload, throughput

    workload = asdict(flags)
    output, plot = workload.pop("output"), workload.pop("plot")
    return throughput(ThroughputWorkload(**workload), engine, output, plot)


def _run_serve(flags: ServeFlags, _: list[str]) -> int:
    """Check what flags say of each other, and fill in what was not said."""
    from tpserve.bench import serve
    from tpserve.bench.workload import Workload, endpoint, read_dataset

    if flags.burstiness is not None and flags.request_rate == "inf":
        raise UserError("--burstiness is of the gaps between requests: give a --request-rate, too")
    output = _output(flags)
    if flags.save_detailed and output is None:
        raise UserError("--save-detailed writes into the report: give --output, too")
    path, count = flags.dataset, flags.num_prompts
    if flags.dataset_name is not None and (flags.dataset_name == "custom") != (path is not None):
        way_out = "leave --dataset out" if path is not None else "give --dataset, too"
        raise UserError(f"--dataset-name {flags.dataset_name}: {way_out}", param="dataset_name")
    if path is not None:
        for name in ("input_len", "range_ratio", "prefix_len"):
            if getattr(flags, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} is for random prompts, --dataset has its own: give one of the two")
    dataset = [] if path is None else read_dataset(path, flags.output_len)
    if path is not None and (not dataset or len(dataset) < (count or 0)):
        raise UserError(f"--dataset {path} holds {len(dataset)} prompts: give a longer file or a smaller --num-prompts")
    chat = flags.backend.endswith("-chat")
    api = endpoint(flags.endpoint or ("chat" if chat else "completions"))
    if chat and api != "chat":
        raise UserError(
            f"--backend {flags.backend} is asked by chat, and --endpoint {flags.endpoint} is not: leave one of them out"
        )
    workload = Workload(
        endpoint=api,
        prompts="dataset" if path else "ids" if api == "completions" else "words",
        num_prompts=count or len(dataset) or 100,
        num_warmups=flags.num_warmups,
        request_rate=None if flags.request_rate == "inf" else flags.request_rate,
        burstiness=flags.burstiness or 1.0,
        max_concurrency=flags.max_concurrency,
        input_len=None if path else flags.input_len or 512,
        output_len=flags.output_len if path else flags.output_len or 128,
        range_ratio=flags.range_ratio or 0.0,
        prefix_len=flags.prefix_len or 0,
        dataset=None if path is None else str(path),
        ignore_eos=flags.ignore_eos,
        temperature=flags.temperature,
        seed=flags.seed,
    )
    options = serve.ServeOptions(
        url=_url(flags),
        model=flags.served_model_name or flags.model,
        api_key=flags.api_key or env.overrides().get("api_key"),
        workload=workload,
        dataset=dataset,
        goodput_ms=_bounds(flags.goodput),
        output=output,
        plot=flags.plot,
        save_detailed=flags.save_detailed,
    )
    return serve.run(options)


def _url(flags: ServeFlags) -> str:
    if flags.host is None and flags.port is None:
        return flags.url or URL
    if flags.url is not None:
        raise UserError("--url has a host and a port: leave --host and --port out", param="url")
    return f"http://{host_port(flags.host or LOOPBACK, flags.port or 8000)}"


def _output(flags: ServeFlags) -> Path | None:
    """The file of figures: --output, or one with a name as vLLM gives it."""
    if not (flags.save_result or flags.result_dir or flags.result_filename):
        return flags.output
    if flags.output is not None:
        raise UserError("--output and --save-result both name a file: give one of them", param="output")
    most = "" if flags.max_concurrency is None else f"-concurrency{flags.max_concurrency}"
    model = "" if flags.model is None else f"-{Path(flags.model).name}"
    moment = datetime.datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    name = flags.result_filename or f"{flags.backend}-{flags.request_rate}qps{most}{model}-{moment}.json"
    return (flags.result_dir or Path()) / name


def _bounds(texts: Sequence[str]) -> dict[Any, float]:
    """METRIC:MS of --goodput."""
    bounds = {}
    for text in texts:
        metric, _, most = text.partition(":")
        most_ms = float(most) if most.replace(".", "", 1).isdecimal() else 0.0
        if metric not in GOODPUT or not most_ms:
            raise UserError(
                f"--goodput {text} is no bound such as ttft:500, tpot:50 or e2el:5000 (milliseconds)", param="goodput"
            )
        bounds[metric] = most_ms
    return bounds


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
"""Flags of vLLM's benchmarks that are none of these."""

_STEP = Command(
    "bench step",
    "What a decode step costs rank 0 on the CPU beside the model: scheduling, encoding and broadcasting the plan, building its\n"
    "tensors, applying its result. The device is a fake; scheduler, sockets and tensors are real.",
    StepFlags,
)
_LATENCY = Command(
    "bench latency",
    "One batch at a time, without a server: what prefill takes, and each token after it. Greedy, without an end. Takes MODEL\n"
    "and the engine's flags as `tpserve serve` does, such as -tp 2.",
    LatencyFlags,
    takes_server_flags=True,
    vllm_flags=_VLLM_OFFLINE,
)
_THROUGHPUT = Command(
    "bench throughput",
    "Many prompts at once, without a server: requests and tokens a second. Greedy, without an end. Takes MODEL and the engine's\n"
    "flags as `tpserve serve` does, such as -tp 2.",
    ThroughputFlags,
    takes_server_flags=True,
    vllm_flags=_VLLM_OFFLINE,
)
_SERVE = Command(
    "bench serve",
    "A load against a running server with the OpenAI API, whoever's: latency, throughput, failures. Every answer is streamed;\n"
    "tokens are counted by the server's usage, or else by chunks. Flags are also taken as vLLM spells them.",
    ServeFlags,
    vllm_flags=_VLLM_SERVE,
)
BENCHMARKS: dict[str, tuple[str, Command[Any], Callable[[Any, list[str]], int]]] = {
    "latency": ("one batch at a time, without a server: prefill, and milliseconds a token", _LATENCY, _run_latency),
    "throughput": ("many prompts at once, without a server: tokens a second", _THROUGHPUT, _run_throughput),
    "serve": ("a load against the URL of a running server, this or another one with the OpenAI API", _SERVE, _run_serve),
    "step": ("what a decode step costs rank 0 on the CPU beside the model", _STEP, _run_step),
}
