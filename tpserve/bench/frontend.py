"""`tpserve bench frontend`: what the HTTP frontend takes to stream tokens, without a model.

    frontend       the real process: HTTP, coordinator, request table, text, events
    fake_engine    rank 0 on the wire; one frame with a token of each stream a step
    stream_reader  all clients: raw sockets, every stream compared with what was sent for it
    floor_server   for comparison, a plain aiohttp handler that writes the same bytes

One load after the other: the floor's server, then the frontend. The rounds of a server are alike, each with new connections; a
first one, which is not counted, warms up. What counts is tokens for a second of the server's processor time, all its threads
together: on a machine with work on its cores that says more than tokens a second.
"""

import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec
from msgspec.structs import replace

from tpserve.bench.fake_engine import FLOOR_IDENTITY, EngineJob
from tpserve.bench.floor_server import FloorJob
from tpserve.bench.report import BenchReport, MachineInfo, check_writable
from tpserve.bench.stream_load import StreamApi, StreamLoad, plain_tokens
from tpserve.bench.stream_reader import ReaderJob, RoundFigures
from tpserve.cli import server_flags
from tpserve.cluster.discovery import spawn_frontend, wait_ready
from tpserve.config.engine_config import EngineConfig
from tpserve.config.resolve import resolve
from tpserve.errors import EngineFailure, UserError
from tpserve.host.network import LOOPBACK, listen_http
from tpserve.host.resources import available_cores
from tpserve.hub.locate import locate
from tpserve.models.load_config import load_model_config
from tpserve.process.process_utils import allow_many_files
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.machine import Machine

START_S = 60.0
END_S = 15.0
MIB = 1 << 20


class ServerFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What the counted rounds of one server come to, and each of them. `us_per_token`: of the server's processor time."""

    tokens_per_s: float
    tokens_per_core_s: float
    us_per_token: float
    tokens_per_event: float
    lost: int
    mixed: int
    client_share: float
    """Of a core, the clients' process."""
    rounds: list[RoundFigures]

    @staticmethod
    def of(rounds: Sequence[RoundFigures]) -> "ServerFigures":
        """The figures of at least one round."""
        tokens, events = sum(each.tokens for each in rounds), sum(each.events for each in rounds)
        duration_s, server_s = sum(each.duration_s for each in rounds), sum(each.server_s for each in rounds)
        return ServerFigures(
            tokens_per_s=round(tokens / duration_s, 1),
            tokens_per_core_s=round(tokens / max(server_s, 1e-9), 1),
            us_per_token=round(1e6 * server_s / max(tokens, 1), 2),
            tokens_per_event=round(tokens / max(events, 1), 3),
            lost=sum(each.lost for each in rounds),
            mixed=sum(each.mixed for each in rounds),
            client_share=round(sum(each.client_s for each in rounds) / duration_s, 3),
            rounds=list(rounds),
        )


def run(
    engine_argv: Sequence[str],
    *,
    endpoint: StreamApi,
    streams: int,
    output_len: int,
    rounds: int,
    rate: float | None,
    floor: bool,
    seed: int,
    output: Path | None,
) -> int:
    """Measure and print the table. Returns the exit code: 1 when a stream was lost or mixed with another.

    `engine_argv`: the model, of which only the tokenizer is used, and the server's flags. Raises UserError.
    """
    check_writable(output)
    config = _config(engine_argv, streams)
    if output_len >= config.max_model_len // 2:
        limit = f"a model of {config.max_model_len} positions takes less than half as many"
        raise UserError(f"--output-len {output_len} is too long: {limit}", param="output_len")
    allow_many_files()
    token_ids = plain_tokens(Tokenizer.load(config.tokenizer), config.vocab_size)
    load = StreamLoad(endpoint, streams, output_len, rounds + 1, rate, seed, token_ids)
    machine = MachineInfo.here()
    pace = "as fast as they are read" if rate is None else f"{rate:g} steps a second"
    what = f"{streams} streams of {output_len} tokens over {endpoint}, {pace}, {rounds} rounds"
    sys.stdout.write(f"{what}, on {machine}\n{HEADING}")
    results: dict[str, ServerFigures] = {}
    for name, server in (("aiohttp", _floor_rounds), ("frontend", _frontend_rounds)):
        if floor or name == "frontend":
            results[name] = ServerFigures.of(list(server(config, load))[1:])
            sys.stdout.write(_row(name, results[name]) + "\n")
            sys.stdout.flush()
    for name, figures in results.items():
        failures = [each.failure for each in figures.rounds if each.failure]
        sys.stderr.writelines(f"tpserve bench frontend: {name}: {failure}\n" for failure in failures)
    if output is not None:
        workload = {**msgspec.to_builtins(load), "token_ids": len(token_ids), "rounds": rounds, "engine": list(engine_argv)}
        BenchReport.of("frontend", machine, ("aiohttp", "uvloop", "pyzmq", "msgspec"), workload, results).write(output)
    return 1 if any(figures.lost or figures.mixed for figures in results.values()) else 0


HEADING = "              tok/s  tok/core-s  us/token  tok/event  step p50   p99 ms  client  lost  mixed  resident MiB\n"


def _row(name: str, figures: ServerFigures) -> str:
    last = figures.rounds[-1]
    memory = " ".join(f"{each.rss_end / MIB:.1f}" for each in figures.rounds)
    return (
        f"{name:<10}{figures.tokens_per_s:>9,.0f}{figures.tokens_per_core_s:>12,.0f}{figures.us_per_token:>10.1f}"
        f"{figures.tokens_per_event:>11.2f}{last.step_p50_ms:>10.2f}{last.step_p99_ms:>9.2f}{figures.client_share:>8.0%}"
        f"{figures.lost:>6}{figures.mixed:>7}  {figures.rounds[0].rss_begin / MIB:.1f} then {memory}"
    )


def _config(engine_argv: Sequence[str], streams: int) -> EngineConfig:
    """The configuration of the frontend: one rank, and room for all streams. Raises UserError."""
    flags, note = server_flags.read_line(engine_argv)
    if note:
        sys.stderr.write(f"tpserve bench frontend: {note}\n")
    flags, files, spec = load_model_config(replace(flags, device="cpu"), lambda flags: locate(flags, head=True))
    config = resolve(flags, files, spec, Machine(1, 1, 1, 0, available_cores(), "serve"))
    return replace(config, host=LOOPBACK, port=0, max_num_seqs=streams, log_level="warning")


def _frontend_rounds(config: EngineConfig, load: StreamLoad) -> Iterator[RoundFigures]:
    """The rounds of a real frontend, which is started and ended here."""
    with tempfile.TemporaryDirectory(prefix="tpserve-") as directory, listen_http(LOOPBACK, 0) as listener:
        runtime_dir = Path(directory, "run")
        runtime_dir.mkdir(mode=0o700)
        frontend = spawn_frontend(runtime_dir, config, os.getpid(), 1, LOOPBACK, listener)
        with _ending(frontend):
            record = wait_ready(runtime_dir, frontend, START_S)
            job = EngineJob(
                os.getpid(), record.pid, record.control, record.engine, 0, config.max_model_len, config.vocab_size, load
            )
            port = listener.getsockname()[1]
            yield from _rounds(config, load, job, record.pid, port)


def _floor_rounds(config: EngineConfig, load: StreamLoad) -> Iterator[RoundFigures]:
    """The rounds of the floor's server."""
    with tempfile.TemporaryDirectory(prefix="tpserve-") as directory:
        engine = f"ipc://{directory}/engine"
        job = FloorJob(os.getpid(), engine, FLOOR_IDENTITY, config.tokenizer, load)
        server = _spawn("tpserve.bench.floor_server", job)
        with _ending(server):
            assert server.stdout is not None
            port = server.stdout.readline()
            if not port:
                raise EngineFailure("the floor's server could not be started: its reason is above")
            engine_job = EngineJob(os.getpid(), server.pid, "", engine, 0, config.max_model_len, config.vocab_size, load)
            yield from _rounds(config, load, engine_job, server.pid, int(port))


def _rounds(config: EngineConfig, load: StreamLoad, job: EngineJob, server_pid: int, port: int) -> Iterator[RoundFigures]:
    """Run engine and clients against a server. Raises EngineFailure when one of them ends early."""
    pace, written = os.pipe()
    with _ending(_spawn("tpserve.bench.fake_engine", replace(job, pace=pace), pace)):
        os.close(pace)
        _wait_running(port, bool(job.control))
        reader_job = ReaderJob(os.getpid(), server_pid, LOOPBACK, port, config.tokenizer, written, load)
        with _ending(reader := _spawn("tpserve.bench.stream_reader", reader_job, written)):
            os.close(written)
            assert reader.stdout is not None
            for _ in range(load.rounds):
                line = reader.stdout.readline()
                if not line:
                    raise EngineFailure("the clients ended early: their reason is above")
                yield msgspec.json.decode(line, type=RoundFigures)


def _wait_running(port: int, frontend: bool) -> None:
    """Wait until a frontend takes requests."""
    deadline_s = time.monotonic() + START_S
    while frontend and time.monotonic() < deadline_s:
        try:
            urllib.request.urlopen(f"http://{LOOPBACK}:{port}/health", timeout=START_S).close()
            return
        except OSError:
            time.sleep(0.05)
    if frontend:
        raise EngineFailure(f"the frontend was not ready within {START_S:g} s")


def _spawn(module: str, job: Any, *descriptors: int) -> "subprocess.Popen[bytes]":
    """Start a process of this benchmark, with its job in stdin."""
    command = [sys.executable, "-m", module]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=descriptors, start_new_session=True
    )
    stdin: IO[bytes] | None = process.stdin
    assert stdin is not None
    with stdin:
        stdin.write(msgspec.json.encode(job))
    return process


@contextmanager
def _ending(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """End a process at the end of the block."""
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
