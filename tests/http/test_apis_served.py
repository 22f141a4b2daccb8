"""The Responses and the Messages API of a real server with the built-in model: calls there and back."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.test_tools import CITY, MARKED
from tests.http.checks import Json
from tests.http.test_responses_api import events
from tests.http.test_resumable import Connection
from tests.server import Server, free_port, running, serve

ASK = "The weather in Paris?"
TOOL = {"type": "function", "name": "weather", "parameters": CITY}
CALL: Json = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 200}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    command = serve("--nproc-per-node", "1", "--device", "cpu", "--chat-template", MARKED, port=port)
    with running([command], port, tmp_path_factory.mktemp("served") / "log") as one:
        yield one


def respond(server: Server, **body: Any) -> Json:
    status, answer = server.post("/v1/responses", {"input": ASK, "seed": 1, **body})
    assert status == 200, answer
    return dict(answer)


def test_responses_call_and_go_on(server: Server) -> None:
    first = respond(server, thinking_token_budget=3, **CALL)
    call = first["output"][-1]
    assert (first["status"], call["type"], call["name"]) == ("completed", "function_call", "weather")
    assert json.loads(call["arguments"])["city"] in ("Paris", "Rome")
    assert first["usage"]["output_tokens_details"]["reasoning_tokens"] <= 3
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
    kept = respond(server, input=[output], previous_response_id=first["id"], max_output_tokens=8)
    sent = respond(server, input=[{"role": "user", "content": ASK}, *first["output"], output], max_output_tokens=8)
    assert kept["output"][-1]["content"][0]["text"] == sent["output"][-1]["content"][0]["text"]
    assert kept["usage"]["input_tokens"] == sent["usage"]["input_tokens"]
    form = {"format": {"type": "json_schema", "name": "city", "schema": CITY}}
    (message,) = [item for item in respond(server, text=form, thinking_token_budget=0)["output"] if item["type"] == "message"]
    assert json.loads(message["content"][0]["text"])["city"] in ("Paris", "Rome")
    data = Connection(server.url, "POST", "/v1/responses", {"input": ASK, "seed": 1, "stream": True, **CALL}).read()
    call = events(data)[-1]["response"]["output"][-1]
    assert json.loads(call["arguments"])["city"] in ("Paris", "Rome")


def test_messages_call_and_go_on(server: Server) -> None:
    question = {"role": "user", "content": ASK}
    body: Json = {
        "messages": [question],
        "max_tokens": 200,
        "tools": [{"name": "weather", "input_schema": CITY}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 3},
        "seed": 1,
    }
    status, first = server.post("/v1/messages", body)
    assert status == 200, first
    use = first["content"][-1]
    assert (use["type"], use["name"], first["stop_reason"]) == ("tool_use", "weather", "tool_use")
    assert use["input"]["city"] in ("Paris", "Rome")
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use["id"], "content": "sunny"}]}
    history = [question, {"role": "assistant", "content": first["content"]}, result]
    status, second = server.post("/v1/messages", body | {"messages": history, "tool_choice": {"type": "auto"}, "max_tokens": 8})
    assert status == 200 and second["usage"]["output_tokens"] <= 8, second
