"""Messages as chat templates want them: history of tools and reasoning in every form, and what is refused by name."""

from typing import Any

import pytest

from tpserve.errors import UserError
from tpserve.frontend.openai.messages import template_messages
from tpserve.response_template.analysis import MessageForm
from tpserve.response_template.calls import CallForm

CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": "ü"}'}},
    {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": ""}},
]
HISTORY: list[dict[str, Any]] = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": None},
    {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": CALLS, "refusal": None},
    {"role": "tool", "tool_call_id": "call_2", "content": "two"},
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "one"}]},
]


def test_the_plain_form() -> None:
    system, user, assistant, second, first = template_messages(HISTORY, MessageForm())
    assert (system["role"], user) == ("system", {"role": "user", "content": [{"type": "text", "text": "Hi"}]})
    assert assistant["content"] == "" and "reasoning_content" not in assistant and "refusal" not in assistant
    assert [call["function"]["arguments"] for call in assistant["tool_calls"]] == [{"a": "ü"}, {}]
    assert (second["name"], first["name"]) == ("g", "f")


@pytest.mark.parametrize(("content", "shown"), [("null", {"content": None}), ("absent", {}), ("text", {"content": ""})])
def test_content_of_a_message_with_calls_only(content: Any, shown: dict[str, Any]) -> None:
    message = template_messages(HISTORY, MessageForm(calls=CallForm(content=content)))[2]
    assert {name: value for name, value in message.items() if name == "content"} == shown


def test_arguments_as_text_reasoning_and_developer() -> None:
    form = MessageForm(calls=CallForm(arguments="json"), reasoning="thinking", developer=True)
    developer, _, assistant, *_ = template_messages(HISTORY, form)
    assert developer["role"] == "developer" and assistant["thinking"] == "Hm."
    assert [call["function"]["arguments"] for call in assistant["tool_calls"]] == ['{"a": "ü"}', "{}"]


@pytest.mark.parametrize(
    ("style", "ids"),
    [("call", ["call_1", "call_2"]), ("function", ["functions.f:0", "functions.g:1"])],
)
def test_ids_in_the_templates_form(style: Any, ids: list[str]) -> None:
    _, _, assistant, second, first = template_messages(HISTORY, MessageForm(calls=CallForm(call_id=style)))
    assert [call["id"] for call in assistant["tool_calls"]] == ids
    assert [first["tool_call_id"], second["tool_call_id"]] == ids


def test_short_ids_stay_or_become_short() -> None:
    form = MessageForm(calls=CallForm(call_id="short"))
    own = [{**HISTORY[2], "tool_calls": [{**CALLS[0], "id": "aB3dE6gH9"}, CALLS[1]]}, *HISTORY[3:]]
    calls = template_messages(own, form)[0]["tool_calls"]
    assert calls[0]["id"] == "aB3dE6gH9" and len(calls[1]["id"]) == 9 and calls[1]["id"].isalnum()
    assert template_messages(own, form)[1]["tool_call_id"] == calls[1]["id"]


def test_what_a_model_once_wrote_wrongly_is_shown_as_it_was() -> None:
    broken = [{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{oh"}}]}]
    assert template_messages(broken, MessageForm())[0]["tool_calls"][0]["function"]["arguments"] == "{oh"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user", "content": 7}, "messages[0].content"),
        ({"role": "assistant"}, "messages[0].content"),
        ({"role": "function", "content": "x"}, "messages[0]"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0]"),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0]"),
        ({"role": "assistant", "tool_calls": "f"}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls[0]"),
        ({"role": "tool", "tool_call_id": "1"}, "messages[0].content"),
        ({"role": "tool", "tool_call_id": ["1"], "content": "x"}, "messages[0].tool_call_id"),
    ],
)
def test_wrong_messages_are_refused_by_name(message: dict[str, Any], param: str) -> None:
    with pytest.raises(UserError) as caught:
        template_messages([message], MessageForm())
    assert caught.value.param == param
