"""What the answers of a load amount to. Pure. `timing` says what the latencies are.

Throughput is that of completed requests, over the time from the first sending to the last end. A failed request is in
`failures` and in nothing else.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from tpserve.bench.client import ResponseRecord
from tpserve.bench.report import percentile
from tpserve.bench.request_timing import LABELS, Metric, RequestTiming, seconds


class LatencyStats(msgspec.Struct, frozen=True):
    """Half of the values are at most `p50_ms`, and so on; each but the mean is one that was measured."""

    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float

    @staticmethod
    def of(seconds: Sequence[float]) -> "LatencyStats | None":
        if not seconds:
            return None
        ordered = sorted(seconds)
        values = (sum(seconds) / len(seconds), *(percentile(ordered, share) for share in (0.5, 0.9, 0.99)))
        return LatencyStats(*(round(value * 1e3, 3) for value in values))


class FailureCount(msgspec.Struct, frozen=True):
    """One kind of failure, how often it was met, and what was said the first time."""

    kind: str
    count: int
    example: str


class ClientLoad(msgspec.Struct, frozen=True):
    """Whether the measuring process kept up: its share of a core, and by how much its event loop was late."""

    cpu_share: float
    late_p99_ms: float
    late_max_ms: float


class ServeFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The report's figures. `latency` has no entry of what no request has, such as the ITL of single tokens."""

    duration_s: float
    completed: int
    failed: int
    failures: list[FailureCount]
    ended_early: int
    """Completed with fewer tokens than were asked for."""
    input_tokens: int
    cached_tokens: int | None
    """Of the input, what was in the server's prefix cache; None where no answer says."""
    output_tokens: int
    tokens_counted_by: Literal["usage", "chunks", "usage and chunks"]
    """The server's own count; else each chunk is taken for a token, and the input for what was asked for."""
    tokens_per_chunk: float
    """Well above 1, ITL is the time of so many tokens: of drafts that were accepted, or of tokens without a text of their own."""
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    peak_concurrency: int
    goodput_per_s: float | None
    """Completed requests that were within all bounds, per second; None without bounds."""
    latency: dict[Metric, LatencyStats]
    client: ClientLoad


def figures(answers: Sequence[ResponseRecord], bounds_ms: Mapping[Metric, float], client: ClientLoad) -> ServeFigures:
    """Of all answers of a load, of which there is at least one."""
    whole = [answer for answer in answers if not answer.failure]
    duration_s = max(answer.end_s for answer in answers) - min(answer.begin_s for answer in answers)
    per_s = 1 / max(duration_s, 1e-9)
    input_tokens, output_tokens = sum(a.input_tokens for a in whole), sum(a.output_tokens for a in whole)
    cached = [answer.cached_tokens for answer in whole if answer.cached_tokens is not None]
    counted = sum(answer.counted for answer in whole)
    good = sum(all(_value_s(answer, metric) * 1e3 <= most for metric, most in bounds_ms.items()) for answer in whole)
    return ServeFigures(
        duration_s=round(duration_s, 3),
        completed=len(whole),
        failed=len(answers) - len(whole),
        failures=failures(answers),
        ended_early=sum(answer.output_tokens < answer.request.output_len for answer in whole),
        input_tokens=input_tokens,
        cached_tokens=sum(cached) if cached else None,
        output_tokens=output_tokens,
        tokens_counted_by="usage" if counted == len(whole) else "usage and chunks" if counted else "chunks",
        tokens_per_chunk=round(output_tokens / max(1, sum(len(answer.token_s) for answer in whole)), 3),
        requests_per_s=round(len(whole) * per_s, 3),
        output_tokens_per_s=round(output_tokens * per_s, 2),
        total_tokens_per_s=round((input_tokens + output_tokens) * per_s, 2),
        peak_concurrency=peak([(answer.begin_s, answer.end_s) for answer in answers]),
        goodput_per_s=round(good * per_s, 3) if bounds_ms else None,
        latency=latencies(answer.timing for answer in whole),
        client=client,
    )


def failures(answers: Sequence[ResponseRecord]) -> list[FailureCount]:
    """By kind, the most frequent first."""
    kinds: dict[str, list[str]] = {}
    for answer in answers:
        if answer.failure:
            kinds.setdefault(answer.failure, []).append(answer.detail)
    return sorted((FailureCount(kind, len(details), details[0]) for kind, details in kinds.items()), key=lambda f: -f.count)


def latencies(timings: Iterable[RequestTiming]) -> dict[Metric, LatencyStats]:
    """Of each metric of which there are values."""
    return {metric: found for metric, values in seconds(timings).items() if (found := LatencyStats.of(values)) is not None}


def table(latency: Mapping[Metric, LatencyStats]) -> list[str]:
    """Latencies in lines for a person."""
    lines = [f"{'ms':<12}{'mean':>12}{'p50':>12}{'p90':>12}{'p99':>12}"]
    for metric, one in latency.items():
        values = (one.mean_ms, one.p50_ms, one.p90_ms, one.p99_ms)
        lines.append(f"{LABELS[metric]:<12}" + "".join(f"{value:>12,.2f}" for value in values))
    return lines


def peak(spans: Sequence[tuple[float, float]]) -> int:
    """The most spans that are open at once; one that ends when another begins is not."""
    events = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    most = now = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return most


def details(answers: Sequence[ResponseRecord]) -> list[dict[str, Any]]:
    """Every request by itself, in the order of the workload; `sent_s` is counted from the first one sent."""
    begin_s = min(answer.begin_s for answer in answers)
    return [
        {
            "sent_s": round(answer.begin_s - begin_s, 6),
            "failure": answer.failure,
            "input_tokens": answer.input_tokens,
            "output_tokens": answer.output_tokens,
            "ttft_ms": None if answer.failure else round(answer.timing.ttft_s * 1e3, 3),
            "e2el_ms": round(answer.timing.e2el_s * 1e3, 3),
            "itl_ms": [round(value * 1e3, 3) for value in answer.timing.itl_s],
        }
        for answer in answers
    ]


def _value_s(answer: ResponseRecord, metric: Metric) -> float:
    """What goodput compares; a single token has no TPOT that could be too long."""
    timing = answer.timing
    return {"ttft": timing.ttft_s, "tpot": timing.tpot_s or 0.0, "e2el": timing.e2el_s}[metric]
