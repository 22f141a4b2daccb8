"""`tpserve bench ...`: the command lines of the benchmarks. Owns their flags; what measures is loaded when it is wanted."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tpserve.config import env
from tpserve.config.cli import HelpWanted, Parser
from tpserve.errors import UserError

MOST = 1 << 20
"""No count on these command lines is sensibly larger."""
GOODPUT = ("ttft", "tpot", "e2el")


def run(argv: Sequence[str]) -> int:
    """Run a benchmark; returns the exit code. Raises UserError, or HelpWanted."""
    wants_help = bool({"--help", "-h"} & set(argv))
    if argv[:1] and argv[0] in BENCHMARKS:
        _, make_parser, measure = BENCHMARKS[argv[0]]
        parser = make_parser()
        if wants_help:
            raise HelpWanted(parser.format_help().rstrip())
        known, rest = parser.parse_known_args(argv[1:])
        if rest and "engine" not in known:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return measure(vars(known) | ({"engine": rest} if rest else {}))
    if wants_help:
        rows = [f"  tpserve bench {name:<12}{about}" for name, (about, _, _) in BENCHMARKS.items()]
        raise HelpWanted("\n".join(["Benchmarks; each has a --help of its own:", *rows]))
    said = f"tpserve bench {argv[0]}: there is no such benchmark" if argv else "tpserve bench: which one"
    raise UserError(f"{said}: see `tpserve bench --help`")


def _run_step(options: dict[str, Any]) -> int:
    env.calm_threads()
    from tpserve.bench.step import run as run_step

    return run_step(**options)


def _run_latency(options: dict[str, Any]) -> int:
    from tpserve.bench.offline import Batches, latency

    engine, output = options.pop("engine"), options.pop("output")
    return latency(Batches(**options), engine, output)


def _run_throughput(options: dict[str, Any]) -> int:
    from tpserve.bench.offline import Crowd, throughput

    engine, output = options.pop("engine"), options.pop("output")
    return throughput(Crowd(**options), engine, output)


def _run_serve(options: dict[str, Any]) -> int:
    """Check what flags say of each other, and fill in what was not said."""
    from tpserve.bench import serve
    from tpserve.bench.workload import Workload, endpoint, read_dataset

    if options["burstiness"] is not None and options["request_rate"] is None:
        raise UserError("--burstiness is of the gaps between requests: give a --request-rate, too")
    if options["save_detailed"] and options["output"] is None:
        raise UserError("--save-detailed writes into the report: give --output, too")
    path, count = options["dataset"], options["num_prompts"]
    if path is not None:
        for name in ("input_len", "range_ratio", "prefix_len"):
            if options[name] is not None:
                raise UserError(f"--{name.replace('_', '-')} is for random prompts, --dataset has its own: give one of the two")
    dataset = [] if path is None else read_dataset(path, options["output_len"])
    if path is not None and (not dataset or len(dataset) < (count or 0)):
        raise UserError(f"--dataset {path} holds {len(dataset)} prompts: give a longer file or a smaller --num-prompts")
    api = endpoint(options["endpoint"])
    workload = Workload(
        endpoint=api,
        prompts="dataset" if path else "ids" if api == "completions" else "words",
        num_prompts=count or len(dataset) or 100,
        num_warmups=options["num_warmups"],
        request_rate=options["request_rate"],
        burstiness=options["burstiness"] or 1.0,
        max_concurrency=options["max_concurrency"],
        input_len=None if path else options["input_len"] or 512,
        output_len=options["output_len"] if path else options["output_len"] or 128,
        range_ratio=options["range_ratio"] or 0.0,
        prefix_len=options["prefix_len"] or 0,
        dataset=path and str(path),
        ignore_eos=options["ignore_eos"],
        temperature=options["temperature"],
        seed=options["seed"],
    )
    rest = {name: options[name] for name in ("url", "model", "output", "plot", "save_detailed")}
    key = options["api_key"] or env.overrides().get("api_key")
    return serve.run(
        serve.Options(**rest, api_key=key, workload=workload, dataset=dataset, goodput_ms=dict(options["goodput"] or ()))
    )


def _parser(name: str, description: str) -> Parser:
    return Parser(prog=f"tpserve bench {name}", description=description, add_help=False, allow_abbrev=False)


def _offline(name: str, description: str, input_len: int) -> Parser:
    parser = _parser(name, f"{description} Takes MODEL and the engine's flags as `tpserve serve` does, such as -tp 2.")
    parser.set_defaults(engine=())
    flag = parser.add_argument
    flag("--input-len", "--random-input-len", type=_count, default=input_len, metavar="N",
         help=f"tokens of a prompt (default {input_len})")  # fmt: skip
    flag("--output-len", "--random-output-len", type=_count, default=128, metavar="N", help="tokens to generate (default 128)")
    flag("--seed", type=_whole, default=0, metavar="N", help="of prompts, and of --load-format dummy (default 0)")
    flag("--output", "--output-json", type=Path, metavar="FILE", help="write the figures there as JSON")
    return parser


def _latency() -> Parser:
    parser = _offline(
        "latency",
        "One batch at a time, without a server: what prefill takes, and each token after it. Greedy, without an end.",
        input_len=32,
    )
    flag = parser.add_argument
    flag("--batch-size", type=_count, default=8, metavar="N", help="prompts in a batch (default 8)")
    flag("--num-iters", type=_count, default=10, metavar="N", help="batches to measure (default 10)")
    flag("--num-iters-warmup", type=_whole, default=2, metavar="N", help="batches before, not measured (default 2)")
    return parser


def _throughput() -> Parser:
    parser = _offline(
        "throughput",
        "Many prompts at once, without a server: requests and tokens a second. Greedy, without an end.",
        input_len=512,
    )
    flag = parser.add_argument
    flag("--num-prompts", type=_count, default=100, metavar="N", help="prompts to measure (default 100)")
    flag("--num-warmups", type=_whole, default=1, metavar="N", help="like prompts before, not measured (default 1)")
    flag("--range-ratio", "--random-range-ratio", type=_ratio, default=0.0, metavar="R",
         help="lengths are uniform from (1 - R) to (1 + R) times those (default 0)")  # fmt: skip
    flag("--prefix-len", "--random-prefix-len", type=_whole, default=0, metavar="N",
         help="tokens before them that all prompts share (default 0)")  # fmt: skip
    return parser


def _serve() -> Parser:
    parser = _parser(
        "serve",
        "A load against a running server with the OpenAI API, whoever's: latency, throughput, failures. Every answer is "
        "streamed; tokens are counted by the server's usage, or else by chunks. Flags are also taken as vLLM spells them.",
    )
    flag = parser.add_argument
    flag("--url", "--base-url", type=_url, default="http://127.0.0.1:8000", help="the server (default http://127.0.0.1:8000)")
    flag("--model", metavar="NAME", help="model to ask for (default: the first that the server names)")
    flag("--api-key", metavar="KEY", help="key to send; better given as TPSERVE_API_KEY, which `ps` does not show")
    flag("--endpoint", default="completions", help="completions or chat (default completions)",
         choices=("completions", "chat", "/v1/completions", "/v1/chat/completions"), metavar="NAME")  # fmt: skip
    flag("--num-prompts", type=_count, metavar="N", help="requests to measure (default 100, or all of the --dataset)")
    flag("--num-warmups", type=_whole, default=1, metavar="N", help="like requests before, not measured (default 1)")
    flag("--request-rate", type=_rate, metavar="X", help="requests sent a second, at random moments (default inf: all at once)")
    flag("--burstiness", type=_positive, metavar="X", help="of those: 1 is a Poisson process, less is burstier (default 1)")
    flag("--max-concurrency", type=_count, metavar="N", help="most requests open at once; others wait unsent (default: no limit)")
    flag("--input-len", "--random-input-len", type=_count, metavar="N", help="tokens of a random prompt (default 512)")
    flag("--output-len", "--random-output-len", type=_count, metavar="N", help="tokens to generate (default 128)")
    flag("--range-ratio", "--random-range-ratio", type=_ratio, metavar="R",
         help="lengths are uniform from (1 - R) to (1 + R) times those (default 0)")  # fmt: skip
    flag("--prefix-len", "--random-prefix-len", type=_whole, metavar="N",
         help="tokens before them that all prompts share (default 0)")  # fmt: skip
    flag("--dataset", "--dataset-path", type=Path, metavar="FILE",
         help='prompts from a file instead, with {"prompt": "...", "output_len": 128} on each line')  # fmt: skip
    flag("--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="generate on past the model's end (default)")
    flag("--temperature", type=_not_negative, default=0.0, metavar="X", help="0 is greedy (default 0)")
    flag("--seed", type=int, default=0, metavar="N", help="of prompts, lengths and moments (default 0)")
    flag("--goodput", type=_bound, nargs="+", metavar="METRIC:MS", help="count what is within bounds: ttft:500 tpot:50 e2el:5000")
    flag("--output", type=Path, metavar="FILE", help="write the figures there as JSON")
    flag("--save-detailed", "--save-details", action="store_true", help="and every request by itself")
    flag("--plot", type=_picture, metavar="FILE.svg", help="draw latencies, and throughput over time")
    return parser


def _step() -> Parser:
    parser = _parser(
        "step",
        "What a decode step costs rank 0 on the CPU beside the model: scheduling, encoding and broadcasting the "
        "plan, building its tensors, applying its result. The device is a fake; scheduler, sockets and tensors are real.",
    )
    parser.add_argument(
        "--batch", type=_counts, default=(1, 32, 256), metavar="N,N", help="decoding sequences (default 1,32,256)"
    )
    parser.add_argument("--context", type=_count, default=1024, metavar="N", help="prompt tokens of each (default 1024)")
    parser.add_argument(
        "--subscribers", type=_counts, default=(2, 8, 64), metavar="N,N", help="receivers of the plans (default 2,8,64)"
    )
    parser.add_argument("--steps", type=_count, default=500, metavar="N", help="steps to measure in each case (default 500)")
    parser.add_argument(
        "--transport", choices=("ipc", "tcp"), default="ipc", help="UNIX sockets, or TCP on loopback (default ipc)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures there as JSON")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MOST:,}")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _whole(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def _positive(text: str) -> float:
    if not 0 < (value := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _not_negative(text: str) -> float:
    return 0.0 if _number(text) == 0 else _positive(text)


def _rate(text: str) -> float | None:
    return None if _number(text) == math.inf else _positive(text)


def _ratio(text: str) -> float:
    if not 0 <= (value := _number(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 1")
    return value


def _url(text: str) -> str:
    """Without the /v1 that clients of the API are given."""
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} does not begin with http:// or https://")
    return text.rstrip("/").removesuffix("/v1")


def _bound(text: str) -> tuple[str, float]:
    metric, _, most_ms = text.partition(":")
    if metric not in GOODPUT:
        raise argparse.ArgumentTypeError(f"{text!r} is no bound such as ttft:500, tpot:50 or e2el:5000 (milliseconds)")
    return metric, _positive(most_ms)


def _picture(text: str) -> Path:
    if Path(text).suffix != ".svg":
        raise argparse.ArgumentTypeError(f"{text!r}: pictures are .svg, which every browser shows and can print as another kind")
    return Path(text)


BENCHMARKS: dict[str, tuple[str, Callable[[], Parser], Callable[[dict[str, Any]], int]]] = {
    "latency": ("one batch at a time, without a server: prefill, and milliseconds a token", _latency, _run_latency),
    "throughput": ("many prompts at once, without a server: tokens a second", _throughput, _run_throughput),
    "serve": ("a load against the URL of a running server, this or another one with the OpenAI API", _serve, _run_serve),
    "step": ("what a decode step costs rank 0 on the CPU beside the model", _step, _run_step),
}
