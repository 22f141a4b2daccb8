"""Requests of every kind on two hosts, TP 2 x PP 2, whose processes are killed, stopped and crashed, and whose link is cut.

`make test` has a short run, `make chaos` half an hour. Left out is the frontend: without `--state-dir` it owns the open answers.
"""

import asyncio
import os
import random
import signal
from pathlib import Path

import pytest

from launch.lab import links
from launch.lab.hosts import Host
from launch.lab.jobs import what
from tests.crash.chaos import Report, Trouble, baseline, calls, chaos, signalled
from tests.lab.cluster import Cluster, cluster
from tests.server import Server


def _some(server: Server, rng: random.Random, *names: str) -> int | None:
    assert isinstance(server, Cluster)
    found = [pid for pid in server.pids() if what(pid).partition(" ")[0] in names]
    return rng.choice(found) if found else None


def rank(server: Server, rng: random.Random) -> int | None:
    return _some(server, rng, "rank")


def agent(server: Server, rng: random.Random) -> int | None:
    return _some(server, rng, "agent")


def forkserver(server: Server, rng: random.Random) -> int | None:
    return _some(server, rng, "forkserver")


def cut(seconds: float, weight: int) -> Trouble:
    """Packets between the hosts vanish for a while."""

    async def act(server: Server, rng: random.Random) -> bool:
        assert isinstance(server, Cluster)
        near, far = server.hosts
        links.cut(far, near, silent=True)
        await asyncio.sleep(seconds)
        links.heal(far, [near])
        return True

    return Trouble(f"cut of {seconds:g} s", weight, act)


async def _node_again(server: Server, rng: random.Random) -> bool:
    """`tpserve serve` of node 1 is killed, and somebody starts it again."""
    assert isinstance(server, Cluster)
    server.processes[-1].kill()
    await asyncio.to_thread(server.processes[-1].wait, 10.0)
    server.start(1)
    return True


FAULTS = (
    signalled(signal.SIGKILL, rank, 6),
    signalled(signal.SIGSEGV, rank, 2),
    signalled(signal.SIGSTOP, rank, 1),
    signalled(signal.SIGKILL, agent, 3),
    signalled(signal.SIGSTOP, agent, 1),
    signalled(signal.SIGKILL, forkserver, 2),
    cut(2.0, 2),
    cut(10.0, 1),
    Trouble("SIGKILL node 1", 1, _node_again),
)


def play(hosts: list[Host], place: Path, streams: int, seconds: float, seed: int, max_tokens: int) -> Report:
    with cluster(hosts, ["-tp", "2", "-pp", "2"], place, [2]) as server:
        server.wait_ready()
        todo = calls(streams, seed, max_tokens)
        expected = asyncio.run(baseline(server.url, todo))
        report = asyncio.run(chaos(server, todo, expected, seconds, seed, FAULTS))
        assert not report.errors, f"{len(report.errors)} errors, the first: {report.errors[0]}\n{server.log[-6000:]}"
        server.wait_ready()
        server.processes[0].send_signal(signal.SIGTERM)
        assert server.wait()[0] == 0 and server.processes[-1].returncode == 0
    return report


def test_a_few_faults(hosts: list[Host], place: Path) -> None:
    report = play(hosts, place, streams=13, seconds=12.0, seed=1, max_tokens=120)
    assert report.answers >= 13 and sum(report.faults.values()) >= 3


@pytest.mark.long
def test_faults_for_half_an_hour(hosts: list[Host], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seconds, seed = float(os.environ.get("CHAOS_SECONDS", "1800")), int(os.environ.get("SEED", "0"))
    report = play(hosts, place, streams=64, seconds=seconds, seed=seed, max_tokens=300)
    with capsys.disabled():
        print(f"\nTP 2 x PP 2 on two hosts: {report}")
