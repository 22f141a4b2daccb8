"""Requests of every kind on a server whose processes are killed: `make test` has a short run, `make chaos` half an hour."""

import asyncio
import os
import time
from pathlib import Path

import pytest

from tests.crash.chaos import Report, baseline, calls, chaos, memory_mib, state
from tests.server import Server, free_port, running, serve


def play(place: Path, streams: int, seconds: float, seed: int, max_tokens: int) -> Report:
    """One run on one host, TP 2."""
    port = free_port()
    with running([serve("--nproc-per-node", "2", port=port)], port, place / "log") as server:
        todo = calls(streams, seed, max_tokens)
        expected = asyncio.run(baseline(server.url, todo))
        before, memory = state(server), memory_mib(server)
        report = asyncio.run(chaos(server, todo, expected, seconds, seed))
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


def test_a_few_faults(tmp_path: Path) -> None:
    report = play(tmp_path, streams=13, seconds=18.0, seed=7, max_tokens=160)
    assert report.answers >= 13 and sum(report.faults.values()) >= 3


@pytest.mark.long
def test_faults_for_half_an_hour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seconds, seed = float(os.environ.get("CHAOS_SECONDS", "1800")), int(os.environ.get("SEED", "0"))
    report = play(tmp_path, streams=64, seconds=seconds, seed=seed, max_tokens=400)
    with capsys.disabled():
        print(f"\nTP 2 on one host: {report}")
