"""Answers that outlive their connections, over real sockets: what a client gets that comes again, and who gets nothing."""

import asyncio
import http.client
import json
import logging
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.http import checks
from tests.http.checks import Json
from tests.http.inprocess import Server, serving, until
from tests.unit.test_chat_tools import SPEC, TEXT, F
from tpserve.frontend import streams
from tpserve.frontend.openai import sse
from tpserve.frontend.openai.chat_answer import ChatAnswers
from tpserve.response_template.template import ResponseTemplate
from tpserve.types.messages import Delta, Done

ASK: Json = {"max_tokens": 24, "ignore_eos": True, "temperature": 1, "seed": 3, "stream": True}
USAGE = {"stream_options": {"include_usage": True}}
CASES: list[tuple[str, Json]] = [
    ("/v1/completions", {"prompt": "The red fox"}),
    ("/v1/completions", {"prompt": "The red fox", "n": 3, "logprobs": 2, "return_token_ids": True} | USAGE),
    ("/v1/completions", {"prompt": ["The red", "The old mill"], "n": 2, "echo": True, "logprobs": 1}),
    ("/v1/completions", {"prompt": "The", "echo": True, "stop": ["zz", "cat"], "ignore_eos": False}),
    ("/v1/completions", {"prompt": "The", "n": 2, "stream_options": {"continuous_usage_stats": True}}),
    ("/v1/chat/completions", {"messages": checks.MESSAGES, "colour": "blue"} | USAGE),
    ("/v1/chat/completions", {"messages": checks.MESSAGES, "n": 2, "logprobs": True, "top_logprobs": 2}),
]


class Connection:
    """One connection of a client that may be cut anywhere."""

    def __init__(self, url: str, method: str, path: str, body: Json | None = None, **headers: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self._connection.request(method, path, None if body is None else json.dumps(body).encode(), names)
        self._answer = self._connection.getresponse()
        self.status, self.headers = self._answer.status, {k.lower(): v for k, v in self._answer.getheaders()}
        self.id = self.headers.get("x-stream-id", "")

    def read(self, size: int | None = None) -> bytes:
        """At least a byte and at most `size`; all until the end without it."""
        return self._answer.read() if size is None else self._answer.read1(size)

    def cut(self) -> None:
        self._answer.close()
        self._connection.close()


def post(server: Server, path: str, body: Json, **headers: str) -> Connection:
    return Connection(server.url, "POST", path, ASK | body, X_Resumable="1", **headers)


def again(server: Server, id: str, after: str | None = None, key: str | None = None) -> Connection:
    headers = {} if after is None else {"Last_Event_ID": after}
    return Connection(server.url, "GET", f"/v1/streams/{id}", **headers | ({"Authorization": f"Bearer {key}"} if key else {}))


def parsed(data: bytes) -> list[tuple[str, str]]:
    """(id, data) of each whole event; comments and what is cut off at the end count for nothing, as in the specification."""
    whole = data.decode().split("\n\n")[:-1]
    matches = [re.fullmatch(r"id: (\d+(?:\.\d+)?)\ndata: (.*)", part) for part in whole if not part.startswith(":")]
    assert all(matches), whole
    return [(match[1], match[2]) for match in matches if match]


def number(id: str) -> tuple[int, int]:
    tokens, _, rest = id.partition(".")
    return int(tokens), int(rest or 0)


def said(data: list[str]) -> Any:
    """All that a stream says but its id and time: of each choice the values of its chunks joined, then the rest."""
    *chunks, last = data
    assert last == "[DONE]"
    choices: dict[int, list[Any]] = {}
    rest = []
    for chunk in map(json.loads, chunks):
        for name in ("id", "created"):
            chunk.pop(name)
        for choice in chunk.pop("choices"):
            flat(choices.setdefault(choice["index"], []), choice)
        if chunk.get("usage"):
            chunk["usage"]["prompt_tokens_details"] = None  # the first to ask fills the cache
        rest.append(chunk)
    return choices, rest[0].get("warnings"), rest[-1].get("usage")


def flat(into: list[Any], choice: Json) -> None:
    """Join what a choice says with what it has said, however it was cut into chunks."""
    logprobs = choice.get("logprobs") or {}
    into.append(
        {
            "text": choice.get("text") or choice.get("delta", {}).get("content") or "",
            "ids": choice.get("token_ids", []),
            "entries": logprobs.get("content") or list(zip(*map(logprobs.get, logprobs), strict=True)) if logprobs else [],
            "end": [choice[name] for name in ("finish_reason", "stop_reason") if choice.get(name) is not None],
        }
    )
    if len(into) > 1:
        last = into.pop()
        into[0] = {name: into[0][name] + last[name] for name in last}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("model"), max_queued_requests=300) as server:
        yield server


@pytest.mark.parametrize(("path", "body"), CASES)
def test_the_answer_is_that_of_an_ordinary_request_and_goes_on_behind_every_event(server: Server, path: str, body: Json) -> None:
    plain = Connection(server.url, "POST", path, ASK | body)
    expected = [part.removeprefix("data: ") for part in plain.read().decode().split("\n\n")[:-1]]
    assert not plain.id
    first = post(server, path, body)
    whole = first.read()
    events = parsed(whole)
    ids = [number(id) for id, _ in events]
    assert ids == sorted(set(ids)) and len(first.id) >= 22 and ids[-1][0] <= 24 * 4
    assert said([data for _, data in events]) == said(expected)
    parts = [part + b"\n\n" for part in whole.split(b"\n\n")[:-1]]
    for index, (id, _) in enumerate(events):
        rest = Connection(server.url, "GET", f"/v1/streams/{first.id}?from={id}")
        assert rest.read() == b"".join(parts[index + 1 :])
        assert rest.status == (200 if index + 1 < len(events) else 204)
    assert again(server, first.id).read() == again(server, first.id, "0").read() == whole


@pytest.mark.parametrize(("path", "body"), CASES[:2] + CASES[5:])
def test_a_client_that_is_cut_anywhere_loses_and_repeats_nothing(tmp_path: Path, path: str, body: Json) -> None:
    """Cut in the middle of events, at any byte, while the answer grows; then again and again."""
    chance = random.Random(1)
    with serving(tmp_path, step_s=0.004) as server:
        undisturbed = post(server, path, body)
        expected = parsed(undisturbed.read())
        connection, got, cuts = post(server, path, body), list[tuple[str, str]](), 0
        id = connection.id
        while not got or got[-1][1] != "[DONE]":
            data, size = b"", chance.randrange(1, 3000)
            while len(data) < size and (piece := connection.read(size - len(data))):
                data += piece
            connection.cut()
            got += parsed(data)
            cuts += 1
            connection = again(server, id, got[-1][0] if got else None)
            assert connection.status in (200, 204)
        assert cuts > 2
        assert [event[0] for event in got] == sorted({event[0] for event in got}, key=number)
        assert said([data for _, data in got]) == said([data for _, data in expected])
        assert again(server, id).read() == b"".join(f"id: {id}\ndata: {data}\n\n".encode() for id, data in got)


def test_an_answer_runs_on_without_a_client_and_several_may_read_it(tmp_path: Path) -> None:
    with serving(tmp_path, step_s=0.004) as server:
        first = post(server, "/v1/completions", {"prompt": "The", "max_tokens": 150})
        assert first.read(10)
        first.cut()
        readers = [again(server, first.id) for _ in range(4)]
        assert server.request_table.num_open == 1, "they attach while it runs"
        texts: list[bytes] = []
        threads = [threading.Thread(target=lambda reader=reader: texts.append(reader.read())) for reader in readers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(texts) == 4 and len(set(texts)) == 1 and parsed(texts[0])[-1][1] == "[DONE]"
        assert server.request_table.num_open == 0


def test_a_post_may_be_repeated(server: Server) -> None:
    """As fetch-event-source does, which sends the same request again with Last-Event-ID."""
    body = {"prompt": "The red fox"}
    first = post(server, "/v1/completions", body)
    whole = first.read()
    count = len(server.engine.requests)
    id = parsed(whole)[4][0]
    rest = post(server, "/v1/completions", body, X_Stream_Id=first.id, Last_Event_ID=id)
    assert rest.read() == b"".join(part + b"\n\n" for part in whole.split(b"\n\n")[5:-1]) and rest.id == first.id
    assert len(server.engine.requests) == count, "nothing is computed again"
    other = post(server, "/v1/completions", {"prompt": "Another"}, X_Stream_Id=first.id)
    assert other.status == 400 and b"X-Stream-Id" in other.read()
    assert post(server, "/v1/completions", body, X_Stream_Id="x" * 32).status == 404


def test_answers_in_the_background(server: Server) -> None:
    body: Json = {"prompt": "The red fox", "n": 2, "stream": False}
    expected = json.loads(Connection(server.url, "POST", "/v1/completions", ASK | body).read())
    server.engine.paused = True
    first = Connection(server.url, "POST", "/v1/completions", ASK | body | {"background": True})
    assert (first.status, json.loads(first.read())["status"]) == (202, "queued")
    assert first.headers["location"] == f"/v1/streams/{first.id}" and first.headers["retry-after"]
    assert again(server, first.id).status == 202 and server.request_table.num_open == 2
    server.engine.paused = False
    until(lambda: server.request_table.num_open == 0)
    answer = again(server, first.id)
    assert answer.status == 200 and answer.headers["content-type"].startswith("application/json")
    got = json.loads(answer.read())
    assert all(got[name] == expected[name] for name in ("choices", "model", "object"))
    assert got["usage"]["completion_tokens"] == 48
    wrong = again(server, first.id, "5")
    assert wrong.status == 400 and b"no events" in wrong.read()
    stream = Connection(server.url, "POST", "/v1/completions", ASK | body | {"background": True, "stream": True})
    assert stream.id and parsed(stream.read())[-1][1] == "[DONE]"


def test_what_makes_no_sense_is_said(server: Server) -> None:
    client = checks.Client(server.url, {"X-Resumable": "1"})
    warned = client.completion(max_tokens=1)
    assert "X-Resumable has no effect" in warned.json["warnings"][0] and "x-stream-id" not in warned.headers
    checks.is_error(
        client.send("POST", "/v1/completions", b'{"prompt": "a"}', {"X-Resumable": "maybe"}),
        400,
        param="X-Resumable",
        says="maybe",
    )
    id = post(server, "/v1/completions", {"prompt": "a", "max_tokens": 2}).id
    for wrong in ("x", "1.", "-1", "1.2.3", "9" * 40):
        reply = client.send("GET", f"/v1/streams/{id}", None, {"Last-Event-ID": wrong})
        checks.is_error(reply, 400, param="Last-Event-ID", code="invalid_value")
    checks.is_error(client.get(f"/v1/streams/{id}?from=one"), 400, param="from", says="one")
    assert client.send("HEAD", f"/v1/streams/{id}").status == 405


def test_a_server_may_keep_none(tmp_path: Path) -> None:
    with serving(tmp_path, resume_window=0) as server:
        stream = post(server, "/v1/completions", {"prompt": "a"})
        assert not stream.id and b"id: " not in stream.read()
        checks.is_error(checks.Client(server.url).completion(background=True), 400, param="background", says="--resume-window 0")


def test_another_key_sees_what_an_unknown_id_sees(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without --api-key the keys of clients are whatever they send, such as those that a proxy has checked."""
    with caplog.at_level(logging.INFO), serving(tmp_path, log_requests=True) as server:
        mine = post(server, "/v1/completions", {"prompt": "a"}, Authorization="Bearer mine")
        mine.read()
        unknown = again(server, "A" * 32, key="mine")
        nothing = unknown.read()
        assert unknown.status == 404 and b"stream_not_found" in nothing
        for key in ("other", "min", "mine2", None):
            for method in ("GET", "DELETE"):
                headers = {"Authorization": f"Bearer {key}"} if key else {}
                other = Connection(server.url, method, f"/v1/streams/{mine.id}", **headers)
                assert (other.status, other.read()) == (404, nothing) and not other.id
        assert again(server, mine.id, key="mine").status == 200
    assert mine.id not in caplog.text and "GET /v1/streams/{id}" in caplog.text


def test_ids_are_not_those_that_a_client_chooses(server: Server) -> None:
    ids = {post(server, "/v1/completions", {"prompt": "a", "max_tokens": 1}, X_Request_Id="mine").id for _ in range(5)}
    assert len(ids) == 5 and all(re.fullmatch(r"[\w-]{32}", id) for id in ids)
    assert again(server, "mine").status == 404


def test_nobody_comes_back(tmp_path: Path) -> None:
    """The engine is freed after the window, the reason stays for another one, then nothing is left."""
    with serving(tmp_path, resume_window=0.4) as server:
        server.engine.paused = True
        first = post(server, "/v1/chat/completions", {"messages": checks.MESSAGES})
        first.read(10)
        first.cut()
        time.sleep(0.2)
        assert server.request_table.num_open == 1
        second = again(server, first.id)
        time.sleep(0.5)
        assert server.request_table.num_open == 1, "while somebody reads, no time runs"
        second.cut()
        until(lambda: server.request_table.num_open == 0)
        server.engine.paused = False
        until(lambda: server.engine.scheduler.stats().blocks_used == 0)
        events = parsed(again(server, first.id).read())
        assert json.loads(events[-2][1])["error"]["code"] == "stream_expired" and events[-1][1] == "[DONE]"
        until(lambda: again(server, first.id).status == 404)


def test_a_client_ends_its_answer(tmp_path: Path) -> None:
    with serving(tmp_path, step_s=0.01) as server:
        first = post(server, "/v1/completions", {"prompt": "a", "max_tokens": 200})
        first.read(10)
        deleted = Connection(server.url, "DELETE", f"/v1/streams/{first.id}")
        assert deleted.status == 200 and json.loads(deleted.read())["deleted"] is True
        assert first.read().endswith(b"data: [DONE]\n\n"), "who reads is told"
        until(lambda: server.engine.scheduler.stats().blocks_used == 0)
        assert server.request_table.num_open == 0 and again(server, first.id).status == 404
        assert Connection(server.url, "DELETE", f"/v1/streams/{first.id}").status == 404


def test_an_error_is_kept_too(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        stream = post(server, "/v1/chat/completions", {"messages": checks.MESSAGES, "max_tokens": 200})
        stream.read(200)
        server.engine.paused = True
        whole = Connection(server.url, "POST", "/v1/completions", {"prompt": "a", "background": True})
        until(lambda: server.request_table.num_open >= 1)
        server.loop.call_soon_threadsafe(server.request_table.fail_all, "rank 1 failed: out of memory", 503)
        stream.read()
        events = parsed(again(server, stream.id).read())
        assert "rank 1 failed" in events[-2][1] and events[-1][1] == "[DONE]"
        rest = parsed(again(server, stream.id, events[-3][0]).read())
        assert rest == events[-2:] and again(server, stream.id, events[-1][0]).status == 204
        failed = again(server, whole.id)
        assert failed.status == 503 and b"rank 1 failed" in failed.read()


def test_bytes_are_bounded_for_each_answer_and_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as server:
        monkeypatch.setattr(streams, "MAX_ANSWER_BYTES", 20_000)
        big = post(server, "/v1/completions", {"prompt": "a", "max_tokens": 200})
        events = [part for part in big.read().decode().split("\n\n") if part]
        assert "stream_too_large" in events[-2] and events[-1] == "data: [DONE]", "who reads is told"
        late = again(server, big.id, "3")
        assert late.status == 507 and b"stream_too_large" in late.read()
        until(lambda: server.engine.scheduler.stats().blocks_used == 0)
        assert server.request_table.num_open == 0
        monkeypatch.setattr(streams, "MAX_ANSWER_BYTES", 1 << 20)
        monkeypatch.setattr(streams, "MAX_KEPT_BYTES", 60_000)
        kept = []
        for _ in range(12):
            kept.append(post(server, "/v1/completions", {"prompt": "a", "max_tokens": 30}))
            kept[-1].read()
        statuses = [again(server, each.id).status for each in kept]
        assert statuses == sorted(statuses, reverse=True) and {*statuses} == {404, 200}, "those that ended first are forgotten"
        server.engine.paused = True
        running = post(server, "/v1/completions", {"prompt": "a", "max_tokens": 240})
        running.cut()
        monkeypatch.setattr(streams, "MAX_KEPT_BYTES", 20_000)
        server.engine.paused = False
        until(lambda: again(server, running.id).status == 507)
        assert server.request_table.num_open == 0


def test_detached_answers_count_as_open(tmp_path: Path) -> None:
    with serving(tmp_path, max_num_seqs=2, max_queued_requests=1) as server:
        server.engine.paused = True
        for _ in range(3):
            post(server, "/v1/completions", {"prompt": "a"}).cut()
        checks.is_error(checks.Client(server.url).completion(), 429, code="queue_full", says="3 of 3")
        server.engine.paused = False


def test_idle_readers_get_comments_that_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.05)
    with serving(tmp_path) as server:
        server.engine.paused = True
        first = post(server, "/v1/completions", {"prompt": "a", "max_tokens": 2})
        assert first.read(100).startswith(b": keep-alive")
        server.engine.paused = False
        first.read()
        assert b"keep-alive" not in again(server, first.id).read()


def test_calls_have_the_same_ids_for_every_reader(tmp_path: Path) -> None:
    """The tokens of two calls, one a frame or all at once, and the events are the same; their ids are those of this answer."""
    answers = ChatAnswers(template=ResponseTemplate.load(SPEC | {"start_anchor": "<|assistant|>"}))
    with serving(tmp_path, answers=answers) as server:
        server.engine.paused = True
        loose = {"type": "function", "function": {"name": "g"}}
        tokens = tuple(server.tokenizer.encode(TEXT, add_special_tokens=False))

        def answer(size: int) -> list[tuple[str, Json]]:
            stream = post(server, "/v1/chat/completions", {"messages": checks.MESSAGES, "tools": [F, loose], "max_tokens": 200})
            assert stream.status == 200, stream.read()
            (sequence,) = server.request_table.open_sequences
            id = sequence.request.id
            for begin in range(0, len(tokens), size):
                frame = [Delta(id, begin, tokens[begin : begin + size])]
                server.loop.call_soon_threadsafe(server.request_table.receive, frame)
            server.loop.call_soon_threadsafe(server.request_table.receive, [Done(id, "stop", len(tokens))])
            events = parsed(stream.read())
            assert events == parsed(again(server, stream.id).read())
            return [(event, json.loads(data)) for event, data in events[:-1]]

        slow, fast = answer(1), answer(len(tokens))
        deltas = [[(id, chunk["choices"][0]["delta"]) for id, chunk in events] for events in (slow, fast)]
        calls = [[call for _, delta in each for call in delta.get("tool_calls", ()) if "id" in call] for each in deltas]
        names = [[call.pop("id") for call in each] for each in calls]
        assert len({*names[0], *names[1]}) == 4 and all(re.fullmatch("call_[0-9a-f]{24}", id) for each in names for id in each)
        assert deltas[0] == deltas[1] and len(calls[0]) == 2
        assert slow[-1][1]["choices"][0]["finish_reason"] == "tool_calls"


def test_the_real_library_reads_such_a_stream(server: Server) -> None:
    with checks.openai_client(server.url) as client:
        chunks = client.chat.completions.create(
            model="tiny", messages=checks.MESSAGES, stream=True, max_tokens=5, extra_headers={"X-Resumable": "1"}, seed=3
        )
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] is not None
        raw = client.completions.with_raw_response.create(model="tiny", prompt="a", max_tokens=3, extra_body={"background": True})
        assert raw.http_response.status_code == 202 and raw.headers["x-stream-id"]


def test_pages_may_read_the_id_and_delete(tmp_path: Path) -> None:
    origin = {"Origin": "http://localhost:3000"}
    with serving(tmp_path) as server:
        client = checks.Client(server.url, origin)
        asked = {"Access-Control-Request-Method": "DELETE", "Access-Control-Request-Headers": "last-event-id, x-stream-id"}
        allowed = client.send("OPTIONS", "/v1/streams/x", None, asked)
        assert allowed.status == 204 and "DELETE" in allowed.headers["access-control-allow-methods"]
        reply = client.send("POST", "/v1/completions", b'{"prompt": "a", "max_tokens": 1, "background": true}')
        assert "X-Stream-Id" in reply.headers["access-control-expose-headers"] and reply.headers["x-stream-id"]


def test_nothing_is_left_when_the_server_ends(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        server.engine.paused = True
        first = post(server, "/v1/completions", {"prompt": "a"})
        first.cut()
        table = server.request_table
    assert table.num_open == 0


def test_positions_are_those_of_the_events() -> None:
    """Against the definition, over random streams: an event without new tokens has a number from 1 on."""

    async def check() -> None:
        chance, table = random.Random(2), streams.StreamTable(60)
        for _ in range(30):
            answer, ids, tokens = table.open(streams.new_stream_id(), b"", b"", streamed=True), list[tuple[int, int]](), 0
            for _ in range(chance.randrange(1, 40)):
                more = chance.choice((0, 0, 1, 1, 2))
                ids.append((tokens + more, 0) if more else (tokens, ids[-1][1] + 1 if ids else 1))
                tokens += more
                answer.append(tokens, b"data: x\n\n")
            text, end = answer.read(0)
            assert [number(id) for id, _ in parsed(text)] == ids and end == len(ids)
            for position in ((t, k) for t in range(tokens + 3) for k in range(6)):
                assert answer.after(position) == sum(id <= position for id in ids)
        table.close()
        assert table.num_bytes == 0 and len(table) == 0

    asyncio.run(check())
