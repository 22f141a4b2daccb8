"""The Messages API over real sockets: messages, the order of events, keys and errors in Anthropic's form."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.http import checks
from tests.http.checks import Json
from tests.http.inprocess import MAX_MODEL_LEN, Server, serving, until
from tests.http.test_durable import kill, read_some
from tests.http.test_responses_api import ANSWERS, fed, prompt
from tests.http.test_resumable import Connection
from tests.unit.test_chat_tools import TEXT

ROUTE = "/v1/messages"
ASK: Json = {"messages": [{"role": "user", "content": "Where does it live?"}], "max_tokens": 12, "ignore_eos": True, "seed": 3}
TOOLS = [
    {"name": "f", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    {"name": "g", "input_schema": {"type": "object"}},
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("model"), max_queued_requests=300, answers=ANSWERS) as server:
        yield server


def post(server: Server, **body: Any) -> checks.Reply:
    return checks.Client(server.url, {"anthropic-version": "2023-06-01"}).post(ROUTE, **ASK | body)


def events(data: bytes) -> list[Json]:
    found = []
    for part in data.decode().split("\n\n")[:-1]:
        match = re.fullmatch(r"(?:id: [\d.]+\n)?event: (\S+)\ndata: (.*)", part)
        assert match and json.loads(match[2])["type"] == match[1], part
        found.append(json.loads(match[2]))
    return found


def is_error(reply: checks.Reply, status: int, kind: str, says: str) -> None:
    assert reply.status == status, reply.body
    assert set(reply.json) == {"type", "error", "request_id"} and set(reply.json["error"]) == {"type", "message"}
    assert (reply.json["type"], reply.json["error"]["type"]) == ("error", kind) and says in reply.json["error"]["message"]
    assert reply.headers["request-id"] == reply.headers["x-request-id"] == reply.json["request_id"]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_events_come_in_order_and_say_what_the_message_says(tmp_path: Path, size: int) -> None:
    with serving(tmp_path, answers=ANSWERS) as server:
        server.engine.paused = True
        tokens = tuple(server.tokenizer.encode(TEXT, add_special_tokens=False))
        body = ASK | {"stream": True, "tools": TOOLS, "max_tokens": 200}
        found = events(fed(server, tokens, size, body, ROUTE))
        kinds = [event["type"] for event in found]
        merged = [kind for at, kind in enumerate(kinds) if not (at and kinds[at - 1] == kind)]
        block = ["content_block_start", "content_block_delta", "content_block_stop"]
        assert merged == ["message_start", "ping", *block * 4, "message_delta", "message_stop"]
        message = found[0]["message"]
        assert (message["content"], message["stop_reason"], message["usage"]["output_tokens"]) == ([], None, 0)
        whole = json.loads(fed(server, tokens, size, body | {"stream": False}, ROUTE))
        thinking, text, first, second = whole["content"]
        assert thinking == {"type": "thinking", "thinking": "Hm", "signature": ""} and text == {"type": "text", "text": "Look:"}
        assert [(call["name"], call["input"]) for call in (first, second)] == [("f", {"a": 1}), ("g", {})]
        assert (whole["stop_reason"], whole["stop_sequence"], whole["role"]) == ("tool_use", None, "assistant")
        assert found[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
        assert found[-2]["usage"] == whole["usage"] and whole["usage"]["output_tokens"] == len(tokens)
        for index, content in enumerate(whole["content"]):
            own = [event for event in found if event.get("index") == index]
            begin = own[0]["content_block"]
            assert begin["type"] == content["type"] and not any(begin.get(name) for name in ("text", "thinking", "input"))
            said = "".join(next(value for name, value in event["delta"].items() if name != "type") for event in own[1:-1])
            assert (json.loads(said) if "input" in content else said) == content.get("input", content.get(content["type"]))


def test_a_message_is_that_of_chat(server: Server) -> None:
    whole = post(server, system="Be brief.").json
    messages = [{"role": "system", "content": "Be brief."}, *ASK["messages"]]
    fields: Json = {"messages": messages, "max_tokens": 12, "ignore_eos": True, "seed": 3}
    chat = checks.Client(server.url).post("/v1/chat/completions", **fields).json
    assert whole["content"] == [{"type": "text", "text": chat["choices"][0]["message"]["content"]}]
    assert (whole["type"], whole["stop_reason"], whole["model"]) == ("message", "max_tokens", "tiny")
    usage = whole["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == chat["usage"]["prompt_tokens"]
    long = [post(server, system="Be brief. " * 10).json["usage"] for _ in range(2)]
    assert (long[0]["cache_read_input_tokens"], long[1]["cache_read_input_tokens"] % 16) == (0, 0)
    assert long[1]["cache_read_input_tokens"] > 0 and long[1]["input_tokens"] > 0
    assert sum(long[1].values()) == sum(long[0].values())
    counted = checks.Client(server.url).post(f"{ROUTE}/count_tokens", messages=ASK["messages"], system="Be brief.").json
    assert counted == {"input_tokens": chat["usage"]["prompt_tokens"]}


def test_an_end_is_named(server: Server) -> None:
    text = post(server, max_tokens=40).json["content"][0]["text"]
    stop = text[6:9]
    stopped = post(server, max_tokens=40, stop_sequences=["not this", stop]).json
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", stop)
    assert stopped["content"][0]["text"] == text[: text.index(stop)]
    full = post(server, max_tokens=10_000).json
    assert full["stop_reason"] == "model_context_window_exceeded"
    assert (
        full["usage"]["input_tokens"] + full["usage"]["cache_read_input_tokens"] + full["usage"]["output_tokens"] == MAX_MODEL_LEN
    )
    assert post(server, context_management={"edits": []}).status == 200
    begun = post(server, messages=[*ASK["messages"], {"role": "assistant", "content": "The red fox"}])
    assert begun.status == 200 and server.tokenizer.decode(prompt(server)).endswith("The red fox")


def test_keys_come_in_either_header(tmp_path: Path) -> None:
    with serving(tmp_path, api_key="secret") as server:
        for name, value in (("x-api-key", "secret"), ("Authorization", "Bearer secret")):
            reply = checks.Client(server.url, {name: value}).post(ROUTE, **ASK)
            assert reply.status == 200 and reply.headers["request-id"]
            assert checks.Client(server.url, {name: value}).get("/v1/models").status == 200
        for headers in ({}, {"x-api-key": "other"}, {"Authorization": "Bearer other", "x-api-key": "secret"}):
            is_error(checks.Client(server.url, headers).post(ROUTE, **ASK), 401, "authentication_error", "x-api-key")


def test_errors_have_the_form_of_this_api(server: Server) -> None:
    is_error(post(server, max_tokens=None), 400, "invalid_request_error", "max_tokens is required")
    is_error(post(server, model="none"), 404, "not_found_error", "none")
    long = [{"role": "user", "content": "word " * 900}]
    is_error(post(server, messages=long), 400, "invalid_request_error", "maximum context length")
    image = [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]
    is_error(post(server, messages=image), 400, "invalid_request_error", "messages[0].content[0].type is image")
    is_error(post(server, container="x"), 400, "invalid_request_error", "container")
    is_error(post(server, mcp_servers=[{"name": "x"}]), 400, "invalid_request_error", "mcp_servers")
    is_error(post(server, thinking={"type": "enabled", "budget_tokens": 2}), 400, "invalid_request_error", "thinking is not")
    is_error(post(server, stop_sequences=[""]), 400, "invalid_request_error", "stop")
    is_error(checks.Client(server.url).get(ROUTE), 405, "invalid_request_error", "POST")
    is_error(checks.Client(server.url).send("POST", ROUTE, b"{"), 400, "invalid_request_error", "JSON")
    is_error(checks.Client(server.url).post(f"{ROUTE}/batches"), 404, "not_found_error", "no such route")
    checks.is_error(checks.Client(server.url).get("/v1/none"), 404)


def test_a_failure_is_an_event_and_a_client_that_leaves_ends_its_message(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        server.engine.paused = True
        stream = Connection(server.url, "POST", ROUTE, ASK | {"stream": True})
        until(lambda: server.request_table.num_open == 1)
        server.loop.call_soon_threadsafe(server.request_table.fail_all, "rank 1 failed", 500)
        last = events(stream.read())[-1]
        assert (last["type"], last["error"]) == ("error", {"type": "api_error", "message": "rank 1 failed"})
        left = Connection(server.url, "POST", ROUTE, ASK | {"stream": True})
        assert left.read(10) and server.request_table.num_open == 1
        left.cut()
        until(lambda: server.request_table.num_open == 0)


def test_a_stream_may_outlive_its_connection(server: Server) -> None:
    first = Connection(server.url, "POST", ROUTE, ASK | {"stream": True}, X_Resumable="1")
    data = first.read()
    assert events(data)[-1] == {"type": "message_stop"}
    parts = data.split(b"\n\n")
    last = parts[3].split(b"\n")[0].removeprefix(b"id: ").decode()
    rest = Connection(server.url, "GET", f"/v1/streams/{first.id}", Last_Event_ID=last).read()
    assert rest == b"\n\n".join(parts[4:])


def test_a_message_outlives_the_server(tmp_path: Path) -> None:
    body = ASK | {"stream": True, "max_tokens": 60, "temperature": 1, "seed": None}
    with serving(tmp_path, state_dir=tmp_path / "state", step_s=0.003) as server:
        first = Connection(server.url, "POST", ROUTE, body, X_Resumable="1", X_Request_Id="mine")
        begin = read_some(first, 3000)
        kill(server)
    last = begin.split(b"\n\n")[-2].split(b"\n")[0].removeprefix(b"id: ").decode()
    with serving(tmp_path, state_dir=tmp_path / "state") as server:
        rest = Connection(server.url, "GET", f"/v1/streams/{first.id}", Last_Event_ID=last).read()
        whole = events(begin + rest)
        assert whole[0]["message"]["id"] == "msg_mine" and whole[-1]["type"] == "message_stop"
        assert whole[-2]["usage"]["output_tokens"] == 60


def test_tokenizer_and_load_are_told(server: Server) -> None:
    client = checks.Client(server.url)
    facts = client.get("/tokenizer_info").json
    assert (facts["bos_token"], facts["eos_token"], facts["vocab_size"]) == ("<s>", "</s>", server.tokenizer.vocab_size)
    assert "messages" in facts["chat_template"]
    assert client.get("/load").json == {"server_load": 0}
    server.engine.paused = True
    open_ones = [Connection(server.url, "POST", ROUTE, ASK | {"stream": True}) for _ in range(2)]
    assert client.get("/load").json == {"server_load": 2}
    server.engine.paused = False
    assert all(one.read() for one in open_ones)
