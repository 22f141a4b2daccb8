"""The figures of `tpserve bench serve`, from the records of its requests. Pure. `request_timing` defines the latencies.

Throughput counts completed requests over the time from the first send to the last end. A failed request counts only in `failed`
and `failures`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from tpserve.bench.client import ResponseRecord
from tpserve.bench.report import percentile
from tpserve.bench.request_timing import LABELS, Metric, RequestTiming, seconds


class LatencyStats(msgspec.Struct, frozen=True):
    """Mean and percentiles in milliseconds. Each percentile is a measured value, without interpolation."""

    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float

    @staticmethod
    def of(seconds: Sequence[float]) -> "LatencyStats | None":
        """The statistics of times in seconds; None without any."""
        if not seconds:
            return None
        ordered = sorted(seconds)
        values = (sum(seconds) / len(seconds), *(percentile(ordered, share) for share in (0.5, 0.9, 0.99)))
        return LatencyStats(*(round(value * 1e3, 3) for value in values))


class FailureCount(msgspec.Struct, frozen=True):
    """One kind of failure, its number, and the detail of the first one."""

    kind: str
    count: int
    example: str


class ClientLoad(msgspec.Struct, frozen=True):
    """The load of the measuring process: its share of a core, and the delay of its event loop in milliseconds."""

    cpu_share: float
    late_p99_ms: float
    late_max_ms: float


class ServeFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The report's figures. `latency` has no entry for a metric without values, such as the ITL of single tokens."""

    duration_s: float
    completed: int
    failed: int
    failures: list[FailureCount]
    ended_early: int
    """Completed requests with fewer tokens than requested."""
    input_tokens: int
    cached_tokens: int | None
    """Input tokens that were in the server's prefix cache; None when no response reports it."""
    output_tokens: int
    tokens_counted_by: Literal["usage", "chunks", "usage and chunks"]
    """`usage`: the server's count. `chunks`: a chunk counts as one token, and the input has the requested length."""
    tokens_per_chunk: float
    """Where this is well above 1, ITL is the time of several tokens: accepted draft tokens, or tokens without own text."""
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    peak_concurrency: int
    goodput_per_s: float | None
    """Completed requests within all bounds, per second; None without bounds."""
    latency: dict[Metric, LatencyStats]
    client: ClientLoad


def figures(records: Sequence[ResponseRecord], bounds_ms: Mapping[Metric, float], client: ClientLoad) -> ServeFigures:
    """The figures of a load of at least one request. `bounds_ms`: the bounds of goodput."""
    completed = [record for record in records if not record.failure]
    duration_s = max(record.end_s for record in records) - min(record.begin_s for record in records)
    per_s = 1 / max(duration_s, 1e-9)
    input_tokens, output_tokens = sum(r.input_tokens for r in completed), sum(r.output_tokens for r in completed)
    cached = [record.cached_tokens for record in completed if record.cached_tokens is not None]
    counted = sum(record.counted for record in completed)
    good = sum(all(_value_s(record, metric) * 1e3 <= most for metric, most in bounds_ms.items()) for record in completed)
    return ServeFigures(
        duration_s=round(duration_s, 3),
        completed=len(completed),
        failed=len(records) - len(completed),
        failures=failures(records),
        ended_early=sum(record.output_tokens < record.request.output_len for record in completed),
        input_tokens=input_tokens,
        cached_tokens=sum(cached) if cached else None,
        output_tokens=output_tokens,
        tokens_counted_by="usage" if counted == len(completed) else "usage and chunks" if counted else "chunks",
        tokens_per_chunk=round(output_tokens / max(1, sum(len(record.token_s) for record in completed)), 3),
        requests_per_s=round(len(completed) * per_s, 3),
        output_tokens_per_s=round(output_tokens * per_s, 2),
        total_tokens_per_s=round((input_tokens + output_tokens) * per_s, 2),
        peak_concurrency=peak([(record.begin_s, record.end_s) for record in records]),
        goodput_per_s=round(good * per_s, 3) if bounds_ms else None,
        latency=latencies(record.timing for record in completed),
        client=client,
    )


def failures(records: Sequence[ResponseRecord]) -> list[FailureCount]:
    """The failures by kind, the most frequent first."""
    kinds: dict[str, list[str]] = {}
    for record in records:
        if record.failure:
            kinds.setdefault(record.failure, []).append(record.detail)
    return sorted((FailureCount(kind, len(details), details[0]) for kind, details in kinds.items()), key=lambda f: -f.count)


def latencies(timings: Iterable[RequestTiming]) -> dict[Metric, LatencyStats]:
    """The statistics of each metric that has values."""
    return {metric: stats for metric, values in seconds(timings).items() if (stats := LatencyStats.of(values)) is not None}


def table(latency: Mapping[Metric, LatencyStats]) -> list[str]:
    """Latencies as the lines of a table."""
    lines = [f"{'ms':<12}{'mean':>12}{'p50':>12}{'p90':>12}{'p99':>12}"]
    for metric, stats in latency.items():
        values = (stats.mean_ms, stats.p50_ms, stats.p90_ms, stats.p99_ms)
        lines.append(f"{LABELS[metric]:<12}" + "".join(f"{value:>12,.2f}" for value in values))
    return lines


def peak(spans: Sequence[tuple[float, float]]) -> int:
    """The largest number of spans open at the same time. A span is closed at its end time."""
    events = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    most = now = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return most


def details(records: Sequence[ResponseRecord]) -> list[dict[str, Any]]:
    """One entry a request, in the order of the workload. `sent_s` counts from the first send."""
    begin_s = min(record.begin_s for record in records)
    return [
        {
            "sent_s": round(record.begin_s - begin_s, 6),
            "failure": record.failure,
            "input_tokens": record.input_tokens,
            "output_tokens": record.output_tokens,
            "ttft_ms": None if record.failure else round(record.timing.ttft_s * 1e3, 3),
            "e2el_ms": round(record.timing.e2el_s * 1e3, 3),
            "itl_ms": [round(value * 1e3, 3) for value in record.timing.itl_s],
        }
        for record in records
    ]


def _value_s(record: ResponseRecord, metric: Metric) -> float:
    """The value that goodput compares with its bound. A single token has no TPOT, which counts as 0."""
    timing = record.timing
    return {"ttft": timing.ttft_s, "tpot": timing.tpot_s or 0.0, "e2el": timing.e2el_s}[metric]
