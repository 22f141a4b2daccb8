"""Limits of keys and deadlines, as clients of every API see them."""

import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.http import checks
from tests.http.inprocess import Server, serving, until
from tpserve.frontend import api_keys

LONG: dict[str, Any] = {"max_tokens": 200, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "The red fox"}]
CALLS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "The red fox", "max_tokens": 4, "ignore_eos": True},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 4, "ignore_eos": True},
    "/v1/responses": {"input": "The red fox", "max_output_tokens": 4, "ignore_eos": True, "store": False},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 4, "ignore_eos": True},
}
KEYS = """plain
one name=one max_parallel_requests=1
few name=few requests_per_minute=4
tok name=tok tokens_per_minute=90
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("model")
    (directory / "keys").write_text(KEYS)
    with serving(directory, api_key_file=str(directory / "keys"), api_key="own") as server:
        yield server


def client(server: Server, key: str, **headers: str) -> checks.Client:
    return checks.Client(server.url, {"Authorization": f"Bearer {key}", **headers})


@dataclass
class OpenStream:
    """A completion's stream, whose response has begun; `close` leaves it."""

    connection: http.client.HTTPConnection
    response: http.client.HTTPResponse

    def close(self) -> None:
        self.response.close()
        self.connection.close()

    def rest(self) -> bytes:
        data = self.response.read()
        self.close()
        return data


def opened(server: Server, headers: dict[str, str], **body: Any) -> OpenStream:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    connection.request("POST", "/v1/completions", json.dumps(body | {"stream": True}), headers)
    return OpenStream(connection, connection.getresponse())


def metric(server: Server, name: str, key_name: str) -> float:
    lines = checks.Client(server.url).get("/metrics").body.decode().splitlines()
    (value,) = (line.rpartition(" ")[2] for line in lines if line.startswith(f'tpserve:{name}{{api_key_name="{key_name}"'))
    return float(value)


def test_one_at_a_time_until_the_stream_has_ended(server: Server) -> None:
    server.engine.paused = True
    stream = opened(server, {"Authorization": "Bearer one"}, prompt="a", **LONG)
    for path, body in CALLS.items():
        reply = client(server, "one").post(path, **body)
        assert reply.status == 429 and reply.headers["retry-after"] == "1", reply.body
        error = reply.json["error"]
        assert error["message"].startswith("Rate limit reached for one on parallel requests: Limit 1, Used 1, Requested 1. ")
        assert error["type"] == "rate_limit_error" and (path == "/v1/messages" or error["code"] == "rate_limit_exceeded")
    assert client(server, "one").post("/tokenize", prompt="a").status == 200
    assert client(server, "one").post("/v1/messages/count_tokens", messages=MESSAGES).status == 200
    assert metric(server, "key_requests_running", "one") == 1
    server.engine.paused = False
    assert client(server, "plain").completion(max_tokens=1).status == 200, "others are served"
    assert client(server, "own").completion(max_tokens=1).status == 200
    assert stream.rest().endswith(b"data: [DONE]\n\n")
    until(lambda: metric(server, "key_requests_running", "one") == 0)
    assert metric(server, "key_generation_tokens_total", "one") == 200
    server.engine.paused = True
    stream = opened(server, {"Authorization": "Bearer one"}, prompt="a", **LONG)
    stream.close()
    until(lambda: metric(server, "key_requests_running", "one") == 0)
    server.engine.paused = False


def test_requests_a_minute_over_all_apis(server: Server) -> None:
    for left, (path, body) in zip((3, 2, 1, 0), CALLS.items(), strict=True):
        reply = client(server, "few").post(path, **body)
        assert reply.status == 200 and reply.headers["x-ratelimit-remaining-requests"] == str(left), (path, reply.body)
        assert reply.headers["x-ratelimit-limit-requests"] == "4" and reply.headers["x-ratelimit-reset-requests"].endswith("s")
    assert client(server, "few").completion(max_tokens=-1).status == 400, "what is wrong does not count"
    reply = client(server, "few").completion(max_tokens=1)
    assert reply.status == 429 and 1 <= int(reply.headers["retry-after"]) <= 61
    assert "requests per min (RPM): Limit 4, Used 4, Requested 1" in reply.json["error"]["message"]
    assert "x-ratelimit-limit-requests" not in client(server, "few").get("/v1/models").headers
    assert metric(server, "key_requests_total", "few") == 4


def test_prompts_and_outputs_share_a_budget(server: Server) -> None:
    prompt = list(range(5, 35))
    for stream in (False, True):
        reply = client(server, "tok").completion(prompt=prompt, max_tokens=10, ignore_eos=True, stream=stream)
        assert reply.status == 200
    until(lambda: metric(server, "key_requests_running", "tok") == 0)
    reply = client(server, "tok").completion(prompt=prompt, max_tokens=1)
    assert reply.status == 429 and "Limit 90, Used 80, Requested 30" in reply.json["error"]["message"]
    assert reply.headers["x-ratelimit-remaining-tokens"] == "10" and "x-should-retry" not in reply.headers
    reply = client(server, "tok").completion(prompt=list(range(5, 96)), max_tokens=1)
    assert reply.status == 429 and reply.headers["x-should-retry"] == "false" and "retry-after" not in reply.headers
    assert client(server, "tok").completion(prompt=[5] * 10, max_tokens=5, ignore_eos=True).status == 200
    assert client(server, "tok").completion(prompt=[5], max_tokens=1).status == 429


def test_background_answers_count_until_their_end_and_a_changed_file_at_the_next_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_keys, "LOOK_S", 0.0)
    (keys := tmp_path / "keys").write_text("k name=n max_parallel_requests=2\nother")
    with serving(tmp_path, api_key_file=str(keys)) as server:
        server.engine.paused = True
        for _ in range(2):
            reply = client(server, "k").post("/v1/responses", input="a", background=True, ignore_eos=True, max_output_tokens=9)
            assert reply.status == 200
        resumable = {"prompt": "a", "stream": True, **LONG}
        assert client(server, "k", **{"X-Resumable": "1"}).post("/v1/completions", **resumable).status == 429
        keys.write_text("k name=n max_parallel_requests=3\n")
        assert client(server, "other").get("/v1/models").status == 401
        assert client(server, "k").completion(background=True).status == 202
        assert client(server, "k").completion(max_tokens=1).status == 429
        keys.write_text("k name=n\n")
        assert client(server, "k").completion(background=True).status == 202
        server.engine.paused = False
        until(lambda: metric(server, "key_requests_running", "n") == 0)


def test_deadlines(tmp_path: Path) -> None:
    with serving(tmp_path, request_timeout=30.0, resume_window=60.0) as server:
        bystander = opened(server, {}, prompt="b", **LONG)
        server.engine.paused = True
        quick = checks.Client(server.url, {"X-Request-Timeout": "0.2"})
        for path, body in CALLS.items():
            reply = quick.post(path, **body)
            assert reply.status == 504 and reply.headers["x-should-retry"] == "false", (path, reply.body)
            error = reply.json["error"]
            assert error["type"] == "timeout_error" and "X-Request-Timeout" in error["message"]
        queued = quick.completion(stream=True, **LONG)
        assert queued.status == 200 and b'"code":"request_timeout"' in queued.body and queued.body.endswith(b"data: [DONE]\n\n")
        until(lambda: server.request_table.num_open == 1)
        server.engine.paused = False
        server.engine.step_s = 0.02
        began_s = time.monotonic()
        cut = quick.completion(stream=True, max_tokens=200, ignore_eos=True)
        assert 0.15 < time.monotonic() - began_s < 2 and b'"text"' in cut.body and b"request_timeout" in cut.body
        kept = quick.post("/v1/responses", input="a", background=True, ignore_eos=True, max_output_tokens=200).json["id"]
        until(lambda: quick.get(f"/v1/responses/{kept}").json["status"] == "failed")
        server.engine.step_s = 0.001
        assert bystander.rest().count(b'"finish_reason":"length"') == 1, "nobody else has lost anything"
        until(lambda: server.engine.scheduler.idle)
        for wrong in ("0", "-1", "soon", "nan", "inf", "1e9", ""):
            reply = checks.Client(server.url, {"X-Request-Timeout": wrong}).completion(max_tokens=1)
            checks.is_error(reply, 400, param="X-Request-Timeout", code="invalid_value")
        assert quick.completion(max_tokens=1).status == 200


def test_the_servers_own_deadline(tmp_path: Path) -> None:
    with serving(tmp_path, request_timeout=0.1) as server:
        server.engine.paused = True
        checks.is_error(checks.Client(server.url).completion(max_tokens=1), 504, code="request_timeout", says="--request-timeout")
        longer = opened(server, {"X-Request-Timeout": "20"}, prompt="a", max_tokens=3, ignore_eos=True)
        time.sleep(0.2)
        server.engine.paused = False
        assert b"error" not in longer.rest()
