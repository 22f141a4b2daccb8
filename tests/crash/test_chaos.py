"""Requests of every kind on a server whose processes are killed: `make test` has a short run, `make chaos` half an hour.

The table of docs/reliability.md and the faults that are tried are the same.
"""

import asyncio
import os
import random
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.crash.chaos import FAULTS, OF_THE_FRONTEND, Report, baseline, calls, chaos, memory_mib, rank, state
from tests.server import Server, free_port, running, serve

ROOT = Path(__file__).resolve().parents[2]


def play(place: Path, streams: int, seconds: float, seed: int, max_tokens: int, *, durable: bool = False) -> Report:
    """One run on one host, TP 2. `durable`: the frontend is killed, too."""
    port = free_port()
    state_dir = ["--state-dir", str(place / "state")] if durable else []
    with running([serve("--nproc-per-node", "2", *state_dir, port=port)], port, place / "log") as server:
        todo = [call for call in calls(streams, seed, max_tokens) if call.body.get("stream") or not durable]
        expected = asyncio.run(baseline(server.url, todo))
        before, memory = state(server), memory_mib(server)
        faults = (*FAULTS, OF_THE_FRONTEND) if durable else FAULTS
        report = asyncio.run(chaos(server, todo, expected, seconds, seed, faults, come_back=durable))
        assert not report.errors, f"{len(report.errors)} errors, the first: {report.errors[0]}\n{server.log[-3000:]}"
        settle(server, before)
        assert memory_mib(server) < memory + 64, "memory has grown"
        assert server.stop() == [0]
        server.assert_nothing_left()
    return report


def settle(server: Server, before: object) -> None:
    """Wait until everything that must not grow is as it was."""
    deadline_s = time.monotonic() + 30
    while (now := state(server)) != before:
        assert time.monotonic() < deadline_s, f"was {before}, is {now}"
        time.sleep(0.2)


def test_the_table_of_the_docs_is_what_is_tried() -> None:
    table = re.findall(r"(?m)^\| (SIG\w+ \w+) \|", (ROOT / "docs" / "reliability.md").read_text())
    tried = [fault.name for fault in FAULTS]
    others = ["SIGKILL frontend", "SIGKILL supervisor"]  # tests/cluster/test_launch.py
    assert sorted(table) == sorted(tried + others)


def test_a_few_faults(tmp_path: Path) -> None:
    report = play(tmp_path, streams=13, seconds=12.0, seed=7, max_tokens=160)
    assert report.answers >= 13 and sum(report.faults.values()) >= 3


@pytest.mark.long
def test_faults_for_half_an_hour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seconds, seed = float(os.environ.get("CHAOS_SECONDS", "1800")), int(os.environ.get("SEED", "0"))
    report = play(tmp_path, streams=64, seconds=seconds, seed=seed, max_tokens=400)
    with capsys.disabled():
        print(f"\nTP 2 on one host: {report}")


@pytest.mark.long
def test_faults_of_the_frontend_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seconds, seed = float(os.environ.get("CHAOS_SECONDS", "600")), int(os.environ.get("SEED", "0"))
    report = play(tmp_path, streams=64, seconds=seconds, seed=seed, max_tokens=300, durable=True)
    with capsys.disabled():
        print(f"\nTP 2 on one host with --state-dir: {report}")


@pytest.mark.long
def test_kills_while_forming(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks are killed again before they are back, 200 times; the streams that were open at the first kill are exact."""
    port, rng = free_port(), random.Random(int(os.environ.get("SEED", "0")))
    with running([serve("--nproc-per-node", "2", port=port)], port, tmp_path / "log") as server:
        todo = [call for call in calls(14, 5, 300) if call.exact]
        expected = asyncio.run(baseline(server.url, todo))

        async def play() -> int:
            answers = asyncio.create_task(baseline(server.url, todo))
            await asyncio.sleep(0.3)
            killed = forming = 0
            while forming < 200:
                pid = rank(server, rng)
                state = (await asyncio.to_thread(server.get, "/readyz"))[1]["state"]
                with suppress(ProcessLookupError):
                    if pid is not None:
                        os.kill(pid, signal.SIGKILL)
                        killed, forming = killed + 1, forming + (state == "recovering")
                await asyncio.sleep(rng.uniform(0.0, 0.25))
            assert await answers == expected
            return killed

        killed = asyncio.run(play())
        assert server.stop() == [0]
        server.assert_nothing_left()
    with capsys.disabled():
        print(f"\n{killed} kills, 200 of them while forming")
