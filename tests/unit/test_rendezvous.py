"""The nodes of a job find each other over real sockets, or are told why not."""

import json
import logging
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from tpserve.cluster import rendezvous, retry_log
from tpserve.cluster.node_monitor import JoinRequest, wait_head_exit
from tpserve.cluster.rendezvous import Rendezvous, RendezvousInfo
from tpserve.cluster.retry_log import RetryLog, missing_ranks
from tpserve.errors import EngineFailure, UserError
from tpserve.host.network import listen

HEAD = JoinRequest(0, 3, 2, "1.0", "head", "machine-a", "127.0.0.1", derived=True)
FIRST = JoinRequest(1, 3, 2, "1.0", "first", "machine-a", "127.0.0.1", derived=True)
SECOND = replace(FIRST, node=2, host="second")
KEY = b"of the cluster"


class Head(threading.Thread):
    """Node 0, gathering; `outcome` is what came of it."""

    def __init__(self, timeout_s: float, key: bytes) -> None:
        super().__init__(daemon=True)
        listener = listen("127.0.0.1", (0, 0))
        self.port: int = listener.getsockname()[1]
        self.outcome: Any = None
        self._store = listen("127.0.0.1", (0, 0))
        self.meet = RendezvousInfo("127.0.0.1", self._store.getsockname()[1])
        self._rendezvous = Rendezvous(HEAD, listener, 6, timeout_s, key)

    def serve(self) -> None:
        """Go on listening, until `close`."""
        with suppress(OSError, ValueError):  # its sockets are closed
            self._rendezvous.serve()

    def close(self) -> None:
        self._rendezvous.close()
        self._store.close()

    def run(self) -> None:
        try:
            self._rendezvous.wait_for_all()
            self._rendezvous.send_store(self.meet.host, self.meet.port)
            self.outcome = "met"
            threading.Thread(target=self.serve, daemon=True).start()
        except (UserError, EngineFailure) as error:
            self.outcome = error


@contextmanager
def head(timeout_s: float = 20.0, key: bytes = b"") -> Iterator[Head]:
    thread = Head(timeout_s, key)
    thread.start()
    yield thread
    thread.join(30.0)
    assert not thread.is_alive()


class Node(threading.Thread):
    """Another node, joining."""

    def __init__(self, me: JoinRequest, port: int, timeout_s: float = 20.0, key: bytes = b"", again: bool = False) -> None:
        super().__init__(daemon=True)
        self._again = again
        self._args = (me, "127.0.0.1", port, 6, timeout_s, key)
        self.outcome: Any = None
        self.start()

    def run(self) -> None:
        try:
            met, self.line = rendezvous.join_rendezvous(*self._args, again=self._again)
            self.outcome = replace(met, proof="", first_rank=0)
            self.first_rank = met.first_rank
        except (UserError, EngineFailure) as error:
            self.outcome = error

    def ended(self) -> Any:
        self.join(30.0)
        assert not self.is_alive()
        return self.outcome


def test_all_meet_and_strangers_do_not_matter() -> None:
    with head() as first, socket.create_connection(("127.0.0.1", first.port)) as silent:
        with socket.create_connection(("127.0.0.1", first.port)) as loud:
            loud.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert b"Challenge" in loud.recv(1000)
            assert loud.recv(1) == b""
        crowd = [socket.create_connection(("127.0.0.1", first.port)) for _ in range(100)]
        with socket.create_connection(("127.0.0.1", first.port)) as endless, pytest.raises(OSError):
            for _ in range(1000):
                endless.sendall(b"x" * 65536)
        nodes = [Node(join, first.port) for join in (SECOND, FIRST)]
        assert [node.ended() for node in nodes] == [first.meet] * 2
        assert [node.first_rank for node in nodes] == [4, 2]
        assert {silent.recv(1), silent.recv(1000)[-2:]} == {b"{", b"}\n"} and silent.recv(1) == b"", "the challenge, and no more"
        for stranger in crowd:
            stranger.close()
    assert first.outcome == "met"
    assert not select.select([node.line for node in nodes], [], [], 0.3)[0], "node 0 lives"
    first.close()
    assert [wait_head_exit(node.line) for node in nodes] == ["node 0 has ended"] * 2


def test_a_node_comes_back_after_all_have_met() -> None:
    """Once its agent has ended, or before node 0 has noticed; as the same node, and from elsewhere with the secret."""
    with head(key=KEY) as first:
        nodes = [Node(join, first.port, key=KEY) for join in (FIRST, SECOND)]
        assert [node.ended() for node in nodes] == [first.meet] * 2
    nodes[0].line.close()
    again = Node(FIRST, first.port, key=KEY)
    assert (again.ended(), again.first_rank) == (first.meet, 2)
    third = Node(FIRST, first.port, key=KEY)
    assert third.ended() == first.meet and wait_head_exit(again.line) == "node 0 has ended", "the new connection counts"
    twin = Node(replace(FIRST, machine="machine-b", address="127.0.0.2"), first.port, key=KEY).ended()
    assert isinstance(twin, UserError) and "is another machine: see its --interface" in str(twin)
    other = Node(replace(FIRST, nproc=3), first.port, key=KEY).ended()
    assert isinstance(other, UserError) and "comes back with 3 ranks, and had 2: see its --nproc-per-node" in str(other)
    third.line.close()
    moved = Node(replace(FIRST, address="127.0.0.2", derived=False), first.port, key=KEY)
    assert moved.ended() == first.meet and first.outcome == "met"
    first.close()


def test_a_node_that_has_moved_needs_the_secret() -> None:
    with head() as first:
        nodes = [Node(join, first.port) for join in (FIRST, SECOND)]
        assert [node.ended() for node in nodes] == [first.meet] * 2
    nodes[0].line.close()
    moved = Node(replace(FIRST, address="127.0.0.2", derived=False), first.port).ended()
    assert isinstance(moved, UserError) and "node 1 (first, 127.0.0.2) comes back, and was at 127.0.0.1: a node may" in str(moved)
    assert Node(FIRST, first.port).ended() == first.meet
    first.close()


def test_whoever_dials_again_learns_of_node_0s_end() -> None:
    """And waits while nobody is there who could tell: the next agent of node 0 takes the connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        node = Node(FIRST, port, again=True)
        time.sleep(0.3)
        assert node.is_alive()
    assert str(node.ended()) == "node 0 has ended"


def test_a_node_that_leaves_is_waited_for_again() -> None:
    with head() as first:
        with socket.create_connection(("127.0.0.1", first.port)) as leaving, leaving.makefile() as lines:
            leaving.sendall(msgspec.json.encode(FIRST) + b"\n")
            assert "Challenge" in lines.readline() and "Waiting" in lines.readline()
        other = Node(SECOND, first.port)
        time.sleep(0.7)
        assert other.is_alive()
        assert Node(FIRST, first.port).ended() == other.ended() == first.meet


@pytest.mark.parametrize(
    ("join", "said"),
    [
        (
            replace(FIRST, version="0.9"),
            r"node 1 \(first, 127.0.0.1\) runs tpserve 0.9, node 0 \(head\) runs 1.0: install the same",
        ),
        (replace(FIRST, nnodes=4), r"was started with --nnodes 4, node 0 \(head\) with --nnodes 3"),
        (replace(FIRST, machine="machine-b"), r"calls itself by a loopback address, and node 0 \(head\) is another machine"),
        (replace(FIRST, machine="machine-b", address="10.0.0.2"), r"reaches node 0 as 127.0.0.1: there is address translation"),
    ],
)
def test_what_cannot_heal_ends_both_at_once(join: JoinRequest, said: str) -> None:
    with head() as first:
        waiting = Node(SECOND, first.port)
        time.sleep(0.3)
        offender = Node(join, first.port)
    for outcome in (offender.ended(), waiting.ended(), first.outcome):
        with pytest.raises(UserError, match=said):
            raise outcome


@pytest.mark.parametrize("key", [b"", b"another"])
def test_who_does_not_know_the_secret_ends_nothing(key: bytes) -> None:
    """Not even by what would end all from one of us, nor with what was heard of one of us."""
    with head(key=KEY) as first:
        stranger = Node(replace(FIRST, version="0.9"), first.port, key=key)
        with pytest.raises(
            UserError, match=r"node 1 \(first\) has another --cluster-secret-file than node 0 \(head\), or one of them has none"
        ):
            raise stranger.ended()
        heard = replace(FIRST, nonce="1")
        with socket.create_connection(("127.0.0.1", first.port)) as once, once.makefile() as lines:
            heard = replace(heard, proof=rendezvous.sign(KEY, json.loads(lines.readline())["nonce"], heard))
            once.sendall(msgspec.json.encode(heard) + b"\n")
            assert "Waiting" in lines.readline()
        with socket.create_connection(("127.0.0.1", first.port)) as again, again.makefile() as lines:
            again.sendall(msgspec.json.encode(heard) + b"\n")
            assert "Challenge" in lines.readline() and "Refused" in lines.readline()
        nodes = [Node(join, first.port, key=KEY) for join in (FIRST, SECOND)]
        assert [node.ended() for node in nodes] == [first.meet] * 2
    assert first.outcome == "met"


def test_a_head_that_does_not_know_the_secret_is_not_believed() -> None:
    with head() as first:
        one, other = Node(FIRST, first.port, key=KEY), Node(SECOND, first.port)
        with pytest.raises(UserError, match="has another --cluster-secret-file than node 0"):
            raise one.ended()
        assert Node(FIRST, first.port).ended() == other.ended() == first.meet
    with socket.create_server(("127.0.0.1", 0)) as server:
        node = Node(FIRST, server.getsockname()[1], key=KEY)
        with server.accept()[0] as connection:
            connection.sendall(msgspec.json.encode(RendezvousInfo("127.0.0.1", 1, proof="0" * 64)) + b"\n")
            assert "does not know the secret of --cluster-secret-file" in str(node.ended())


def test_a_store_that_cannot_be_reached_is_named() -> None:
    """As behind a firewall that lets only the master port through."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        node = Node(FIRST, server.getsockname()[1], timeout_s=0.5)
        with server.accept()[0] as connection:
            connection.sendall(msgspec.json.encode(RendezvousInfo("127.0.0.1", 1)) + b"\n")
            outcome = node.ended()
    assert isinstance(outcome, EngineFailure)
    assert "node 0's store at 127.0.0.1:1 could not be reached within" in str(outcome) and "(errno 111)" in str(outcome)


def test_a_head_that_ends_before_its_store_is_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        node = Node(FIRST, server.getsockname()[1], timeout_s=60.0)
        with server.accept()[0] as connection:
            connection.sendall(msgspec.json.encode(RendezvousInfo("127.0.0.1", 1)) + b"\n")
            time.sleep(0.3)
        assert str(node.ended()) == "node 0 has ended"


def test_two_machines_with_one_address() -> None:
    mine = replace(FIRST, address="10.0.0.2", derived=False)
    with head() as first:
        Node(mine, first.port)
        time.sleep(0.3)
        outcome = Node(replace(SECOND, address="10.0.0.2", machine="machine-b", derived=False), first.port).ended()
    assert "node 2 (second, 10.0.0.2) and node 1 (first) both call themselves 10.0.0.2: pass --interface" in str(outcome)


def test_a_place_that_is_taken_turns_only_the_newcomer_away() -> None:
    with head() as first:
        node = Node(FIRST, first.port)
        time.sleep(0.3)
        outcome = Node(replace(FIRST, host="twin"), first.port).ended()
        assert isinstance(outcome, UserError) and "--node-rank 1 is taken by first (127.0.0.1)" in str(outcome)
        assert Node(SECOND, first.port).ended() == node.ended() == first.meet


def test_when_the_time_is_over_the_missing_are_named() -> None:
    with head(timeout_s=1.0) as first:
        outcome = Node(SECOND, first.port).ended()
    for error in (outcome, first.outcome):
        assert isinstance(error, EngineFailure)
        said = f"node 1 of 3 did not come to 127.0.0.1:{first.port} within 1 s, so ranks 2-3 are missing"
        assert said in str(error)


def test_a_head_that_does_not_answer_is_named_with_what_the_kernel_says() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        outcome = Node(FIRST, port, timeout_s=0.5).ended()
    assert isinstance(outcome, EngineFailure)
    said = f"node 0 did not answer at 127.0.0.1:{port} within 0.5 s (Connection refused (errno 111)), so ranks 0-1 are missing"
    assert said in str(outcome)


def test_what_is_no_node_of_ours() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        node = Node(FIRST, server.getsockname()[1])
        with server.accept()[0] as connection:
            connection.sendall(b"220 mail.example.com ESMTP\n")
            assert "is no node of tpserve: check --master-port" in str(node.ended())


def test_lines_come_at_growing_intervals(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    retry_log = RetryLog(600.0, logging.getLogger("tpserve.growing"))
    with caplog.at_level("INFO", "tpserve.growing"):
        for second in range(400):
            now[0] = float(second)
            retry_log.log_if_due("node 1 of 2 at 10.0.0.1:29501", "No route to host (errno 113)" if second > 350 else "")
    said = [record.message for record in caplog.records if record.name == "tpserve.growing"]  # threads of others log, too
    times = [line.split(", ")[1].split(" s")[0] for line in said]
    assert times == ["2", "3", "6", "12", "24", "48", "96", "156", "216", "276", "336", "351", "396"]
    assert said[0] == "waiting for node 1 of 2 at 10.0.0.1:29501, 2 s"
    assert said[-1] == "waiting for node 1 of 2 at 10.0.0.1:29501, 396 s: No route to host (errno 113)"


@pytest.mark.parametrize(
    ("missing", "sizes", "world", "said"),
    [
        ([1], {0: 2}, 4, "ranks 2-3 are"),
        ([1], {0: 1}, 2, "rank 1 is"),
        ([0], {1: 2}, 3, "rank 0 is"),
        ([1, 3], {0: 1, 2: 3}, 8, "ranks 1-2, 6-7 are"),
        ([1, 2], {0: 1}, 4, "3 of 4 ranks are"),
        ([1], {0: 4}, 4, "1 of 4 ranks are"),
    ],
)
def test_missing_ranks(missing: list[int], sizes: dict[int, int], world: int, said: str) -> None:
    assert missing_ranks(missing, sizes, world, len(missing) + len(sizes)) == said


def test_a_host_that_does_not_answer_is_told_of_within_two_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel drops what comes to a full queue, as a firewall does."""
    monkeypatch.setattr(retry_log, "CONNECT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.create_connection(full.getsockname()):
        answers = iter(("", "enough"))
        begin_s = time.time()
        with caplog.at_level("INFO", "tpserve.rendezvous"), pytest.raises(EngineFailure, match="enough"):
            logger = logging.getLogger("tpserve.rendezvous")
            retry_log.connect_with_retry(*full.getsockname(), "node 0's store", 60.0, logger, lambda: next(answers))
    (record,) = caplog.records
    assert record.message.startswith("waiting for node 0's store at 127.0.0.1:") and record.created - begin_s < 2.0
