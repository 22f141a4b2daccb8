"""`tpserve bench serve`: sends a load to the OpenAI API of a running server and reports the results.

One process with one event loop sends all requests. It also measures its own delay, by which the measured times are too long, and
reports it. A failed request is counted by its kind of failure and never retried.
"""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import uvloop
from msgspec.structs import replace

from tpserve.bench.client import ResponseRecord, error_text, send_request
from tpserve.bench.figures import ClientLoad, ServeFigures, details, figures, table
from tpserve.bench.plot import svg
from tpserve.bench.report import BenchReport, MachineInfo, check_writable, percentile, write
from tpserve.bench.request_timing import LABELS, Metric
from tpserve.bench.workload import IDS, BenchRequest, Workload, arrivals_s, build_requests
from tpserve.errors import UserError

REQUEST_TIMEOUT_S = 6 * 3600.0
"""A request that takes longer has failed. Queues may be long, and the server may be slow."""
CONNECT_TIMEOUT_S = 30.0
"""The limit for a TCP connection and for /v1/models."""
KEEPALIVE_S = 2.0
"""An idle connection is closed after this time. Servers keep one longer, so no request meets a connection they have closed."""
SAMPLE_S = 0.005
LATE_MS = 10.0
BUSY_SHARE = 0.9
"""Above these two limits the client's own load distorts the results, and a warning is printed."""

SendRequest = Callable[[BenchRequest], Awaitable[ResponseRecord]]


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The resolved command line. `workload.prompts` is "ids" when the server decides whether it takes token ids or words."""

    url: str
    model: str | None
    api_key: str | None
    workload: Workload
    dataset: list[BenchRequest]
    goodput_ms: Mapping[Metric, float]
    output: Path | None
    plot: Path | None
    save_detailed: bool


class Target(msgspec.Struct, frozen=True):
    """The server, for the report. `software`: its Server header."""

    url: str
    model: str
    software: str


def run(options: ServeOptions) -> int:
    """Run the benchmark. Returns the exit code, which is 1 when no request was completed.

    Raises UserError when no server answers or when the server refuses the requests.
    """
    check_writable(options.output, options.plot)
    machine = MachineInfo.here()
    target, workload, records, client = uvloop.run(_measure(options))
    result = figures(records, options.goodput_ms, client)
    sys.stdout.write(_table(result, options.goodput_ms))
    sys.stderr.writelines(f"tpserve bench serve: warning: {line}\n" for line in _warnings(result, workload.ignore_eos))
    if options.output is not None:
        results = msgspec.to_builtins(result) | ({"requests": details(records)} if options.save_detailed else {})
        inputs = {"server": target, **msgspec.to_builtins(workload), "goodput_ms": options.goodput_ms}
        BenchReport.of("serve", machine, ("aiohttp", "uvloop"), inputs, results).write(options.output)
    if options.plot is not None:
        timings = [record.timing for record in records if not record.failure]
        write("--plot", options.plot, svg(f"{target.model}: {_description(workload)}", timings).encode())
    return 0 if result.completed else 1


async def _measure(options: ServeOptions) -> tuple[Target, Workload, list[ResponseRecord], ClientLoad]:
    headers = {"Content-Type": "application/json"}
    if options.api_key is not None:
        headers["Authorization"] = f"Bearer {options.api_key}"
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:
        target = await _find_target(session, options.url, options.model)
        workload = await _choose_prompts(session, target, options.workload)
        sys.stdout.write(f"{target.model} at {target.url}: {_description(workload)}\n")
        sys.stdout.flush()

        async def send(request: BenchRequest) -> ResponseRecord:
            return await send_request(session, target.url, target.model, workload, request)

        warmups, measured = build_requests(workload, options.dataset)
        for record in await send_all(send, warmups, [0.0] * len(warmups), workload.max_concurrency):
            _raise_if_refused(record, target)
        async with LoopMonitor() as monitor:
            counted = _with_progress(send, len(measured))
            records = await send_all(counted, measured, arrivals_s(workload), workload.max_concurrency)
    return target, workload, records, monitor.client


async def send_all(
    send: SendRequest, requests: Sequence[BenchRequest], at_s: Sequence[float], max_concurrency: int | None
) -> list[ResponseRecord]:
    """Send each request at its time in `at_s`, seconds from now. Returns the records in the order of the requests.

    With `max_concurrency` requests open, a further one is sent when another one ends.
    """
    gate = asyncio.Semaphore(max_concurrency or max(1, len(requests)))
    begin_s = time.perf_counter()

    async def send_one(request: BenchRequest, send_s: float) -> ResponseRecord:
        if (wait_s := begin_s + send_s - time.perf_counter()) > 0:
            await asyncio.sleep(wait_s)
        async with gate:
            return await send(request)

    return await asyncio.gather(*(send_one(request, send_s) for request, send_s in zip(requests, at_s, strict=True)))


class LoopMonitor:
    """Measures, inside its `async with` block, the load of this process and how late its event loop wakes a sleeping task."""

    client: ClientLoad

    async def __aenter__(self) -> "LoopMonitor":
        self._late_s = [0.0]
        self._cpu_s, self._wall_s = time.process_time(), time.perf_counter()
        self._task = asyncio.create_task(self._sleep())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        share = (time.process_time() - self._cpu_s) / max(time.perf_counter() - self._wall_s, 1e-9)
        late_ms = sorted(late_s * 1e3 for late_s in self._late_s)
        self.client = ClientLoad(round(share, 3), round(percentile(late_ms, 0.99), 2), round(late_ms[-1], 2))

    async def _sleep(self) -> None:
        while True:
            begin_s = time.perf_counter()
            await asyncio.sleep(SAMPLE_S)
            self._late_s.append(max(0.0, time.perf_counter() - begin_s - SAMPLE_S))


async def _find_target(session: aiohttp.ClientSession, url: str, model: str | None) -> Target:
    """Read the server's software from /v1/models, and the name of its first model unless `model` is given. Raises UserError."""
    try:
        async with session.get(f"{url}/v1/models", timeout=aiohttp.ClientTimeout(total=CONNECT_TIMEOUT_S)) as response:
            status, content, software = response.status, await response.read(), response.headers.get("Server", "")
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise UserError(f"--url {url}: no server answers: {str(error) or type(error).__name__}") from error
    if status in (401, 403):
        raise UserError(f"--url {url}: {error_text(content)} (HTTP {status}); give --api-key, or set TPSERVE_API_KEY")
    if model is None:
        try:
            model = str(msgspec.json.decode(content)["data"][0]["id"])
        except (msgspec.DecodeError, LookupError, TypeError) as error:
            where = "give the server's address alone, such as http://HOST:8000" if status == 404 else "give --model"
            raise UserError(f"--url {url}: /v1/models lists no model (HTTP {status}); {where}") from error
    return Target(url, model, software)


async def _choose_prompts(session: aiohttp.ClientSession, target: Target, workload: Workload) -> Workload:
    """The workload, with words where the server does not take token ids. Raises UserError when it takes neither."""
    if workload.prompts == "ids":
        record = await send_request(session, target.url, target.model, workload, BenchRequest(list(IDS[:16]), 16, 1))
        if not _is_refused(record):
            return workload
        workload = replace(workload, prompts="words")
    record = await send_request(session, target.url, target.model, workload, BenchRequest("Hello", 1, 1))
    _raise_if_refused(record, target)
    return workload


def _is_refused(record: ResponseRecord) -> bool:
    """Whether the server refuses the request itself. Overload and server errors are results of the load instead."""
    return record.failure.startswith("HTTP 4") and record.failure not in ("HTTP 408", "HTTP 429")


def _raise_if_refused(record: ResponseRecord, target: Target) -> None:
    if _is_refused(record):
        hint = "; --no-ignore-eos leaves a field out that OpenAI does not have" if "ignore_eos" in record.detail else ""
        raise UserError(f"{target.url} refuses the requests of this load: {record.failure}: {record.detail}{hint}")


def _with_progress(send: SendRequest, total: int) -> SendRequest:
    """`send`, with a line on a terminal that counts the responses."""
    if not sys.stderr.isatty():
        return send
    done = 0

    async def counted(request: BenchRequest) -> ResponseRecord:
        nonlocal done
        record = await send(request)
        done += 1
        sys.stderr.write(f"\r{done} of {total}" + ("\r\033[K" if done == total else ""))
        sys.stderr.flush()
        return record

    return counted


def _description(workload: Workload) -> str:
    """The load in words, for the first line and the plot's title."""
    rate = "all at once" if workload.request_rate is None else f"{workload.request_rate:g} a second"
    most = "" if workload.max_concurrency is None else f", at most {workload.max_concurrency} open"
    spread = f" (up to {workload.range_ratio:.0%} more or less)" if workload.range_ratio else ""
    shared = f" after a shared prefix of {workload.prefix_len}" if workload.prefix_len else ""
    what = "ids" if workload.prompts == "ids" else "words"
    made = f"{workload.input_len} {what} in{shared}, {workload.output_len} tokens out{spread}, seed {workload.seed}"
    return f"{workload.num_prompts} requests {rate}{most}, {f'from {workload.dataset}' if workload.dataset else made}"


def _table(result: ServeFigures, bounds_ms: Mapping[Metric, float]) -> str:
    cached = "" if result.cached_tokens is None else f" ({result.cached_tokens:,} of them cached)"
    rows: list[tuple[str, Any]] = [
        ("completed", f"{result.completed} in {result.duration_s:.2f} s, {result.peak_concurrency} at once at most"),
        *(("failed", f"{failure.count} x {failure.kind}: {failure.example}") for failure in result.failures),
        (
            "tokens",
            f"{result.input_tokens:,} in{cached}, {result.output_tokens:,} out, by {result.tokens_counted_by}; "
            f"{result.tokens_per_chunk:.2f} in a chunk",
        ),
        ("requests/s", f"{result.requests_per_s:.2f}"),
        ("tokens/s", f"{result.output_tokens_per_s:,.1f} out, {result.total_tokens_per_s:,.1f} in and out"),
    ]
    if result.goodput_per_s is not None:
        within = ", ".join(f"{LABELS[metric]} {most:g} ms" for metric, most in bounds_ms.items())
        rows.append(("goodput/s", f"{result.goodput_per_s:.2f} within {within}"))
    late = f"event loop late by {result.client.late_p99_ms:.1f} ms (p99), {result.client.late_max_ms:.1f} ms (max)"
    rows.append(("client", f"{result.client.cpu_share:.0%} of a core, {late}"))
    lines = [f"{name:<12}{value}" for name, value in rows]
    lines += table(result.latency)
    return "\n".join(lines) + "\n"


def _warnings(result: ServeFigures, ignore_eos: bool) -> list[str]:
    lines = []
    share, late_ms = result.client.cpu_share, result.client.late_p99_ms
    if late_ms > LATE_MS or share > BUSY_SHARE:
        lines.append(
            f"this client did not keep up ({share:.0%} of a core, late by {late_ms:.0f} ms): times are too long by about that; "
            "send fewer requests at once, or measure from another machine"
        )
    if result.ended_early and ignore_eos:
        lines.append(f"{result.ended_early} responses are shorter than requested: the server ends them in spite of ignore_eos")
    return lines
