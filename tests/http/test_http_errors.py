"""Whatever arrives on the port, the answer to it is HTTP with the API's error body."""

import http.client
import json
import socket
from collections.abc import Iterator

import pytest

from tests.http import checks
from tests.http.inprocess import Server, serving

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("model")) as server:
        yield server


def raw(server: Server, data: bytes) -> checks.Reply:
    """What comes back for these bytes."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(data)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return checks.Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())


WRONG: dict[str, tuple[bytes, int]] = {
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "garbage": (b"\xff\xfe\x00garbage\r\n\r\n", 400),
    "another version": (b"GET / HTTP/9\r\n\r\n", 400),
    "a header too large": (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 20_000 + b"\r\n\r\n", 400),
    "too many headers": (b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: 1\r\n" * 1000 + b"\r\n", 400),
    "a long path": (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a bad header": (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nbad header\r\n\r\n", 400),
    "Content-Length of letters": (HEAD + b"Content-Length: x\r\n\r\n", 400),
    "Content-Length below zero": (HEAD + b"Content-Length: -1\r\n\r\n", 400),
    "two lengths": (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
    "length and chunks": (HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "a bad chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    "a bad later chunk": (HEAD + b'Transfer-Encoding: chunked\r\n\r\n2\r\n{"\r\nzz\r\n', 400),
    "an unknown transfer encoding": (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", 400),
    "an unknown expectation": (HEAD + b"Expect: miracles\r\nContent-Length: 2\r\n\r\n{}", 417),
    "an unknown method": (b"BREW /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "no such route": (b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
    "another method": (b"PUT /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 405),
    "a body too large": (HEAD + b"Content-Length: 99999999\r\nConnection: close\r\n\r\n" + b" " * (9 << 20), 413),
    "zipped": (HEAD + b"Content-Encoding: gzip\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}", 415),
    "brotli": (HEAD + b"Content-Encoding: br\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}", 415),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_error_body_for_everything(server: Server, name: str, caplog: pytest.LogCaptureFixture) -> None:
    data, status = WRONG[name]
    reply = raw(server, data)
    checks.is_error(reply, status)
    assert int(reply.headers["content-length"]) == len(reply.body) and reply.headers["server"].startswith("tpserve/")
    assert len(json.loads(reply.body)["error"]["message"]) < 300 and "Traceback" not in caplog.text
    assert checks.Client(server.url).get("/livez").status == 200


NAMES = [
    *("self", "messages", "add_generation_prompt", "tools", "bos_token", "eos_token", "raise_exception", "strftime_now"),
    *("range", "namespace", "loop", "continue_final_message"),
]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_client_takes_the_place_of_a_templates(server: Server, name: str) -> None:
    client = checks.Client(server.url)
    for reply in (
        client.chat(chat_template_kwargs={name: "Z"}),
        client.post("/tokenize", messages=checks.MESSAGES, chat_template_kwargs={name: "Z"}),
    ):
        checks.is_error(reply, 400, param="chat_template_kwargs", says=name)


def test_other_names_are_only_names(server: Server) -> None:
    client = checks.Client(server.url)
    names = {"enable_thinking": False, "variables": 1, "source": 2, "args": 3, "kwds": 4, "a b": 5, "": 6, "__class__": 7, "é": 8}
    assert client.chat(chat_template_kwargs=names, max_tokens=1).status == 200


def test_errors_repeat_little_of_what_they_were_sent(server: Server) -> None:
    client, long = checks.Client(server.url), "Z" * 3000
    for reply in (
        client.chat(messages=[{"role": long, "content": "a"}]),
        client.chat(messages=[{"role": "user", "content": [{"type": long}]}]),
        client.completion(model=long),
        client.completion(prompt=[int("9" * 39)]),
        client.completion(max_tokens=-int("9" * 39)),
        client.completion(logit_bias={long: 1}),
        client.chat(chat_template_kwargs={"messages": long}),
        client.get(f"/{long}"),
        client.send("POST", "/v1/completions", b"{}", {"Content-Encoding": long}),
        client.send(long, "/v1/completions"),
    ):
        assert 400 <= reply.status < 500 and reply.body.count(b"Z") <= 200, reply.body


def test_a_very_small_temperature_is_greedy(server: Server) -> None:
    client = checks.Client(server.url)
    for asked, meant in ((1e-12, 0.0), (9.9e-6, 0.0), (1e-5, 1e-5), (0, 0.0)):
        assert client.completion(temperature=asked, max_tokens=1).status == 200
        assert server.engine.requests[-1].request.params.temperature == meant
