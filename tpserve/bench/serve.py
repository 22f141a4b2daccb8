"""`tpserve bench serve`: a load against the OpenAI URL of a running server, and what it answered.

One process and one event loop send everything, and watch themselves: where the loop is late, times are too long, and the report
says by how much. A request that fails is counted under what happened to it and never sent again.
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

from tpserve.bench.client import ResponseRecord, said, send_request
from tpserve.bench.figures import ClientLoad, ServeFigures, details, figures, table
from tpserve.bench.plot import svg
from tpserve.bench.report import BenchReport, MachineInfo, check, percentile, write
from tpserve.bench.request_timing import LABELS, Metric
from tpserve.bench.workload import IDS, BenchRequest, Workload, arrivals_s, build_requests
from tpserve.errors import UserError

ANSWER_S = 6 * 3600.0
"""A request without an end for so long has failed. Queues may be long, and what is measured may be slow."""
MODELS_S = 30.0
IDLE_S = 2.0
"""A connection is used again for so long only: shorter than servers keep one, or a request would meet its closing."""
WATCH_S = 0.005
LATE_MS = 10.0
BUSY_SHARE = 0.9
"""From here on the client is a part of what it measures."""

SendRequest = Callable[[BenchRequest], Awaitable[ResponseRecord]]


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line said. `workload.prompts` is "ids" where it is the server that decides whether it takes them."""

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
    """The server as the report names it. `software`: its Server header."""

    url: str
    model: str
    software: str


def run(options: ServeOptions) -> int:
    """Measure; returns the exit code: 1 when no request was completed. Raises UserError where there is nothing to measure."""
    for flag, path in (("--output", options.output), ("--plot", options.plot)):
        if path is not None:
            check(flag, path)
    machine = MachineInfo.here()
    target, workload, answers, client = uvloop.run(_measure(options))
    result = figures(answers, options.goodput_ms, client)
    sys.stdout.write(_table(result, options.goodput_ms))
    sys.stderr.writelines(f"tpserve bench serve: warning: {line}\n" for line in _warnings(result, workload.ignore_eos))
    if options.output is not None:
        shown = msgspec.to_builtins(result) | ({"requests": details(answers)} if options.save_detailed else {})
        asked = {"server": target, **msgspec.to_builtins(workload), "goodput_ms": options.goodput_ms}
        BenchReport.of("serve", machine, ("aiohttp", "uvloop"), asked, shown).write(options.output)
    if options.plot is not None:
        whole = [answer.timing for answer in answers if not answer.failure]
        write("--plot", options.plot, svg(f"{target.model}: {_load(workload)}", whole).encode())
    return 0 if result.completed else 1


async def _measure(options: ServeOptions) -> tuple[Target, Workload, list[ResponseRecord], ClientLoad]:
    headers = {"Content-Type": "application/json"}
    if options.api_key is not None:
        headers["Authorization"] = f"Bearer {options.api_key}"
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S)
    timeout = aiohttp.ClientTimeout(total=ANSWER_S, sock_connect=MODELS_S)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:
        target = await _find(session, options.url, options.model)
        workload = await _settle(session, target, options.workload)
        sys.stdout.write(f"{target.model} at {target.url}: {_load(workload)}\n")
        sys.stdout.flush()

        async def send(what: BenchRequest) -> ResponseRecord:
            return await send_request(session, target.url, target.model, workload, what)

        warmups, measured = build_requests(workload, options.dataset)
        for answer in await drive(send, warmups, [0.0] * len(warmups), workload.max_concurrency):
            _unless_refused(answer, target)
        async with LoopMonitor() as watch:
            answers = await drive(_told(send, len(measured)), measured, arrivals_s(workload), workload.max_concurrency)
    return target, workload, answers, watch.client


async def drive(
    send: SendRequest, requests: Sequence[BenchRequest], at_s: Sequence[float], max_concurrency: int | None
) -> list[ResponseRecord]:
    """Send each request at its time, or when one before it ends where too many are open. The answers, in the same order."""
    gate = asyncio.Semaphore(max_concurrency or max(1, len(requests)))
    begin_s = time.perf_counter()

    async def one(what: BenchRequest, moment_s: float) -> ResponseRecord:
        if (wait_s := begin_s + moment_s - time.perf_counter()) > 0:
            await asyncio.sleep(wait_s)
        async with gate:
            return await send(what)

    return await asyncio.gather(*(one(what, moment_s) for what, moment_s in zip(requests, at_s, strict=True)))


class LoopMonitor:
    """Over its block: how busy this process is, and how late its event loop wakes a task that sleeps."""

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
            await asyncio.sleep(WATCH_S)
            self._late_s.append(max(0.0, time.perf_counter() - begin_s - WATCH_S))


async def _find(session: aiohttp.ClientSession, url: str, model: str | None) -> Target:
    """Ask the server who it is, and for the model's name where none was given."""
    try:
        async with session.get(f"{url}/v1/models", timeout=aiohttp.ClientTimeout(total=MODELS_S)) as response:
            status, content, software = response.status, await response.read(), response.headers.get("Server", "")
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise UserError(f"--url {url}: no server answers: {str(error) or type(error).__name__}") from error
    if status in (401, 403):
        raise UserError(f"--url {url}: {said(content)} (HTTP {status}); give --api-key, or set TPSERVE_API_KEY")
    if model is None:
        try:
            model = str(msgspec.json.decode(content)["data"][0]["id"])
        except (msgspec.DecodeError, LookupError, TypeError) as error:
            where = "give the server's address alone, such as http://HOST:8000" if status == 404 else "give --model"
            raise UserError(f"--url {url}: /v1/models names no model (HTTP {status}); {where}") from error
    return Target(url, model, software)


async def _settle(session: aiohttp.ClientSession, target: Target, workload: Workload) -> Workload:
    """The workload with words where the server does not take token ids. UserError when it takes neither."""
    if workload.prompts == "ids":
        answer = await send_request(session, target.url, target.model, workload, BenchRequest(list(IDS[:16]), 16, 1))
        if not _refused(answer):
            return workload
        workload = replace(workload, prompts="words")
    answer = await send_request(session, target.url, target.model, workload, BenchRequest("Hello", 1, 1))
    _unless_refused(answer, target)
    return workload


def _refused(answer: ResponseRecord) -> bool:
    """Whether the request itself is what the server does not like. That it is overloaded or broken is for the load to tell."""
    return answer.failure.startswith("HTTP 4") and answer.failure not in ("HTTP 408", "HTTP 429")


def _unless_refused(answer: ResponseRecord, target: Target) -> None:
    if _refused(answer):
        hint = "; --no-ignore-eos leaves a field out that OpenAI does not have" if "ignore_eos" in answer.detail else ""
        raise UserError(f"{target.url} refuses the requests of this load: {answer.failure}: {answer.detail}{hint}")


def _told(send: SendRequest, total: int) -> SendRequest:
    """The same, with a line on a terminal that counts."""
    if not sys.stderr.isatty():
        return send
    done = 0

    async def counted(what: BenchRequest) -> ResponseRecord:
        nonlocal done
        answer = await send(what)
        done += 1
        sys.stderr.write(f"\r{done} of {total}" + ("\r\033[K" if done == total else ""))
        sys.stderr.flush()
        return answer

    return counted


def _load(workload: Workload) -> str:
    """The load in words."""
    rate = "all at once" if workload.request_rate is None else f"{workload.request_rate:g} a second"
    most = "" if workload.max_concurrency is None else f", at most {workload.max_concurrency} open"
    near = f" (up to {workload.range_ratio:.0%} more or less)" if workload.range_ratio else ""
    shared = f" after a shared prefix of {workload.prefix_len}" if workload.prefix_len else ""
    what = "ids" if workload.prompts == "ids" else "words"
    made = f"{workload.input_len} {what} in{shared}, {workload.output_len} tokens out{near}, seed {workload.seed}"
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
    late = f"event loop late by {result.client.late_p99_ms:.1f} ms (p99), {result.client.late_max_ms:.1f} ms (most)"
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
            "ask for less at once, or measure from another machine"
        )
    if result.ended_early and ignore_eos:
        lines.append(f"{result.ended_early} answers are shorter than was asked for: the server ends them in spite of ignore_eos")
    return lines
