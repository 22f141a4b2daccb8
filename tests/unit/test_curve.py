"""Who gets in over TCP: keys of one secret, and nobody else; and what is said about secrets that do not fit."""

import base64
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
import zmq

from tpserve.errors import EngineFailure, UserError
from tpserve.types.plan import StepResult
from tpserve.wire import codec
from tpserve.wire.channels import ResultReceiver, ResultSender, TcpEndpoint, bind, connect, open_socket, tcp
from tpserve.wire.curve import FRONTEND, ConnectInfo, CurveClient, KeyPair, Keyring, ZapAuthenticator, rank_role, write_secret

WORLD = 3


@pytest.fixture
def keyring() -> Keyring:
    return Keyring.open(None)


@pytest.fixture
def tcp_endpoint(keyring: Keyring) -> Iterator[ResultReceiver]:
    """Rank 0's socket for results, as other nodes see it."""
    curve_server = keyring.curve_server(rank_role(0), WORLD)
    zap_authenticator = ZapAuthenticator(curve_server.allowed)
    receiver = ResultReceiver(f"ipc://@tpserve-{os.getpid()}-{time.time_ns():x}", TcpEndpoint(tcp("127.0.0.1"), curve_server))
    zap_authenticator.log_refusals_of(receiver.socket)
    yield receiver
    zap_authenticator.close()
    receiver.close()


def knock(tcp_endpoint: ResultReceiver, curve_client: CurveClient | None) -> "zmq.Socket[bytes]":
    """Send a word to the endpoint, unless it has refused already: then the socket has no peer to send it to."""
    push = open_socket(zmq.PUSH, codec.RESULT.max_bytes)
    if curve_client is not None:
        curve_client.apply(push)
    push.connect(tcp_endpoint.remote_endpoint)
    with suppress(zmq.Again):
        push.send(b"a word")
    return push


def frames(tcp_endpoint: ResultReceiver) -> list[bytes]:
    return [tcp_endpoint.socket.recv() for _ in iter(lambda: tcp_endpoint.socket.poll(500), 0)]


def test_who_knows_the_secret_is_heard(tcp_endpoint: ResultReceiver, keyring: Keyring) -> None:
    pushes = [knock(tcp_endpoint, keyring.curve_client(rank, rank_role(0))) for rank in (1, 2)]
    assert frames(tcp_endpoint) == [b"a word"] * 2
    for push in pushes:
        push.close(linger=0)


def test_strangers_are_refused_and_told_of_once(
    tcp_endpoint: ResultReceiver, keyring: Keyring, caplog: pytest.LogCaptureFixture
) -> None:
    server = keyring.key_pair(rank_role(0)).public
    strangers = {
        "no key": None,
        "a key of its own": CurveClient(KeyPair(*zmq.curve_keypair()), server),
        "a rank that is not of this world": keyring.curve_client(WORLD, rank_role(0)),
        "another secret": Keyring.open(None).curve_client(1, rank_role(0)),
        "another role of ours": CurveClient(keyring.key_pair(FRONTEND), server),
    }
    with caplog.at_level(logging.WARNING, "tpserve.wire.curve"):
        pushes = [knock(tcp_endpoint, curve_client) for curve_client in strangers.values() for _ in range(3)]
        assert frames(tcp_endpoint) == []
        deadline_s = time.monotonic() + 10.0
        while len(caplog.records) < 2 and time.monotonic() < deadline_s:
            time.sleep(0.05)
        time.sleep(0.6)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == len(set(told)) == 2, told
    assert any("from 127.0.0.1: its key is not of this cluster" in line for line in told)
    assert any("knows no key of ours" in line for line in told)
    friend = knock(tcp_endpoint, keyring.curve_client(1, rank_role(0)))
    assert frames(tcp_endpoint) == [b"a word"], "the service goes on"
    for push in (*pushes, friend):
        push.close(linger=0)


def test_random_bytes_change_nothing(tcp_endpoint: ResultReceiver, keyring: Keyring) -> None:
    random, port = Random(7), int(tcp_endpoint.remote_endpoint.rpartition(":")[2])
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(15) + bytes(32)
    for beginning in (b"", greeting):
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", port)) as raw:
                try:
                    raw.sendall(beginning + random.randbytes(10_000))
                except OSError:
                    pass  # it was turned away before the end
    friend = knock(tcp_endpoint, keyring.curve_client(1, rank_role(0)))
    assert frames(tcp_endpoint) == [b"a word"]
    friend.close(linger=0)


def test_a_conversation_recorded_and_played_again_is_not_heard(tcp_endpoint: ResultReceiver, keyring: Keyring) -> None:
    port = int(tcp_endpoint.remote_endpoint.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", 0)) as between:
        push = open_socket(zmq.PUSH, codec.RESULT.max_bytes)
        keyring.curve_client(1, rank_role(0)).apply(push)
        push.connect(f"tcp://127.0.0.1:{between.getsockname()[1]}")
        push.send(b"a word")
        near = between.accept()[0]
        with near, socket.create_connection(("127.0.0.1", port)) as far:
            said = pass_on(near, far)
    assert frames(tcp_endpoint) == [b"a word"], "the recorder stood between two who know each other"
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(said)
        assert frames(tcp_endpoint) == []
    push.close(linger=0)


def pass_on(near: socket.socket, far: socket.socket) -> bytes:
    """Pass bytes both ways for a second; returns what the near side said."""
    said, deadline_s = bytearray(), time.monotonic() + 1.0
    near.settimeout(0.02)
    far.settimeout(0.02)
    while time.monotonic() < deadline_s:
        for source, sink in ((near, far), (far, near)):
            try:
                part = source.recv(65536)
            except TimeoutError:
                continue
            said += part if source is near else b""
            sink.sendall(part)
    return bytes(said)


def test_no_socket_of_ours_opens_tcp_without_keys() -> None:
    listening, dialling = (open_socket(kind, 1) for kind in (zmq.PULL, zmq.PUSH))
    with pytest.raises(AssertionError, match="needs CURVE keys"):
        bind(listening, tcp("127.0.0.1"))
    with pytest.raises(AssertionError, match="needs CURVE keys"):
        connect(dialling, "tcp://127.0.0.1:1")
    with pytest.raises(AssertionError, match="needs CURVE keys"):
        ResultSender("tcp://127.0.0.1:1")
    listening.close()
    dialling.close()


def test_keys_are_of_secret_and_role(tmp_path: Path) -> None:
    path = str(tmp_path / "secret")
    write_secret(path)
    one, again = Keyring.read(path), Keyring.open(path)
    assert one.key_pair("rank 1") == again.key_pair("rank 1") != one.key_pair("rank 2"), "a restarted rank has the same key"
    assert one.proof == again.proof
    assert Keyring.open(None).key_pair("rank 1") != one.key_pair("rank 1")
    assert zmq.curve_public(one.key_pair("rank 1").private) == one.key_pair("rank 1").public


def test_a_secret_is_written_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_secret(str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UserError, match="is there already"):
        write_secret(str(path))
    with pytest.raises(UserError, match="cannot write .*/nowhere/secret: No such file"):
        write_secret(str(tmp_path / "nowhere" / "secret"))


def test_a_secret_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    with pytest.raises(UserError, match="cannot be read: No such file"):
        Keyring.read(str(path))
    path.write_bytes(b"\xff no base64")
    path.chmod(0o600)
    with pytest.raises(UserError, match="holds no secret: make one with `tpserve secret"):
        Keyring.read(str(path))
    path.write_text("c2hvcnQ=\n")
    with pytest.raises(UserError, match="holds 5 bytes and needs 32"):
        Keyring.read(str(path))
    path.write_text(base64.b64encode(b"ab" * 16).decode())
    with pytest.raises(UserError, match="holds a secret that can be guessed: make one with `tpserve secret"):
        Keyring.read(str(path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is no file: every rank of the node reads it"):
        Keyring.read(str(tmp_path / "pipe"))
    path.chmod(0o644)
    with pytest.raises(UserError, match=r"can be read or changed by others \(mode 0644\): run `chmod 600"):
        Keyring.read(str(path))


def test_nodes_find_out_whose_secret_is_another(tmp_path: Path) -> None:
    mine, theirs = str(tmp_path / "mine"), str(tmp_path / "theirs")
    write_secret(mine)
    write_secret(theirs)
    connect_info = Keyring.read(mine).connect_info("tcp://10.0.0.1:1", with_secret=False)
    assert connect_info.keyring(mine).proof == connect_info.proof and not connect_info.secret
    with pytest.raises(UserError, match="holds another secret than node 0's"):
        connect_info.keyring(theirs)
    with pytest.raises(UserError, match="was given on node 0 and not here"):
        connect_info.keyring(None)
    drawn = Keyring.open(None)
    told: ConnectInfo = drawn.connect_info("tcp://10.0.0.1:1", with_secret=True)
    assert told.keyring(None).proof == drawn.proof
    with pytest.raises(UserError, match="was given here and not on node 0"):
        told.keyring(mine)


def test_who_is_refused_is_told_and_never_waits(tcp_endpoint: ResultReceiver, keyring: Keyring) -> None:
    sender = ResultSender(tcp_endpoint.remote_endpoint, keyring.curve_client(WORLD, rank_role(0)))
    result = StepResult(0, 0, b"")
    with pytest.raises(EngineFailure, match="refuses this process: its key is of another run or cluster"):
        for _ in range(50):
            sender.send(result)
            time.sleep(0.05)
    sender.close()
