"""What operators may do: pause and go on, end requests, empty the prefix cache."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.http import checks
from tests.http.inprocess import Server, serving, until
from tests.http.test_limits import LONG, opened

Json = dict[str, Any]
PROMPT = list(range(5, 45))


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("model"), step_s=0.005) as server:
        yield server


def post(server: Server, path: str, status: int = 200, **body: Any) -> Json:
    reply = checks.Client(server.url).post(path, **body)
    assert reply.status == status, reply.body
    return dict(reply.json)


def text_of(reply: checks.Reply) -> str:
    return str(reply.json["choices"][0]["text"])


def states(server: Server) -> dict[str, tuple[int, str]]:
    client = checks.Client(server.url)
    return {path: ((reply := client.get(path)).status, reply.json["state"]) for path in ("/livez", "/readyz", "/health")}


def test_a_pause_keeps_streams_open_and_changes_no_token(server: Server) -> None:
    client = checks.Client(server.url)
    request: Json = {"prompt": PROMPT, "seed": 3, **LONG}
    expected = text_of(client.post("/v1/completions", **request))
    stream = opened(server, {}, **request)
    lines = [stream.response.readline() for _ in range(5)]
    assert post(server, "/pause") == {"status": "paused", "mode": "keep", "num_aborted": 0}
    assert server.engine.scheduler.paused
    steps = server.engine.scheduler.stats().steps
    with ThreadPoolExecutor() as pool:
        queued = pool.submit(client.post, "/v1/completions", **request)
        until(lambda: server.request_table.num_open == 2)
        time.sleep(0.1)
        assert server.engine.scheduler.stats().steps == steps and not queued.done()
        assert client.get("/is_paused").json == {"is_paused": True, "mode": "keep"}
        assert states(server) == {"/livez": (200, "paused"), "/readyz": (503, "paused"), "/health": (200, "paused")}
        assert client.get("/readyz").json["error"]["code"] == "paused"
        assert post(server, "/resume") == {"status": "resumed"}
        assert text_of(queued.result()) == expected
    events = [line[6:] for line in (b"".join(lines) + stream.rest()).split(b"\n\n") if line.startswith(b"data: {")]
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == expected
    assert client.get("/is_paused").json == {"is_paused": False, "mode": None}
    assert states(server)["/readyz"] == (200, "running")
    post(server, "/resume")  # once more is no error


def test_waiting_lets_finish_what_has_begun_and_begins_nothing(server: Server) -> None:
    client = checks.Client(server.url)
    begun = opened(server, {}, prompt="a", **LONG)
    until(lambda: server.engine.scheduler.stats().running == 1)
    with ThreadPoolExecutor() as pool:
        pausing = pool.submit(client.send, "POST", "/pause?mode=wait")
        until(lambda: client.get("/is_paused").json["mode"] == "wait")
        late = pool.submit(client.completion, max_tokens=3)
        assert begun.rest().endswith(b"data: [DONE]\n\n")
        assert pausing.result().json["mode"] == "wait"
        until(lambda: server.engine.scheduler.stats().waiting == 1)
        time.sleep(0.05)
        assert not late.done()
        client.send("POST", "/resume")
        assert late.result().status == 200


def test_who_waits_for_a_pause_hears_of_its_end(server: Server) -> None:
    begun = opened(server, {}, prompt="a", **LONG)
    until(lambda: server.engine.scheduler.stats().running == 1)
    client = checks.Client(server.url)
    with ThreadPoolExecutor() as pool:
        pausing = pool.submit(client.send, "POST", "/pause?mode=wait")
        until(lambda: client.get("/is_paused").json["mode"] == "wait")
        client.send("POST", "/resume")
        assert pausing.result().json["mode"] is None
    begun.close()


def test_aborting_by_id_and_all(server: Server) -> None:
    client = checks.Client(server.url)
    server.engine.paused = True
    streams = [opened(server, {"X-Request-Id": f"r{number}"}, prompt="a", **LONG) for number in range(3)]
    background = post(server, "/v1/responses", input="a", background=True, ignore_eos=True)["id"]
    checks.is_error(client.post("/abort_request", rid="none"), 404, code="request_not_found")
    for wrong in ({}, {"rid": "r0", "abort_all": True}, {"rid": 3}):
        assert client.post("/abort_request", **wrong).status == 400
    assert post(server, "/abort_request", rid="r0") == {"num_aborted": 1}
    assert b'"code":"request_aborted"' in streams[0].rest()
    assert post(server, "/abort_request", rid=["cmpl-r1", background, "none"]) == {"num_aborted": 2}
    assert b"request_aborted" in streams[1].rest()
    until(lambda: client.get(f"/v1/responses/{background}").json["status"] == "failed")
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(client.completion, max_tokens=3)
        until(lambda: server.request_table.num_open == 2)
        assert post(server, "/abort_request", abort_all=True) == {"num_aborted": 2}
        assert whole.result().status == 503 and whole.result().headers["x-should-retry"] == "false"
    assert b"request_aborted" in streams[2].rest() and post(server, "/abort_request", abort_all=True) == {"num_aborted": 0}
    server.engine.paused = False
    until(lambda: server.engine.scheduler.idle)


def test_a_pause_that_aborts(server: Server) -> None:
    stream = opened(server, {}, prompt="a", **LONG)
    reply = checks.Client(server.url).send("POST", "/pause?mode=abort&clear_cache=true")
    assert reply.json == {"status": "paused", "mode": "keep", "num_aborted": 1} and b"request_aborted" in stream.rest()
    for query, param in (("mode=never", "mode"), ("clear_cache=perhaps", "clear_cache")):
        checks.is_error(checks.Client(server.url).send("POST", f"/pause?{query}"), 400, param=param)


def test_nothing_is_found_in_the_prefix_cache_after_a_reset(server: Server) -> None:
    client = checks.Client(server.url)

    def cached() -> int:
        reply = client.completion(prompt=PROMPT, max_tokens=3)
        return int(reply.json["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert (cached(), cached()) == (0, 32)
    running = opened(server, {}, prompt=PROMPT, seed=3, **LONG)
    until(lambda: server.engine.scheduler.stats().running == 1)
    assert post(server, "/reset_prefix_cache") == {"status": "reset"}
    assert (cached(), cached()) == (0, 32), "also while a request with this prompt runs"
    assert running.rest().count(b'"finish_reason":"length"') == 1


@pytest.mark.parametrize("path", ["/pause", "/resume", "/abort_request", "/reset_prefix_cache", "/is_paused"])
def test_the_admin_key_alone_opens_them(path: str, tmp_path: Path) -> None:
    method = "GET" if path == "/is_paused" else "POST"
    body = None if method == "GET" else b'{"abort_all": true}'
    with serving(tmp_path, api_key="k", admin_api_key="admin") as server:
        for key, status in (("k", 401), ("", 401), ("admin", 200)):
            assert checks.Client(server.url, {"Authorization": f"Bearer {key}"}).send(method, path, body).status == status
    with serving(tmp_path, api_key="k", exposed=True) as server:
        reply = checks.Client(server.url, {"Authorization": "Bearer k"}).send(method, path, body)
        checks.is_error(reply, 403, code="admin_key_not_set")
