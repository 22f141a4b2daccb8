"""Nodes that know each other by address alone: their DNS server never answers, and /etc/hosts names nobody."""

import sys
import time
from pathlib import Path

import pytest

from launch.lab.hosts import Host
from tests import silent_dns
from tests.cluster import tiny_model
from tests.cluster.test_no_dns import LOOKUP_S
from tests.lab.cluster import cluster

SILENCE = "from tests.silent_dns import silence; silence()"


@pytest.fixture
def nameless(hosts: list[Host]) -> list[Host]:
    for host in hosts:
        host.run("env", f"PYTHONPATH={silent_dns.ROOT}", sys.executable, "-c", SILENCE)
    return hosts


@pytest.mark.parametrize("torchrun", [False, True])
def test_two_nodes_serve(nameless: list[Host], place: Path, tmp_path: Path, torchrun: bool) -> None:
    model = str(tiny_model.save(tmp_path / "tiny"))
    began_s = time.monotonic()
    with cluster(nameless, [model, "--load-format", "dummy", "-tp", "2"], place, torchrun=torchrun) as server:
        server.wait_ready()
        took_s = time.monotonic() - began_s
        laps = next(line for line in server.log.splitlines() if " start: agent " in line)
        meeting_s = float(laps.partition("all ranks ")[2].partition(",")[0])
        assert meeting_s < LOOKUP_S / 2, server.log
        print(f"{took_s:.1f} s")
        assert server.complete("The cat", max_tokens=4)["finish_reason"] == "length"
        server.stop()
