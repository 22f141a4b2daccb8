"""What a request says about tools, and how the answer of a choice becomes messages and deltas."""

import json
from typing import Any

import pytest

from tpserve.errors import UserError
from tpserve.frontend.openai.chat_answer import AnswerReader, ChatAnswers
from tpserve.frontend.openai.schema import ChatCompletionRequest
from tpserve.frontend.openai.tools import tool_use
from tpserve.response_template.format import AnswerFormat, ReasoningFormat
from tpserve.response_template.template import ResponseTemplate
from tpserve.text.assembler import OutputDelta

F = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}
G = {"type": "function", "function": {"name": "g", "strict": True}}
CALL = {"type": "function", "function": {"name": "{content.name}", "arguments": "{content.arguments}"}}
SPEC = {
    "start_anchor": "<|a|>",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {"open": "<c>", "close": "</c>", "content": "json", "repeats": True, "transform": CALL},
        "content": {},
    },
}
ANSWERS = ChatAnswers(template=ResponseTemplate.load(SPEC))
TEXT = '<think>\nHm </think>\n\nLook:\n<c>{"name": "f", "arguments": {"a": 1}}</c>\n<c>{"name": "g", "arguments": {}}</c>'


def request(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(messages=[{"role": "user", "content": "x"}], **fields)


def output(text: str, finish: Any = None, begin: int = 0) -> OutputDelta:
    """A delta with one token a character."""
    offsets = list(range(begin, begin + len(text)))
    return OutputDelta(text=text, tokens=offsets, entries=[], num_tokens=begin + len(text), offsets=offsets, finish=finish)


def reader(call: ChatCompletionRequest, tail: str = "") -> AnswerReader:
    return AnswerReader(ANSWERS, call, tool_use(call), tail)


def test_a_described_answer_keeps_its_white_space() -> None:
    answers = ChatAnswers(ANSWERS.template, AnswerFormat(reasoning=ReasoningFormat("<think>\n", "\n</think>\n\n")))
    for fields, content in (({"guided_regex": " a"}, " a"), ({"response_format": {"type": "text"}}, "a"), ({}, "a")):
        call = request(**fields)
        for tail, text in (("<think>\n\n</think>\n\n", " a"), ("<think>\n", "Hm.\n</think>\n\n a")):
            assert AnswerReader(answers, call, tool_use(call), tail).message(output(text, "stop"))["content"] == content


def test_calls_inside_reasoning_are_calls_of_a_free_answer() -> None:
    call, text = request(tools=[F]), '<think>\nHm <c>{"name": "f", "arguments": {}}</c>\n</think>'
    free = reader(call).message(output(text, "stop"))
    assert free["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"} and free["reasoning"] == "Hm"
    held = AnswerReader(ANSWERS, call, tool_use(call), "", constrained=True).message(output(text, "stop"))
    assert "tool_calls" not in held and held["reasoning"].startswith("Hm <c>")


@pytest.mark.parametrize(
    ("fields", "choice", "named", "names"),
    [
        ({}, "none", False, []),
        ({"tools": [F, G]}, "auto", False, ["f", "g"]),
        ({"tools": [F], "tool_choice": "none"}, "none", False, ["f"]),
        ({"tools": [F, G], "tool_choice": "required"}, "required", False, ["f", "g"]),
        ({"tools": [F, G], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "required", True, ["g"]),
        (
            {"tools": [F, G], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [G]}}},
            "auto",
            False,
            ["g"],
        ),
        ({"tool_choice": "auto"}, "none", False, []),
    ],
)
def test_choices(fields: dict[str, Any], choice: str, named: bool, names: list[str]) -> None:
    use = tool_use(request(**fields))
    assert (use.choice, use.named, [tool.name for tool in use.tools]) == (choice, named, names)
    assert len(use.declared) == len(fields.get("tools", ())) and all("parameters" in each["function"] for each in use.declared)
    assert all("strict" not in each["function"] for each in use.declared)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function"}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": 7}}]}, "tools[0].function.description"),
        ({"tools": [F, F]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [F], "tool_choice": "perhaps"}, "tool_choice"),
        ({"tools": [F], "tool_choice": {"type": "function", "function": {"name": "h"}}}, "tool_choice"),
        ({"tools": [F], "tool_choice": {"type": "custom"}}, "tool_choice"),
        ({"tools": [F], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}}, "tool_choice"),
    ],
)
def test_wrong_tools_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UserError) as caught:
        tool_use(request(**fields))
    assert caught.value.param == param


def test_a_whole_message() -> None:
    own = reader(request(tools=[F, G]))
    message = own.message(output(TEXT, "stop"))
    assert (message["content"], message["reasoning"], message["reasoning_content"]) == ("Look:", "Hm", "Hm")
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "f", "arguments": '{"a": 1}'},
        {"name": "g", "arguments": "{}"},
    ]
    assert len({call["id"] for call in message["tool_calls"]}) == 2 and "index" not in message["tool_calls"][0]
    assert own.finish_reason(output("", "stop")) == "tool_calls" and own.finish_reason(output("", "length")) == "length"
    assert own.reasoning_tokens == len("\nHm ")


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_a_stream_is_the_whole_message(size: int) -> None:
    whole = reader(request(tools=[F, G])).message(output(TEXT, "stop"))
    own, parts = reader(request(tools=[F, G])), list[dict[str, Any]]()
    for at in range(0, len(TEXT), size):
        parts += own.deltas(output(TEXT[at : at + size], "stop" if at + size >= len(TEXT) else None, at))
    assert all(all(part.values()) for part in parts), "no delta is empty"
    calls: dict[int, dict[str, str]] = {}
    for part in parts:
        for call in part.get("tool_calls", ()):
            if "id" in call:
                assert call["function"]["arguments"] == "" and call["index"] == len(calls)
                calls[call["index"]] = dict(call["function"])
            else:
                calls[call["index"]]["arguments"] += call["function"]["arguments"]
    assert list(calls.values()) == [call["function"] for call in whole["tool_calls"]]
    assert "".join(part.get("content", "") for part in parts) == whole["content"]
    assert "".join(part.get("reasoning", "") for part in parts) == whole["reasoning"]
    assert own.reasoning_tokens == len("\nHm ")


def test_one_call_no_reasoning_and_no_calls() -> None:
    one = reader(request(tools=[F, G], parallel_tool_calls=False)).message(output(TEXT, "stop"))
    assert [call["function"]["name"] for call in one["tool_calls"]] == ["f"]
    named = reader(request(tools=[F], tool_choice={"type": "function", "function": {"name": "f"}}))
    named.message(output(TEXT, "stop"))
    assert named.finish_reason(output("", "stop")) == "stop"
    silent = reader(request(include_reasoning=False)).message(output(TEXT, "stop"))
    assert "reasoning" not in silent and silent["content"].startswith("Look:\n<c>")
    joined = reader(request(separate_reasoning=False)).message(output(TEXT, "stop"))
    assert joined["content"].startswith("Hm") and "reasoning" not in joined


def test_calls_without_content_have_none() -> None:
    message = reader(request(tools=[F])).message(output('<c>{"name": "f", "arguments": {}}</c>', "stop"))
    assert message["content"] is None and json.loads(message["tool_calls"][0]["function"]["arguments"]) == {}


def test_without_a_template_all_is_content() -> None:
    call = request()
    message = AnswerReader(ChatAnswers(), call, tool_use(call), "").message(output(TEXT, "stop"))
    assert message == {"role": "assistant", "content": TEXT, "refusal": None}
    with pytest.raises(UserError) as caught:
        ChatAnswers(off={"call": "its chat template shows no tools"}).refuse_tools(tool_use(request(tools=[F])))
    assert caught.value.param == "tools" and "shows no tools" in str(caught.value)


def test_what_a_template_does_not_read_is_a_warning() -> None:
    call = request(reasoning_effort="none", enable_thinking=True)
    assert [text.split()[0] for text in ANSWERS.unheeded(call, "{{ messages }}")] == ["reasoning_effort", "enable_thinking"]
    assert ANSWERS.unheeded(call, "{{ enable_thinking }}") == ANSWERS.unheeded(request(), "{{ messages }}") == []


def test_what_templates_are_told_about_reasoning() -> None:
    assert ANSWERS.variables(None, None) == {}
    assert ANSWERS.variables("none", None) == {"enable_thinking": False, "thinking": False}
    assert ANSWERS.variables("high", None) == {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"}
    assert ANSWERS.variables("low", False) == {"enable_thinking": False, "thinking": False, "reasoning_effort": "low"}
