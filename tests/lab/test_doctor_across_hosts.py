"""The doctor across hosts: what is well, a pair that cannot reach each other, and nodes that differ."""

import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.lab import links
from launch.lab.hosts import Host
from launch.lab.jobs import commands, rank_of
from tests.cluster import tiny_model
from tests.lab.cluster import cluster

pytestmark = pytest.mark.lab


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tiny_model.save(tmp_path_factory.mktemp("examined"))
    tiny_model.add_weights(path)
    return str(path)


def examined(hosts: Sequence[Host], place: Path, *flags: str, last: Sequence[str] = ()) -> tuple[list[int], str]:
    """Exit codes and output. `last`: flags of the last node alone."""
    lines = commands(hosts, ["doctor", *flags, "--device", "cpu", "--host", "127.0.0.1"], [1], torchrun=True)
    lines[-1] += last
    with cluster(hosts, [], place, lines=lines) as server:
        return server.wait(100.0), server.log


def test_two_hosts_that_are_well(hosts: list[Host], model: str, place: Path) -> None:
    codes, said = examined(hosts, place, model, "-tp", "2")
    assert codes == [0, 0], said
    assert "each of 2 ranks reaches all others" in said and len(re.findall(r"good +disk on node[01]", said)) == 2
    assert re.search(rf"gloo over TCP, {hosts[0].address}, {hosts[1].address}; InfiniBand and GPUDirect: not tried", said)


@pytest.mark.parametrize("hosts", [3], indirect=True)
def test_a_pair_that_cannot_reach_each_other_is_named(hosts: list[Host], model: str, place: Path) -> None:
    links.cut(hosts[1], hosts[2])
    codes, said = examined(hosts, place, model, "-tp", "3")
    assert codes == [1, 1, 1], said
    for here, there in ((1, 2), (2, 1)):
        failed = rf"broken +reachability +rank {here} on node{here} -> rank {there} on node{there}: {hosts[there].address}:\d+: "
        assert re.search(failed + r"No route to host \(errno 113\)", said), said
    assert len(re.findall(r"broken +reachability", said)) == 2 and "not tried: mend what is broken first" in said


def test_a_slow_link_is_slow(hosts: list[Host], model: str, place: Path) -> None:
    links.slow(hosts[1], "20mbit", None)
    codes, said = examined(hosts, place, model, "-tp", "2")
    assert codes == [0, 0] and re.search(r"GB/s for \d", said), said
    rate = re.search(r"([\d.e-]+) GB/s for", said)
    assert rate is not None and float(rate[1]) < 0.01, said


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL, None])
def test_a_sum_that_does_not_come_back(hosts: list[Host], model: str, place: Path, how: signal.Signals | None) -> None:
    """Node 1's rank is stopped or killed, or its link is cut, while the sums are timed: soon a line names it."""
    links.slow(hosts[1], "5mbit", None)
    lines = commands(hosts, ["doctor", model, "-tp", "2", "--device", "cpu", "--host", "127.0.0.1"], [1], torchrun=True)
    with cluster(hosts, [], place, lines=lines) as server:
        received = Path("/sys/class/net", hosts[1].port, "statistics/rx_bytes")
        begin = int(received.read_text())
        while int(received.read_text()) < begin + 400_000:
            time.sleep(0.05)
        if how is None:
            links.cut(hosts[1])
        else:
            os.kill(next(pid for pid in hosts[1].processes() if rank_of(pid) == 1), how)
        server.wait_said("rank 1 on node1 does not answer", 40.0)


def test_hosts_that_differ(hosts: list[Host], model: str, place: Path) -> None:
    codes, said = examined(hosts, place, model, "-tp", "2", last=["--max-num-seqs", "7"])
    assert codes == [1, 1], "torchrun's"
    assert re.search(r"--max-num-seqs +256 +7\n", said) and re.search(r"rank 0 on node0 +rank 1 on node1\n", said)
    assert "tpserve: error: rank 0 on node0 has --max-num-seqs 256, rank 1 on node1 has --max-num-seqs 7" in said
