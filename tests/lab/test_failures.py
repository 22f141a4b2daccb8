"""What fails on one host ends everything on all of them within ten seconds, and the last line says what failed and what to do."""

import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launch.lab import links
from launch.lab.hosts import Host
from launch.lab.jobs import rank_of, stopped_or_dead, what
from tests.cluster import tiny_model
from tests.lab.cluster import Cluster, cluster

FLAGS = ("--load-format", "dummy", "-tp", "2", "-pp", "2")
END_S = 10.0


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model.save(tmp_path_factory.mktemp("failing")))


class Watch(threading.Thread):
    """Asks /readyz again and again, and generates; what it saw."""

    def __init__(self, server: Cluster) -> None:
        super().__init__(daemon=True)
        self._server = server
        self.seen: list[tuple[int, Any]] = []
        self.answers: list[tuple[int, Any]] = []
        self._over = threading.Event()
        self._asking = threading.Thread(target=self._ask, daemon=True)
        self.start()
        self._asking.start()

    def run(self) -> None:
        while not self._over.wait(0.05):
            try:
                self.seen.append(self._server.get("/readyz", 1.0))
            except OSError:
                continue

    def _ask(self) -> None:
        while not self._over.wait(0.01):
            try:
                body = {"prompt": "The cat", "max_tokens": 200, "ignore_eos": True}
                self.answers.append(self._server.post("/v1/completions", body, 30.0))
            except (OSError, ValueError):
                continue

    def end(self) -> None:
        self._over.set()
        self.join()


def pid_of(hosts: list[Host], name: str) -> int:
    return next(pid for host in hosts for pid in host.processes() if what(pid) == name)


def ends(server: Cluster, watch: Watch, began_s: float, said: str) -> None:
    """Everything on every host ends in time, and the reason is the last thing that node 0's log says."""
    while left := [pid for host in server.hosts for pid in host.processes() if what(pid) and stopped_or_dead(pid) != "zombie"]:
        names = [(what(pid), rank_of(pid)) for pid in left]
        assert time.monotonic() - began_s < END_S, f"{names} live after {END_S:g} s:\n{server.log}"
        time.sleep(0.02)
    assert set(server.wait(5.0)) == {1}
    watch.end()
    last = [line for line in server.log.splitlines() if line.startswith("node0 | ")][-1]
    assert re.search(rf"ERROR ended: rank {said}.*; (look|it hangs)", last), server.log
    failed = [body for status, body in watch.seen if status == 503]
    assert failed or watch.seen[-1][0] == 200, "it was gone before it could be asked"
    assert "Traceback" not in server.log


@pytest.mark.lab
@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank(hosts: list[Host], model: str, place: Path, rank: int, number: signal.Signals) -> None:
    with cluster(hosts, [model, *FLAGS], place, [2]) as server:
        server.wait_ready()
        watch = Watch(server)
        time.sleep(1.0)
        began_s = time.monotonic()
        os.kill(pid_of(hosts, f"rank {rank}"), number)
        ends(server, watch, began_s, rf"{rank} on node{rank // 2} \(pid")


@pytest.mark.lab
@pytest.mark.parametrize("silent", [False, True])
def test_a_cut_link(hosts: list[Host], model: str, place: Path, silent: bool) -> None:
    with cluster(hosts, [model, *FLAGS], place, [2]) as server:
        server.wait_ready()
        watch = Watch(server)
        time.sleep(1.0)
        began_s = time.monotonic()
        links.cut(hosts[1], hosts[0], silent=silent)
        ends(server, watch, began_s, r"[23] on node1 \(pid")


@pytest.mark.lab
def test_a_cut_of_two_seconds_is_not_noticed(hosts: list[Host], model: str, place: Path) -> None:
    with cluster(hosts, [model, *FLAGS], place, [2]) as server:
        server.wait_ready()
        body = {"prompt": "The cat", "max_tokens": 200, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
        calm = server.post("/v1/completions", body)[1]["choices"][0]["token_ids"]
        watch = Watch(server)
        time.sleep(0.5)
        links.cut(hosts[1], silent=True)
        time.sleep(2.0)
        links.heal(hosts[1], [hosts[0]])
        assert server.post("/v1/completions", body)[1]["choices"][0]["token_ids"] == calm
        watch.end()
        assert {status for status, _ in watch.seen} == {status for status, _ in watch.answers} == {200}
        assert set(server.stop()) == {0}
