"""Ranks that cannot connect where gloo and NCCL would listen are told so, all of them, within seconds."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from tpserve.engine import connectivity
from tpserve.errors import EngineFailure

NODES = ("127.0.0.1", "127.0.0.2", "127.0.0.1")


def outcomes(addresses: tuple[str | None, ...]) -> list[BaseException | None]:
    store = HashStore()
    with ThreadPoolExecutor(len(addresses)) as pool:
        ranks = [
            pool.submit(connectivity.check_connectivity, rank, len(addresses), own, store, 5.0)
            for rank, own in enumerate(addresses)
        ]
        return [rank.exception() for rank in ranks]


def test_nodes_that_reach_each_other() -> None:
    assert outcomes(NODES) == [None] * 3
    assert outcomes(("127.0.0.1", None)) == [None] * 2


def test_a_firewall_between_two_is_said_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    through = socket.create_connection

    def firewall(to: tuple[str, int], timeout: float) -> socket.socket:
        if to[0] == NODES[1]:
            raise TimeoutError("timed out")
        return through(to, timeout)

    monkeypatch.setattr(socket, "create_connection", firewall)
    for outcome in outcomes(NODES):
        assert isinstance(outcome, EngineFailure)
        said = str(outcome)
        assert said.startswith("rank 0 cannot reach rank 1 at 127.0.0.2:") and "; rank 2 cannot reach rank 1" in said
        assert "Connection timed out (errno 110)" in said and "net.ipv4.ip_local_port_range" in said


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(EngineFailure, match="rank 1 did not come within 0.2 s"):
        connectivity.check_connectivity(0, 2, "127.0.0.1", HashStore(), 0.2)
