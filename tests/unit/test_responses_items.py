"""Items of the Responses API as messages of a conversation, and requests as those of chat."""

import re
from pathlib import Path
from typing import Any

import pytest
from msgspec import convert

from tpserve.errors import UserError
from tpserve.frontend.openai.renaming import renamed
from tpserve.frontend.openai.schema import GenerationFields
from tpserve.frontend.responses.conversion import NAMES, chat_request
from tpserve.frontend.responses.items import answer_of_item, input_items, messages_of, without_beginning
from tpserve.frontend.responses.schema import ResponseRequest

ID = "A" * 32
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "yes"}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]}


def said(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text, "annotations": []}]}


def messages(*items: dict[str, Any], instructions: str | None = None) -> list[dict[str, Any]]:
    return messages_of(input_items(items, ID, {}), instructions)


def test_a_turn_of_the_assistant_is_one_message() -> None:
    user = {"role": "user", "content": [{"type": "input_text", "text": "One"}, {"type": "input_text", "text": "Two"}]}
    other = CALL | {"call_id": "c2", "name": "g"}
    output = OUTPUT | {"call_id": "c2", "output": [{"type": "input_text", "text": "no"}]}
    got = messages(user, THOUGHT, said("Look:"), CALL, other, OUTPUT, output, said("So."), said("End."))
    function = {"name": "f", "arguments": '{"a": 1}'}
    assert got == [
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]},
        {
            "role": "assistant",
            "reasoning": "Hm",
            "content": "Look:",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": function},
                {"id": "c2", "type": "function", "function": function | {"name": "g"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "yes"},
        {"role": "tool", "tool_call_id": "c2", "content": "no"},
        {"role": "assistant", "content": "So."},
        {"role": "assistant", "content": "End."},
    ]


def test_reasoning_begins_a_turn_and_may_be_all_of_it() -> None:
    got = messages(said("A"), THOUGHT, THOUGHT, {"role": "user", "content": "B"}, THOUGHT)
    assert [message.get("reasoning") for message in got] == [None, "HmHm", None, "Hm"]
    assert [message["content"] for message in got] == ["A", "", "B", ""]
    summed = THOUGHT | {"summary": [{"type": "summary_text", "text": "Short"}], "content": None}
    assert messages(summed)[0]["reasoning"] == "Short"
    encrypted = {"type": "reasoning", "summary": [], "encrypted_content": "x"}
    assert messages(said("A"), encrypted, {"role": "user", "content": "B"}) == messages(
        said("A"), {"role": "user", "content": "B"}
    )


def test_instructions_come_first_and_join_a_system_message() -> None:
    assert messages_of(input_items("Hi", ID, {}), "Be")[0] == {"role": "system", "content": "Be"}
    (first, second) = messages({"role": "developer", "content": "kind"}, {"role": "user", "content": "Hi"}, instructions="Be")
    assert (first, second["content"]) == ({"role": "system", "content": "Be\n\nkind"}, "Hi")


def test_ids_tell_the_answer() -> None:
    items = input_items([{"role": "user", "content": "a"}, CALL, OUTPUT, THOUGHT], ID, {})
    assert [item["id"] for item in items] == [f"msg_{ID}_i0", f"fc_{ID}_i1", f"fco_{ID}_i2", "rs_1"]
    assert [answer_of_item(item["id"]) for item in items] == [ID, ID, ID, None]
    assert answer_of_item(f"msg_{ID}_0") == ID and answer_of_item("msg_x_0") is None
    (found,) = input_items([{"type": "item_reference", "id": "rs_1"}], "B" * 32, {"rs_1": items[3]})
    assert found == items[3]


def test_a_beginning_is_left_out_but_for_systems() -> None:
    items = input_items([{"role": role, "content": role} for role in ("developer", "user", "assistant", "user")], ID, {})
    assert [item["role"] for item in without_beginning(items, 3)] == ["developer", "user"]


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"reasoning": {"effort": "low"}}, "reasoning_effort", "low"),
        ({"max_output_tokens": 7}, "max_completion_tokens", 7),
        ({"background": True}, "stream", True),
        ({"text": {"format": {"type": "json_object"}}}, "response_format", {"type": "json_object"}),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {}, "strict": True}}},
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": True}},
        ),
        (
            {"tools": [{"type": "function", "name": "f", "parameters": {}, "strict": True}]},
            "tools",
            [{"type": "function", "function": {"name": "f", "parameters": {}, "strict": True}}],
        ),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", {"type": "function", "name": "f"}),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}},
            "tool_choice",
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "name": "f"}]}},
        ),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", False),
        ({"top_k": 5, "stop": ["x"], "seed": 4}, "top_k", 5),
        ({"top_logprobs": 3}, "top_logprobs", 3),
        ({"include": ["message.output_text.logprobs"]}, "logprobs", True),
        ({"include": ["reasoning.encrypted_content"]}, "logprobs", False),
    ],
)
def test_fields_are_those_of_chat(fields: dict[str, Any], name: str, value: Any) -> None:
    call = convert({"input": "Hi", **fields}, ResponseRequest)
    assert getattr(chat_request(call, input_items(call.input, ID, {})), name) == value


@pytest.mark.parametrize(
    ("text", "param", "expected"),
    [
        ("response_format.json_schema.schema: no", "response_format.json_schema.schema", "text.format.schema: no"),
        ("tools[0].function.name must", "tools[0].function.name", "tools[0].name must"),
        ("your prompt; lower max_tokens.", "messages", "your prompt; lower max_output_tokens."),
        ("seed must fit", "seed", "seed must fit"),
    ],
)
def test_errors_name_the_fields_of_this_api(text: str, param: str, expected: str) -> None:
    error = renamed(UserError(text, param=param, code="c", status=418), NAMES)
    assert (str(error), error.code, error.status) == (expected, "c", 418)
    assert error.param == {"messages": "input"}.get(param, expected.split(":")[0].split(" ")[0])


def test_the_documentation_lists_every_field() -> None:
    section = (Path(__file__).parents[2] / "docs" / "http.md").read_text().split("## Responses")[1].split("## Messages")[0]
    fields = {*ResponseRequest.__struct_fields__} - {*GenerationFields.__struct_fields__}
    assert not fields - set(re.findall(r"`(\w+)[`.]", section))
