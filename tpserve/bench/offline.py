"""`tpserve bench latency` and `tpserve bench throughput`: the engine through `LLM.generate`, without HTTP.

    latency      one batch at a time. Each batch runs twice, for one token and for all tokens, with new prompts each time, so that
                 no prefix is cached. The difference is the time of the tokens after the first.
    throughput   all prompts in one call

`request_timing` defines the latencies of single requests; they count from the call. For `latency` they come from the batches of
all tokens. Under torchrun every script takes part, and rank 0's script reports.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tpserve.bench.figures import LatencyStats, latencies, table
from tpserve.bench.plot import svg
from tpserve.bench.report import BenchReport, MachineInfo, check_writable, write
from tpserve.bench.request_timing import Metric, RequestTiming
from tpserve.bench.workload import BenchRequest, RandomPrompts
from tpserve.cli import server_flags
from tpserve.cli.option import OPTIONS
from tpserve.config import env
from tpserve.errors import EngineFailure, UserError
from tpserve.llm.api import LLM
from tpserve.llm.outputs import RequestOutput
from tpserve.llm.params import SamplingParams


class LatencyWorkload(msgspec.Struct, frozen=True, kw_only=True):
    """The workload of `latency`. Lengths are tokens of one sequence."""

    batch_size: int
    input_len: int
    output_len: int
    num_iters: int
    num_iters_warmup: int
    seed: int

    def __str__(self) -> str:
        return f"batches of {self.batch_size}, {self.input_len} tokens in, {self.output_len} out, seed {self.seed}"


class ThroughputWorkload(msgspec.Struct, frozen=True, kw_only=True):
    """The workload of `throughput`. The lengths mean the same as in `bench serve`."""

    num_prompts: int
    num_warmups: int
    input_len: int
    output_len: int
    range_ratio: float
    prefix_len: int
    seed: int

    def __str__(self) -> str:
        spread = f" (up to {self.range_ratio:.0%} more or less)" if self.range_ratio else ""
        shared = f" after a shared prefix of {self.prefix_len}" if self.prefix_len else ""
        return f"{self.num_prompts} prompts, {self.input_len} tokens in{shared}, {self.output_len} out{spread}, seed {self.seed}"


class LatencyFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of `latency`.

    `ready_s`: time to load the engine. `prefill`: time to the first token. `whole`: time to the last token. `ms_per_token`: time
    of a step, which gives one token to each sequence of the batch; None for a single output token. Both rates count the batch.
    """

    ready_s: float
    prefill: LatencyStats
    whole: LatencyStats
    prefill_tokens_per_s: float
    ms_per_token: float | None
    output_tokens_per_s: float | None
    latency: dict[Metric, LatencyStats]


class ThroughputFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of `throughput`. `ready_s`: time to load the engine."""

    ready_s: float
    duration_s: float
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    latency: dict[Metric, LatencyStats]


class BenchRun(NamedTuple):
    """The result of a benchmark. `timings` are for the plot and count from the start of their run; `runs` counts the runs."""

    figures: LatencyFigures | ThroughputFigures
    timings: list[RequestTiming]
    runs: int


class CallTimings(NamedTuple):
    """The times of one call of `LLM.generate`. `timings` count from its start."""

    duration_s: float
    cached_tokens: int
    timings: list[RequestTiming]


def latency(workload: LatencyWorkload, engine_argv: Sequence[str], output: Path | None, plot: Path | None) -> int:
    """Run the benchmark; returns the exit code. `engine_argv`: the model and its flags, as `tpserve serve` takes them."""

    def measure(llm: LLM, ready_s: float) -> BenchRun:
        prompts = RandomPrompts("ids", 0, workload.seed)

        def batch(num_tokens: int) -> CallTimings:
            return generate(llm, [prompts.next(workload.input_len, num_tokens) for _ in range(workload.batch_size)])

        for _ in range(workload.num_iters_warmup):
            batch(workload.output_len)
        pairs = [(batch(1), batch(workload.output_len)) for _ in range(workload.num_iters)]
        prefill = LatencyStats.of([first.duration_s for first, _ in pairs])
        whole = LatencyStats.of([all.duration_s for _, all in pairs])
        timings = [timing for _, all in pairs for timing in all.timings]
        assert prefill is not None and whole is not None
        rest = workload.output_len - 1
        ms_per_token = (whole.p50_ms - prefill.p50_ms) / rest if rest else None
        figures = LatencyFigures(
            ready_s=ready_s,
            prefill=prefill,
            whole=whole,
            prefill_tokens_per_s=round(workload.batch_size * workload.input_len / prefill.p50_ms * 1e3, 2),
            ms_per_token=None if ms_per_token is None else round(ms_per_token, 4),
            output_tokens_per_s=None if not ms_per_token else round(workload.batch_size / ms_per_token * 1e3, 2),
            latency=latencies(timings),
        )
        return BenchRun(figures, timings, workload.num_iters)

    return _run("latency", workload, engine_argv, output, plot, measure)


def throughput(workload: ThroughputWorkload, engine_argv: Sequence[str], output: Path | None, plot: Path | None) -> int:
    """Run the benchmark; returns the exit code. `engine_argv`: the model and its flags, as `tpserve serve` takes them."""

    def measure(llm: LLM, ready_s: float) -> BenchRun:
        prompts = RandomPrompts("ids", workload.prefix_len, workload.seed)
        lengths = (workload.input_len, workload.output_len, workload.range_ratio)
        requests = [prompts.next(*lengths) for _ in range(workload.num_prompts + workload.num_warmups)]
        generate(llm, requests[workload.num_prompts :])
        requests = requests[: workload.num_prompts]
        duration_s, cached_tokens, timings = generate(llm, requests)
        input_tokens, output_tokens = (
            sum(request.input_len for request in requests),
            sum(request.output_len for request in requests),
        )
        figures = ThroughputFigures(
            ready_s=ready_s,
            duration_s=round(duration_s, 3),
            input_tokens=input_tokens,
            cached_tokens=cached_tokens,
            output_tokens=output_tokens,
            requests_per_s=round(len(requests) / duration_s, 3),
            output_tokens_per_s=round(output_tokens / duration_s, 2),
            total_tokens_per_s=round((input_tokens + output_tokens) / duration_s, 2),
            latency=latencies(timings),
        )
        return BenchRun(figures, timings, 1)

    return _run("throughput", workload, engine_argv, output, plot, measure)


def generate(llm: LLM, requests: Sequence[BenchRequest]) -> CallTimings:
    """One greedy call of `LLM.generate`. Raises UserError when an output has fewer tokens than requested."""
    params = [
        SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=request.output_len, detokenize=False) for request in requests
    ]
    begin_s = time.perf_counter()
    outputs = llm.generate([request.prompt for request in requests], params, use_tqdm=False)
    duration_s = time.perf_counter() - begin_s
    for request, output in zip(requests, outputs, strict=True):
        if (count := len(output.outputs[0].token_ids)) != request.output_len:
            raise UserError(
                f"{request.input_len} tokens in and {request.output_len} out do not fit the context, {count} came out: "
                "lower --input-len or --output-len, or raise --max-model-len"
            )
    return CallTimings(duration_s, sum(output.num_cached_tokens for output in outputs), [_timing(output) for output in outputs])


def _timing(output: RequestOutput) -> RequestTiming:
    times = output.metrics
    begin_s = times.first_token_ts - times.first_token_latency
    token_s = [token_ts - begin_s for token_ts in times.token_ts]
    return RequestTiming(0.0, token_s, token_s[-1], len(token_s))


def _run(
    benchmark: str,
    workload: LatencyWorkload | ThroughputWorkload,
    engine_argv: Sequence[str],
    output: Path | None,
    plot: Path | None,
    measure: Callable[[LLM, float], BenchRun],
) -> int:
    """Load the engine, measure, and write the report on rank 0; returns the exit code."""
    flags, note = server_flags.read_line(engine_argv)
    reports = not env.under_torchrun() or env.rank_env().rank == 0
    if note and reports:
        sys.stderr.write(f"tpserve bench {benchmark}: {note}\n")
    if reports:
        check_writable(output, plot)
    engine_flags = {name: value for name, option in OPTIONS.items() if (value := getattr(flags, name)) != option.default}
    machine, begin_s = MachineInfo.here(), time.perf_counter()
    try:
        with LLM(**engine_flags, seed=workload.seed) as llm:
            result, timings, runs = measure(llm, round(time.perf_counter() - begin_s, 3))
    except EngineFailure as error:
        sys.stderr.write(f"tpserve bench {benchmark}: {error}\n")
        return 1
    if not reports:
        return 0
    values = msgspec.structs.asdict(result)
    lines = [*(f"{name:<22}{_text(value)}" for name, value in values.items() if name != "latency"), *table(result.latency)]
    sys.stdout.write("\n".join([f"{benchmark} on {machine}", *lines]) + "\n")
    if output is not None:
        inputs = {**msgspec.to_builtins(workload), "engine": engine_flags}
        BenchReport.of(benchmark, machine, ("torch",), inputs, result).write(output)
    if plot is not None:
        write("--plot", plot, svg(f"{engine_flags.get('model', 'built-in model')}: {workload}", timings, runs).encode())
    return 0


def _text(value: Any) -> str:
    if isinstance(value, LatencyStats):
        return f"{value.p50_ms:,.2f} ms p50, {value.p90_ms:,.2f} p90, {value.p99_ms:,.2f} p99, {value.mean_ms:,.2f} mean"
    return "-" if value is None else f"{value:,}"
