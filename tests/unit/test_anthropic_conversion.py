"""Messages requests as those of chat."""

import re
from pathlib import Path
from typing import Any

import pytest
from msgspec import convert

from tpserve.errors import UserError
from tpserve.frontend.anthropic.conversion import chat_messages, chat_request
from tpserve.frontend.anthropic.encoder import arguments
from tpserve.frontend.anthropic.errors import anthropic_error, is_anthropic
from tpserve.frontend.anthropic.schema import MessageRequest
from tpserve.frontend.openai.schema import GenerationFields

HI = {"role": "user", "content": "Hi"}
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral"}}
FUNCTION = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
USE = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value, "cache_control": {"type": "ephemeral"}}


def request(*messages: Any, **fields: Any) -> MessageRequest:
    return convert({"max_tokens": 9, "messages": list(messages) or [HI], **fields}, MessageRequest)


def test_blocks_are_messages() -> None:
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [text("yes")], "is_error": False}
    thought = {"type": "thinking", "thinking": "Hm", "signature": ""}
    call = request(
        {"role": "user", "content": [text("One"), text("Two")]},
        {"role": "assistant", "content": [thought, {"type": "redacted_thinking", "data": "x"}, text("Look:"), USE]},
        {"role": "user", "content": [result, {"type": "tool_result", "tool_use_id": "t2"}, text("And?")]},
        {"role": "assistant", "content": [USE]},
        system=[text("Be"), text("kind")],
    )
    function = {"id": "t1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert chat_messages(call) == [
        {"role": "system", "content": "Be\n\nkind"},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]},
        {"role": "assistant", "reasoning": "Hm", "content": "Look:", "tool_calls": [function]},
        {"role": "tool", "tool_call_id": "t1", "content": "yes"},
        {"role": "tool", "tool_call_id": "t2", "content": ""},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "tool_calls": [function]},
    ]
    begun = request({"role": "system", "content": "a"}, {"role": "system", "content": [text("b")]}, HI, system="Be")
    assert chat_messages(begun) == [{"role": "system", "content": "Be\n\na\n\nb"}, HI]
    assert chat_request(call).add_generation_prompt, "a call is no beginning of an answer"


def test_an_answer_that_is_begun_is_continued() -> None:
    chat = chat_request(request(HI, {"role": "assistant", "content": "The fox"}, system="Be"))
    assert (chat.continue_final_message, chat.add_generation_prompt) == (True, False)
    assert chat.messages == [{"role": "system", "content": "Be"}, HI, {"role": "assistant", "content": "The fox"}]


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({}, "max_completion_tokens", 9),
        ({"tools": [TOOL]}, "tools", [FUNCTION]),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "required"),
        ({"tool_choice": {"type": "none"}}, "tool_choice", "none"),
        ({"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice", {"type": "function", "function": {"name": "f"}}),
        ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, "parallel_tool_calls", False),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking_token_budget", 5),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "enable_thinking", True),
        ({"thinking": {"type": "disabled"}}, "enable_thinking", False),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, "include_reasoning", False),
        ({}, "enable_thinking", None),
        ({"output_config": {"effort": "high"}}, "reasoning_effort", "high"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "output", "schema": {"type": "object"}}},
        ),
        ({"top_k": 3}, "top_k", 3),
    ],
)  # fmt: skip
def test_fields_are_those_of_chat(fields: dict[str, Any], name: str, value: Any) -> None:
    assert getattr(chat_request(request(**fields)), name) == value


@pytest.mark.parametrize(
    ("messages", "fields", "param"),
    [
        ([{"role": "user", "content": [{"type": "image", "source": {}}]}], {}, "messages[0].content[0].type"),
        ([HI, {"role": "assistant", "content": [text("a"), {"type": "server_tool_use"}]}], {}, "messages[1].content[1].type"),
        (
            [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "document"}]}]}],
            {},
            "messages[0].content[0].content[0].type",
        ),
        ([{"role": "robot", "content": "x"}], {}, "messages[0].role"),
        ([{"role": "user", "content": 5}], {}, "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], {}, "messages[0].content[0].text"),
        ([HI], {"system": [{"type": "image"}]}, "system[0].type"),
        ([HI], {"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools[0].type"),
        ([HI], {"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ([HI], {"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ([HI], {"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ([HI], {"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ([HI], {"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking.budget_tokens"),
        ([HI], {"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
    ],
)
def test_what_cannot_be_read_is_named(messages: list[Any], fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UserError) as caught:
        chat_request(request(*messages, **fields))
    assert caught.value.param == param and param in str(caught.value)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
        (507, "api_error"),
    ],
)
def test_errors_have_types(status: int, kind: str) -> None:
    error = anthropic_error(UserError("no", status=status), "r")
    assert error == {"type": "error", "error": {"type": kind, "message": "no"}, "request_id": "r"}


def test_paths_and_arguments() -> None:
    assert [is_anthropic(path) for path in ("/v1/messages", "/v1/messages/count_tokens", "/v1/messagesx", "/v1/models")] == [
        True,
        True,
        False,
        False,
    ]
    assert [arguments(value) for value in ('{"a": 1}', '{"a": ', "[1]", "")] == [{"a": 1}, {}, {}, {}]


def test_the_documentation_lists_every_field() -> None:
    section = (Path(__file__).parents[2] / "docs" / "http.md").read_text().split("## Messages")[1].split("## Errors")[0]
    fields = {*MessageRequest.__struct_fields__} - {*GenerationFields.__struct_fields__}
    assert not fields - {"chat_template_kwargs"} - set(re.findall(r"`(\w+)[`.]", section))
