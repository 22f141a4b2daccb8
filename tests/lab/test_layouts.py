"""Every layout across hosts says what one process says: greedy and drawn, alone and in a crowd."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from launch.lab.hosts import Host
from tests.lab import models
from tests.lab.cluster import PORT, Cluster, cluster
from tests.server import Server

BODIES: list[dict[str, Any]] = [
    {"prompt": list(range(3, 40)), "max_tokens": 24, "temperature": 0},
    {"prompt": [7], "max_tokens": 24, "temperature": 0.8, "seed": 3, "n": 2},
    {"prompt": list(range(300, 400)), "max_tokens": 12, "temperature": 1.0, "top_p": 0.9, "seed": 5},
]
Tokens = list[list[int]]


def ask(server: Server, body: dict[str, Any]) -> Tokens:
    status, answer = server.post("/v1/completions", {"return_token_ids": True, "ignore_eos": True, **body})
    assert status == 200, answer
    return [choice["token_ids"] for choice in answer["choices"]]


def ask_all(server: Server) -> list[Tokens]:
    with ThreadPoolExecutor(len(BODIES)) as pool:
        return list(pool.map(lambda body: ask(server, body), BODIES))


@pytest.fixture(scope="session")
def alone(lab: Callable[[int], list[Host]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """A model's directory, and what one process says with it."""

    @cache
    def of(family: str) -> tuple[str, list[Tokens]]:
        directory = getattr(models, family)(tmp_path_factory.mktemp(family))
        lines = [[sys.executable, "-m", "tpserve", "serve", directory, "--port", str(PORT), "--host", "0.0.0.0"]]
        with cluster(lab(2)[:1], [], tmp_path_factory.mktemp("alone"), lines=lines) as server:
            server.wait_ready()
            return directory, ask_all(server)

    yield of


def check(server: Cluster, wanted: list[Tokens]) -> None:
    server.wait_ready()
    assert ask_all(server) == wanted
    assert set(server.stop()) == {0}


CASES = [
    pytest.param("llama", 2, "-tp 2", [1], id="TP 2 on two hosts"),
    pytest.param("llama", 2, "-tp 4", [2], id="TP 4 on two hosts", marks=pytest.mark.lab),
    pytest.param("llama", 2, "-pp 2", [1], id="PP 2 on two hosts", marks=pytest.mark.lab),
    pytest.param("llama", 2, "-tp 2 -pp 2", [2], id="TP 2 x PP 2 on two hosts", marks=pytest.mark.lab),
    pytest.param("llama", 4, "-tp 2 -pp 2", [1], id="TP 2 x PP 2 on four hosts", marks=pytest.mark.lab),
    pytest.param("llama", 2, "-tp 3", [1, 2], id="TP 3 on hosts of 1 and 2", marks=pytest.mark.lab),
    pytest.param("llama", 2, "-tp 1 -pp 3", [2, 1], id="PP 3 on hosts of 2 and 1", marks=pytest.mark.lab),
    pytest.param("gpt2", 2, "-tp 4 -pp 2", [4], id="gpt2 TP 4 x PP 2", marks=pytest.mark.lab),
    pytest.param("opt", 2, "-tp 4", [2], id="OPT TP 4", marks=pytest.mark.lab),
]


@pytest.mark.parametrize(("family", "hosts", "layout", "ranks"), CASES, indirect=["hosts"])
def test_the_tokens_of_one_process(
    family: str, hosts: list[Host], layout: str, ranks: list[int], alone: Callable[[str], Any], place: Path
) -> None:
    model, wanted = alone(family)
    with cluster(hosts, [model, *layout.split()], place, ranks) as server:
        check(server, wanted)


@pytest.mark.lab
@pytest.mark.parametrize(("layout", "ranks"), [("-tp 2 -pp 2", [2]), ("-tp 3", [1, 2])])
def test_under_torchrun(hosts: list[Host], layout: str, ranks: list[int], alone: Callable[[str], Any], place: Path) -> None:
    model, wanted = alone("llama")
    with cluster(hosts, [model, *layout.split()], place, ranks, torchrun=True) as server:
        server.wait_ready()
        assert ask_all(server) == wanted
        assert server.stop() == [1, 1]  # torchrun's, however its ranks end


@pytest.mark.long
@pytest.mark.parametrize("layout", ["-tp 8 -pp 2", "-tp 16"])
def test_sixteen_ranks(hosts: list[Host], layout: str, alone: Callable[[str], Any], place: Path) -> None:
    model, wanted = alone("llama")
    with cluster(hosts, [model, *layout.split()], place, [8]) as server:
        server.wait_ready(600.0)
        assert ask_all(server) == wanted
        assert server.stop(timeout_s=120.0) == [0, 0]
