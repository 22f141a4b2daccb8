"""Tools and reasoning of a real server: calls in text and in special tokens, their history, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server import Server, free_port, running, serve
from tests.unit.chat_templates import chatml

THOUGHT = "{%- if message.reasoning_content %}<|system|>{{ message.reasoning_content }}<|user|>{% endif -%}"
CALL = '<|begin|>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}<|assistant|>'
MARKED = chatml(THOUGHT + "{{ message.content }}{%- for call in message.tool_calls %}" + CALL + "{% endfor -%}")
"""Reasoning and calls between special tokens of the built-in model, which match no text."""
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
ASK = [{"role": "user", "content": "The weather in Paris?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    with running(
        [serve("--chat-template", MARKED, "--device", "cpu", port=port)], port, tmp_path_factory.mktemp("one") / "log"
    ) as one:
        yield one


def chat(server: Server, status: int = 200, **fields: Any) -> Any:
    got, body = server.post(
        "/v1/chat/completions", {"messages": ASK, "seed": 1, "max_tokens": 200, "return_token_ids": True, **fields}
    )
    assert got == status, body
    return body["choices"][0] | {"usage": body["usage"]} if status == 200 else body["error"]


def test_calls_between_special_tokens(server: Server) -> None:
    assert "content (from chat template), call" in server.log.replace("reasoning (from chat template), ", "")
    for seed in range(4):
        choice = chat(server, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, thinking_token_budget=3, seed=seed)
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
        assert choice["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 3
    history = [*ASK, choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}]
    assert chat(server, messages=history, tools=[TOOL], max_tokens=4)["usage"]["completion_tokens"] <= 4


def test_markers_are_hidden_and_a_stream_is_the_whole_answer(server: Server) -> None:
    fields = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "thinking_token_budget": 5, "seed": 7}
    whole = chat(server, **fields)
    events = server.stream("/v1/chat/completions", {"messages": ASK, "max_tokens": 200, **fields, "stream": True})
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert calls[0]["function"] == {"name": "weather", "arguments": ""} and calls[0]["id"] and calls[0]["type"] == "function"
    arguments = "".join(call["function"]["arguments"] for call in calls)
    assert arguments == whole["message"]["tool_calls"][0]["function"]["arguments"]
    assert "".join(delta.get("reasoning") or "" for delta in deltas) == whole["message"].get("reasoning", "")
    assert "<|" not in json.dumps(whole["message"])
    assert chat(server, allowed_token_ids=[0], max_tokens=3)["message"]["content"] == "", "<|begin|> is no mark without tools"


def test_an_answer_of_a_schema_comes_after_reasoning(server: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY}}
    choice = chat(server, response_format=form, thinking_token_budget=2)
    assert json.loads(choice["message"]["content"])["city"] in ("Paris", "Rome")
    both = chat(
        server, response_format=form, tools=[{**TOOL, "function": {**TOOL["function"], "strict": True}}], thinking_token_budget=0
    )
    message = both["message"]
    assert message.get("tool_calls") or json.loads(message["content"])["city"] in ("Paris", "Rome")


def test_what_cannot_be_enforced_is_refused_or_left_free(server: Server) -> None:
    odd = {"name": "odd", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "if": {"required": ["a"]}}}
    error = chat(server, 400, tools=[{"type": "function", "function": {**odd, "strict": True}}], tool_choice="required")
    assert "if" in error["message"] and error["code"] in ("invalid_grammar", "invalid_value")
    free = chat(
        server, tools=[{"type": "function", "function": odd}], tool_choice="required", thinking_token_budget=0, max_tokens=40
    )
    assert free["finish_reason"] in ("length", "tool_calls")
    assert chat(server, 400, tool_choice="required")["param"] == "tool_choice"
    assert chat(server, 400, tools=[{"type": "custom"}])["param"] == "tools[0].type"


def test_a_model_without_tools_says_so(tmp_path: Path) -> None:
    port, plain = free_port(), "{% for m in messages %}{{ m.content }}{% endfor %}"
    with running([serve("--chat-template", plain, "--device", "cpu", port=port)], port, tmp_path / "log") as server:
        error = chat(server, 400, tools=[TOOL])
        assert error["param"] == "tools" and "does not show tools" in error["message"]
        assert chat(server, 400, thinking_token_budget=5)["param"] == "thinking_token_budget"
        assert chat(server, tools=[TOOL], tool_choice="none", max_tokens=8, ignore_eos=True)["message"]["content"]
