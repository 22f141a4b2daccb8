"""Log lines about traffic: throughput, the progress of a drain, and with --log-requests every request.

Never logs a prompt or an output. Owns the totals of the last line; everything else is read only.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from aiohttp import web
from aiohttp.typedefs import Handler

from tpserve.engine_client.requests import RequestHandle, RequestState, RequestTable
from tpserve.engine_client.status import EngineStatus
from tpserve.frontend.access import METRICS_PATH, OPEN_PATHS
from tpserve.frontend.openai.admission import ADMITTED, REQUEST_ID
from tpserve.frontend.tracing import TRACE
from tpserve.observe.metrics import Metrics

log = logging.getLogger(__name__)

LINE_S = 10.0
"""The interval of throughput lines, as in vLLM."""
DRAIN_LINE_S = 5.0
TICK_S = 0.5
CLIENT_LEFT = 499
"""The logged status of a request whose client left before the answer, as nginx logs it."""


@dataclass
class Throughput:
    """The throughput line; its rates are over the time since the last one."""

    metrics: Metrics
    last_s: float
    _last: dict[str, int] = field(default_factory=dict)

    def line(self, now_s: float) -> str | None:
        """The line; None without traffic. `now_s` is a time of `time.monotonic`."""
        stats, totals, before = self.metrics.stats, dict(self.metrics.totals), self._last
        took_s, self.last_s, self._last = now_s - self.last_s, now_s, totals
        new = {name: total - before.get(name, 0) for name, total in totals.items()}
        if not (new["prompt_tokens"] or new["generation_tokens"] or stats.running or stats.waiting):
            return None
        queries = totals["prefix_cache_queries"]
        hits = 100 * totals["prefix_cache_hits"] / queries if queries else 0.0
        used = 100 * stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
        return (
            f"Avg prompt throughput: {new['prompt_tokens'] / took_s:.1f} tokens/s, "
            f"Avg generation throughput: {new['generation_tokens'] / took_s:.1f} tokens/s, "
            f"Running: {stats.running} reqs, Waiting: {stats.waiting} reqs, "
            f"KV cache usage: {used:.1f}%, Prefix cache hit rate: {hits:.1f}%"
        )


@dataclass
class DrainLog:
    """The lines of a drain: the open sequences and the time left. Times are those of `time.monotonic`."""

    timeout_s: float
    began_s: float | None = None
    _last_line_s: float = 0.0

    def line(self, now_s: float, open_sequences: list[RequestState]) -> str | None:
        """The next line, None when none is due. Call it while the server drains."""
        left = len(open_sequences)
        if self.began_s is None:
            self.began_s = self._last_line_s = now_s
            if not left:
                return "draining: no request is open"
            return f"draining: {count_sequences(left)} may take up to {self.timeout_s:g} s more (--drain-timeout)"
        if not left or now_s - self._last_line_s < DRAIN_LINE_S:
            return None
        self._last_line_s = now_s
        oldest_s = now_s - min(sequence.arrived_s for sequence in open_sequences)
        tokens = sum(sequence.assembler.num_tokens for sequence in open_sequences)
        rest_s = max(0.0, self.began_s + self.timeout_s - now_s)
        so_far = f"{tokens} tokens so far, the oldest came {oldest_s:.0f} s ago"
        return f"draining: waiting for {count_sequences(left)} ({so_far}); {rest_s:.0f} s left"

    def last_line(self, now_s: float, why_cut: str) -> str | None:
        """The result of the drain; None without one. `why_cut`: why open requests were ended, empty when they finished."""
        if self.began_s is None:
            return None
        took_s = now_s - self.began_s
        return f"the drain was cut after {took_s:.1f} s: {why_cut}" if why_cut else f"drained in {took_s:.1f} s"


def count_sequences(count: int) -> str:
    """The count with its noun."""
    return f"{count} open sequence{'s' * (count != 1)}"


def log_traffic(
    request_table: RequestTable, status: Callable[[], EngineStatus], drain_timeout_s: float, log_stats: bool
) -> Callable[[web.Application], AsyncIterator[None]]:
    """A cleanup context of aiohttp that logs throughput and drain lines while an application is served."""
    drain = DrainLog(drain_timeout_s)

    async def report() -> None:
        throughput = Throughput(request_table.metrics, time.monotonic())
        while True:
            await asyncio.sleep(TICK_S)
            now_s = time.monotonic()
            lines = []
            if log_stats and now_s - throughput.last_s >= LINE_S:
                lines.append(throughput.line(now_s))
            if status().state == "draining":
                lines.append(drain.line(now_s, request_table.open_sequences))
            for line in filter(None, lines):
                log.info(line)

    async def context(_app: web.Application) -> AsyncIterator[None]:
        task = asyncio.get_running_loop().create_task(report())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        if line := drain.last_line(time.monotonic(), status().reason):
            log.info(line)

    return context


@web.middleware
async def log_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A middleware that logs each finished request except probes and scrapes."""
    if request.path in OPEN_PATHS or request.path == METRICS_PATH:
        return await handler(request)
    began_s = time.monotonic()
    status = CLIENT_LEFT
    try:
        response = await handler(request)
        status = response.status
        return response
    finally:
        log.info(request_line(request, status, time.monotonic() - began_s))


def route_of(request: web.Request) -> str:
    """The route of a request, for the log: a path may have an id that is a secret."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "(no such route)"


@dataclass(frozen=True)
class RequestFigures:
    """What the log tells of an admitted request. Times in seconds, None before the first token; `finish` of each choice, once."""

    prompt_tokens: int
    output_tokens: int
    finish: str | None
    queue_s: float | None
    ttft_s: float | None


def figures_of(handle: RequestHandle) -> RequestFigures:
    """The figures of a request so far."""
    sequences = handle.sequences
    begun = [sequence for sequence in sequences if sequence.token_s]
    reasons = dict.fromkeys(sequence.assembler.finish for sequence in sequences if sequence.assembler.finish)
    return RequestFigures(
        prompt_tokens=sum(sequence.prompt_tokens for sequence in sequences if sequence.request.choice == 0),
        output_tokens=sum(sequence.assembler.num_tokens for sequence in sequences),
        finish="/".join(reasons) or None,
        queue_s=round(min(sequence.queue_s for sequence in begun), 6) if begun else None,
        ttft_s=round(min(sequence.token_s[0] - sequence.arrived_s for sequence in begun), 6) if begun else None,
    )


def request_line(request: web.Request, status: int, took_s: float) -> str:
    """The log line of a finished request, without any of its content."""
    route, trace = f"{request.method} {route_of(request)}", request.get(TRACE)
    traced = "" if trace is None else f", trace {trace.trace_id}"
    if (admitted := request.get(ADMITTED)) is None:
        return f"request {request[REQUEST_ID]}: {route}, status {status}, {took_s:.3f} s{traced}"
    figures = figures_of(admitted.handle)
    ttft = "none" if figures.ttft_s is None else f"{figures.ttft_s:.3f} s"
    return (
        f"request {admitted.id}: {route}, model {admitted.model}, {figures.prompt_tokens} prompt tokens, "
        f"{figures.output_tokens} output tokens, finish {figures.finish or 'none'}, TTFT {ttft}, status {status}, {took_s:.3f} s"
        f"{traced}"
    )
