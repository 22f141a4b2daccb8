"""Nodes that know each other by address alone: their DNS server never answers, and /etc/hosts names nobody."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from launch.lab.hosts import Host
from tests import silent_dns
from tests.cluster import tiny_model
from tests.lab.cluster import cluster


@pytest.fixture
def questions(hosts: list[Host], tmp_path: Path) -> Iterator[Path]:
    """What the hosts, which are made such, ask DNS."""
    noted = tmp_path / "questions"
    noted.touch()
    named = [host.run("cat", "/etc/hosts") for host in hosts]
    for host in hosts:
        host.run("env", f"PYTHONPATH={silent_dns.ROOT}", sys.executable, "-c",
                 "import sys; from tests.silent_dns import silence; silence(sys.argv[1])", str(noted))  # fmt: skip
        write_hosts(host, silent_dns.HOSTS)
    servers = [pid for host in hosts for pid in host.processes()]
    yield noted
    for host, names in zip(hosts, named, strict=True):
        write_hosts(host, names)
        host.run("umount", "/etc/resolv.conf")
    for pid in servers:
        with suppress(ProcessLookupError):  # a cluster ends all that runs on its hosts
            os.kill(pid, 9)


def write_hosts(host: Host, text: str) -> None:
    host.run("sh", "-c", 'printf %s "$1" > /etc/hosts', "sh", text)


def test_two_nodes_serve_without_names(hosts: list[Host], questions: Path, place: Path, tmp_path: Path) -> None:
    model = str(tiny_model.save(tmp_path / "tiny"))
    with cluster(hosts, [model, "--load-format", "dummy", "-tp", "2"], place) as server:
        server.wait_ready()
        assert server.complete("The cat", max_tokens=4, ignore_eos=True)["finish_reason"] == "length"
        server.stop()
    assert questions.read_bytes() == b""
