"""`tpserve bench ...`: dispatches to a benchmark and resolves its flags (`flags`). Imports torch and aiohttp only for a benchmark
that runs."""

import datetime
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from msgspec.structs import asdict

from tpserve.bench import flags as bench_flags
from tpserve.bench.flags import FrontendFlags, LatencyFlags, OfflineFlags, RooflineFlags, ServeFlags, StepFlags, ThroughputFlags
from tpserve.bench.workload import BenchRequest, Workload, endpoint, read_dataset
from tpserve.cli.command import Command, HelpWanted, wants_help
from tpserve.cli.server_url import URL
from tpserve.config import env
from tpserve.errors import UserError
from tpserve.host.network import LOOPBACK, host_port

GOODPUT_METRICS = ("ttft", "tpot", "e2el")


class Benchmark(NamedTuple):
    """One benchmark. `run` takes its flags and the engine's arguments, and returns the exit code."""

    about: str
    command: Command[Any]
    run: Callable[[Any, list[str]], int]


def run(argv: Sequence[str]) -> int:
    """Run a benchmark; returns the exit code. Raises UserError, or HelpWanted."""
    if argv[:1] and argv[0] in BENCHMARKS:
        benchmark = BENCHMARKS[argv[0]]
        flags, engine_argv, note = benchmark.command.parse(argv[1:])
        if note:
            sys.stderr.write(f"tpserve {benchmark.command.name}: {note}\n")
        return benchmark.run(flags, engine_argv)
    if wants_help(argv):
        rows = [f"  tpserve bench {name:<12}{benchmark.about}" for name, benchmark in BENCHMARKS.items()]
        raise HelpWanted("\n".join(["Benchmarks; each has a --help of its own:", *rows]))
    text = f"tpserve bench {argv[0]}: there is no such benchmark" if argv else "tpserve bench: say which one"
    raise UserError(f"{text}: {', '.join(BENCHMARKS)}")


def _run_step(flags: StepFlags, _: list[str]) -> int:
    env.set_omp_spin()
    from tpserve.bench.step import run as run_step

    return run_step(**asdict(flags))


def _run_roofline(flags: RooflineFlags, engine_argv: list[str]) -> int:
    env.set_omp_spin()
    from tpserve.bench.roofline import run as run_roofline

    return run_roofline(engine_argv, **asdict(flags))


def _run_frontend(flags: FrontendFlags, engine_argv: list[str]) -> int:
    from tpserve.bench.frontend import run as run_frontend

    rate = None if flags.rate == "inf" else flags.rate
    return run_frontend(engine_argv, **(asdict(flags) | {"rate": rate}))


def _run_latency(flags: LatencyFlags, engine_argv: list[str]) -> int:
    from tpserve.bench.offline import LatencyWorkload, latency

    return latency(LatencyWorkload(**_workload_fields(flags)), engine_argv, flags.output, flags.plot)


def _run_throughput(flags: ThroughputFlags, engine_argv: list[str]) -> int:
    from tpserve.bench.offline import ThroughputWorkload, throughput

    return throughput(ThroughputWorkload(**_workload_fields(flags)), engine_argv, flags.output, flags.plot)


def _workload_fields(flags: OfflineFlags) -> dict[str, Any]:
    return {name: value for name, value in asdict(flags).items() if name not in ("output", "plot")}


def _run_serve(flags: ServeFlags, _: list[str]) -> int:
    """Run `bench serve`. Raises UserError for flags that contradict each other."""
    from tpserve.bench import serve

    if flags.burstiness is not None and flags.request_rate == "inf":
        raise UserError("--burstiness shapes the gaps between requests: give a --request-rate, too")
    output = _output(flags)
    if flags.save_detailed and output is None:
        raise UserError("--save-detailed writes into the report: give --output, too")
    dataset = _dataset(flags)
    options = serve.ServeOptions(
        url=_url(flags),
        model=flags.served_model_name or flags.model,
        api_key=flags.api_key or env.overrides().get("api_key"),
        workload=_workload(flags, len(dataset)),
        dataset=dataset,
        goodput_ms=_bounds(flags.goodput),
        output=output,
        plot=flags.plot,
        save_detailed=flags.save_detailed,
    )
    return serve.run(options)


def _dataset(flags: ServeFlags) -> list[BenchRequest]:
    """The requests of --dataset; empty without one."""
    path = flags.dataset
    if flags.dataset_name is not None and (flags.dataset_name == "custom") != (path is not None):
        way_out = "leave --dataset out" if path is not None else "give --dataset, too"
        raise UserError(f"--dataset-name {flags.dataset_name}: {way_out}", param="dataset_name")
    if path is None:
        return []
    for name in ("input_len", "range_ratio", "prefix_len"):
        if getattr(flags, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for random prompts, --dataset has its own: give one of the two")
    dataset = read_dataset(path, flags.output_len)
    if not dataset or len(dataset) < (flags.num_prompts or 0):
        raise UserError(f"--dataset {path} holds {len(dataset)} prompts: give a longer file or a smaller --num-prompts")
    return dataset


def _workload(flags: ServeFlags, dataset_len: int) -> Workload:
    """The load with every default filled in."""
    path = flags.dataset
    chat = flags.backend.endswith("-chat")
    api = endpoint(flags.endpoint or ("chat" if chat else "completions"))
    if chat and api != "chat":
        raise UserError(
            f"--backend {flags.backend} takes chat requests, and --endpoint {flags.endpoint} does not: leave one of them out"
        )
    return Workload(
        endpoint=api,
        prompts="dataset" if path else "ids" if api == "completions" else "words",
        num_prompts=flags.num_prompts or dataset_len or 100,
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


def _url(flags: ServeFlags) -> str:
    if flags.host is None and flags.port is None:
        return flags.url or URL
    if flags.url is not None:
        raise UserError("--url has a host and a port: leave --host and --port out", param="url")
    return f"http://{host_port(flags.host or LOOPBACK, flags.port or 8000)}"


def _output(flags: ServeFlags) -> Path | None:
    """The file of the figures: --output, or a file named as vLLM names it."""
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
    """The bounds of --goodput in milliseconds, from texts such as ttft:500."""
    bounds = {}
    for text in texts:
        metric, _, most = text.partition(":")
        most_ms = float(most) if most.replace(".", "", 1).isdecimal() else 0.0
        if metric not in GOODPUT_METRICS or not most_ms:
            raise UserError(
                f"--goodput {text} is no bound such as ttft:500, tpot:50 or e2el:5000 (milliseconds)", param="goodput"
            )
        bounds[metric] = most_ms
    return bounds


BENCHMARKS = {
    "latency": Benchmark(
        "one batch at a time, without a server: prefill, and milliseconds a token", bench_flags.LATENCY, _run_latency
    ),
    "throughput": Benchmark("many prompts at once, without a server: tokens a second", bench_flags.THROUGHPUT, _run_throughput),
    "serve": Benchmark(
        "a load against the URL of a running server, this or another one with the OpenAI API", bench_flags.SERVE, _run_serve
    ),
    "frontend": Benchmark(
        "streams of the HTTP frontend without a model: tokens a second of its processor time", bench_flags.FRONTEND, _run_frontend
    ),
    "roofline": Benchmark(
        "decode steps and a prefill on the CPU against bandwidth and arithmetic measured beside",
        bench_flags.ROOFLINE,
        _run_roofline,
    ),
    "step": Benchmark("the CPU time of a decode step on rank 0, without the model", bench_flags.STEP, _run_step),
}
