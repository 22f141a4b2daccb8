"""Clients that are slow, say half a request, read nothing, or send far too much: others are served meanwhile, without a gap."""

import http.client
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.http import checks
from tests.http.inprocess import Server, serving, until
from tests.http.loop_gaps import without_gap

BODY = b'{"prompt": "The red fox", "max_tokens": 3, "ignore_eos": true}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
REQUEST = HEAD + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(BODY) + BODY
LARGE = 100 << 20
PIECE = 1 << 20
OTHERS = 5


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("model")) as server:
        yield server


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def answer_of(connection: socket.socket) -> tuple[int, bytes]:
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer.status, answer.read()


def serve_others(server: Server) -> None:
    for _ in range(OTHERS):
        assert checks.Client(server.url).completion(max_tokens=3, ignore_eos=True).status == 200


def test_one_byte_at_a_time(server: Server) -> None:
    def send() -> None:
        with ExitStack() as stack:
            connections = [stack.enter_context(connect(server)) for _ in range(20)]
            for byte in REQUEST:
                for connection in connections:
                    connection.sendall(bytes([byte]))
            serve_others(server)
            for connection in connections:
                status, body = answer_of(connection)
                assert status == 200 and b'"finish_reason":"length"' in body

    without_gap(server, send)


@pytest.mark.parametrize(
    "said",
    [b"", b"P", HEAD, REQUEST[: -len(BODY)], REQUEST[:-1], HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"],
    ids=["nothing", "one byte", "half a head", "no body", "all but a byte", "half a chunk"],
)
def test_half_a_request(server: Server, said: bytes) -> None:
    def send() -> None:
        with ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(connect(server)).sendall(said)
            serve_others(server)

    without_gap(server, send)
    until(lambda: server.request_table.num_open == 0)


@pytest.mark.parametrize("cut", [len(HEAD), len(REQUEST) - 1, len(REQUEST)], ids=["in the head", "in the body", "after it"])
def test_a_client_that_closes_its_side(server: Server, cut: int) -> None:
    """It gets the answer to a whole request or nothing; the server lets go of its connection."""

    def send() -> None:
        with connect(server) as connection:
            connection.sendall(REQUEST[:cut])
            connection.shutdown(socket.SHUT_WR)
            serve_others(server)
            got = b""
            while piece := connection.recv(65536):
                got += piece
            assert not got or got.startswith(b"HTTP/1.1 ")

    without_gap(server, send)
    until(lambda: server.request_table.num_open == 0)


def refused_large(server: Server, head: bytes, wrap: Callable[[bytes], bytes]) -> tuple[int, int]:
    """The status and the bytes that the server took of a body of 100 MB."""
    taken = 0
    with connect(server) as connection:
        connection.sendall(head)
        try:
            for _ in range(LARGE // PIECE):
                connection.sendall(wrap(b" " * PIECE))
                taken += PIECE
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has heard enough
        try:
            status, _ = answer_of(connection)
        except (ConnectionResetError, http.client.BadStatusLine):
            status = 413  # it closed while we sent; the answer was lost on the way
    return status, taken


def test_a_hundred_megabytes(server: Server) -> None:
    for head, wrap in (
        (HEAD + b"Content-Length: %d\r\n\r\n" % LARGE, bytes),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", lambda piece: b"%x\r\n%b\r\n" % (len(piece), piece)),
    ):

        def send(head: bytes = head, wrap: Callable[[bytes], bytes] = wrap) -> int:
            with ThreadPoolExecutor() as pool:
                others = pool.submit(serve_others, server)
                status, _ = refused_large(server, head, wrap)
                others.result()
            return status

        assert without_gap(server, send) == 413


def test_clients_that_read_nothing(server: Server) -> None:
    body = b'{"prompt": "The red fox", "max_tokens": 200, "ignore_eos": true, "stream": true, "logprobs": 20}'

    def send() -> None:
        with ExitStack() as stack:
            for _ in range(4):
                connection = stack.enter_context(connect(server))
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            time.sleep(0.2)
            serve_others(server)

    without_gap(server, send)
    until(lambda: server.request_table.num_open == 0)
