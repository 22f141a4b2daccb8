"""`tpserve bench latency` and `tpserve bench throughput`: what the engine does for a caller of `LLM.generate`, without HTTP.

    latency      one batch after another. A batch is sent twice, for one token and for all of them, with prompts of its own each
                 time, so that no prefix is cached; the difference is what the tokens after the first took
    throughput   all prompts in one call

Latencies of single requests are those of `timing`, counted from the call; of `latency`, of the batches of all tokens.
Under torchrun every script takes part, and rank 0's reports.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tpserve.bench.figures import LatencyStats, latencies, table
from tpserve.bench.plot import svg
from tpserve.bench.report import BenchReport, MachineInfo, check, write
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
    """The workload of `latency`."""

    batch_size: int
    input_len: int
    output_len: int
    num_iters: int
    num_iters_warmup: int
    seed: int

    def __str__(self) -> str:
        return f"batches of {self.batch_size}, {self.input_len} tokens in, {self.output_len} out, seed {self.seed}"


class ThroughputWorkload(msgspec.Struct, frozen=True, kw_only=True):
    """The workload of `throughput`; lengths as in `bench serve`."""

    num_prompts: int
    num_warmups: int
    input_len: int
    output_len: int
    range_ratio: float
    prefix_len: int
    seed: int

    def __str__(self) -> str:
        near = f" (up to {self.range_ratio:.0%} more or less)" if self.range_ratio else ""
        shared = f" after a shared prefix of {self.prefix_len}" if self.prefix_len else ""
        return f"{self.num_prompts} prompts, {self.input_len} tokens in{shared}, {self.output_len} out{near}, seed {self.seed}"


class LatencyFigures(msgspec.Struct, frozen=True, kw_only=True):
    """`ms_per_token`: of a step, which gives each sequence of the batch a token; None where the first is the only one.

    `prefill`: until the first token is there. Both rates are of the whole batch.
    """

    ready_s: float
    prefill: LatencyStats
    whole: LatencyStats
    prefill_tokens_per_s: float
    ms_per_token: float | None
    output_tokens_per_s: float | None
    latency: dict[Metric, LatencyStats]


class ThroughputFigures(msgspec.Struct, frozen=True, kw_only=True):
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
    """`timings`: what was measured, for the picture, all of them counted from the begin of their run."""

    figures: LatencyFigures | ThroughputFigures
    timings: list[RequestTiming]
    runs: int


class CallTimings(NamedTuple):
    """Of one call. `timings` are counted from its begin."""

    duration_s: float
    cached_tokens: int
    timings: list[RequestTiming]


def latency(workload: LatencyWorkload, engine: Sequence[str], output: Path | None, plot: Path | None) -> int:
    """Measure; returns the exit code. `engine`: the model and its flags, as `tpserve serve` takes them."""

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

    return _run("latency", workload, engine, output, plot, measure)


def throughput(workload: ThroughputWorkload, engine: Sequence[str], output: Path | None, plot: Path | None) -> int:
    """Measure; returns the exit code. `engine`: the model and its flags, as `tpserve serve` takes them."""

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

    return _run("throughput", workload, engine, output, plot, measure)


def generate(llm: LLM, requests: Sequence[BenchRequest]) -> CallTimings:
    """One call, for all tokens that are asked for. UserError when an answer is short."""
    params = [
        SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=request.output_len, detokenize=False) for request in requests
    ]
    begin_s = time.perf_counter()
    outputs = llm.generate([request.prompt for request in requests], params, use_tqdm=False)
    duration_s = time.perf_counter() - begin_s
    for request, output in zip(requests, outputs, strict=True):
        if (got := len(output.outputs[0].token_ids)) != request.output_len:
            raise UserError(
                f"{request.input_len} tokens in and {request.output_len} out do not fit the context, {got} came out: "
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
    engine: Sequence[str],
    output: Path | None,
    plot: Path | None,
    measure: Callable[[LLM, float], BenchRun],
) -> int:
    flags, notice = server_flags.read_line(engine)
    leads = not env.under_torchrun() or env.rank_env().rank == 0
    if notice and leads:
        sys.stderr.write(f"tpserve bench {benchmark}: {notice}\n")
    for flag, path in (("--output", output), ("--plot", plot)):
        if path is not None and leads:
            check(flag, path)
    said = {name: value for name, option in OPTIONS.items() if (value := getattr(flags, name)) != option.default}
    machine, begin_s = MachineInfo.here(), time.perf_counter()
    try:
        with LLM(**said, seed=workload.seed) as llm:
            result, timings, runs = measure(llm, round(time.perf_counter() - begin_s, 3))
    except EngineFailure as error:
        sys.stderr.write(f"tpserve bench {benchmark}: {error}\n")
        return 1
    if not leads:
        return 0
    shown = msgspec.structs.asdict(result)
    lines = [*(f"{name:<22}{_shown(value)}" for name, value in shown.items() if name != "latency"), *table(result.latency)]
    sys.stdout.write("\n".join([f"{benchmark} on {machine}", *lines]) + "\n")
    if output is not None:
        asked = {**msgspec.to_builtins(workload), "engine": said}
        BenchReport.of(benchmark, machine, ("torch",), asked, result).write(output)
    if plot is not None:
        write("--plot", plot, svg(f"{said.get('model', 'built-in model')}: {workload}", timings, runs).encode())
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, LatencyStats):
        return f"{value.p50_ms:,.2f} ms p50, {value.p90_ms:,.2f} p90, {value.p99_ms:,.2f} p99, {value.mean_ms:,.2f} mean"
    return "-" if value is None else f"{value:,}"
