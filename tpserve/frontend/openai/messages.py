"""Messages of a request as a chat template wants them.

Owns the checks of roles, content, tool calls and their answers. What templates disagree about is in a `MessageForm`: a client's
history fits any of them, also one that another server's model has written.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tpserve.errors import UserError
from tpserve.frontend.openai.errors import shown
from tpserve.response_template.analysis import MessageForm

Message = dict[str, Any]
REASONING = ("reasoning_content", "reasoning")


def template_messages(messages: Sequence[Mapping[str, Any]], form: MessageForm) -> list[Message]:
    """The messages for a chat template, without nulls. UserError names the wrong part."""
    plain = [_plain(message, index, form) for index, message in enumerate(messages)]
    _name_calls(plain, form)
    return plain


def num_chars(message: Message) -> int:
    """The number of characters of a checked message's content."""
    content = message.get("content") or ""
    return len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)


def _plain(message: Mapping[str, Any], index: int, form: MessageForm) -> Message:
    where = f"messages[{index}]"
    plain = {name: value for name, value in message.items() if value is not None}
    role = plain.get("role")
    if not isinstance(role, str):
        raise UserError(f"{where}.role must be a string", param=f"{where}.role")
    if role == "function" or plain.get("function_call"):
        raise UserError(
            f"{where}: function calls of the old form are not supported; use tool_calls, and the role tool",
            param=where,
            code="unsupported_parameter",
        )
    if not isinstance(plain.get("tool_call_id", ""), str):
        raise UserError(f"{where}.tool_call_id must be a string", param=f"{where}.tool_call_id")
    if role == "developer" and not form.developer:
        plain["role"] = "system"
    reasoning = next((plain[name] for name in REASONING if isinstance(plain.get(name), str)), None)
    for name in REASONING:
        plain.pop(name, None)
    if role == "assistant" and reasoning is not None and form.reasoning:
        plain[form.reasoning] = reasoning
    calls = plain.pop("tool_calls", None)
    if calls and role == "assistant":
        plain["tool_calls"] = _calls(calls, f"{where}.tool_calls", form)
    _set_content(plain, where, form)
    return plain


def _set_content(message: Message, where: str, form: MessageForm) -> None:
    content = message.get("content", message.pop("refusal", None))
    if "tool_calls" in message and content in (None, "", []):
        message.pop("content", None)
        if form.calls.content != "absent":
            message["content"] = "" if form.calls.content == "text" else None
        return
    if isinstance(content, list):
        message["content"] = [_part(part, f"{where}.content[{at}]") for at, part in enumerate(content)] or ""
    elif isinstance(content, str):
        message["content"] = content
    else:
        raise UserError(f"{where}.content must be a string or a list of text parts", param=f"{where}.content")


def _part(part: Any, where: str) -> dict[str, Any]:
    """A text part. UserError names any other."""
    match part:
        case {"type": "text", "text": str()}:
            return dict(part)
        case {"type": "refusal", "refusal": str(text)}:
            return {"type": "text", "text": text}
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise UserError(f"{where}: only text parts are supported, got {shown(kind)}", param=where, code="unsupported_parameter")


def _calls(calls: Any, where: str, form: MessageForm) -> list[Message]:
    if not isinstance(calls, list):
        raise UserError(f"{where} must be a list", param=where)
    return [_call(call, f"{where}[{at}]", form) for at, call in enumerate(calls)]


def _call(call: Any, where: str, form: MessageForm) -> Message:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where} needs a function with name and arguments", param=where)
    arguments = function.get("arguments")
    if isinstance(arguments, str | None):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            pass  # what a model wrote once; the template shows it as it is
    if form.calls.arguments == "json" and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    plain: Message = {"type": "function", "function": {**function, "arguments": arguments}}
    if isinstance(id := call.get("id"), str):
        plain["id"] = id
    return plain


def _name_calls(messages: Sequence[Message], form: MessageForm) -> None:
    """Give every call an id of the template's form, and every answer the id and the name of its call."""
    ids: dict[str, tuple[str, str]] = {}
    unanswered: list[tuple[str, str]] = []
    number = 0
    for message in messages:
        for call in message.get("tool_calls", ()):
            name, old = call["function"]["name"], call.get("id")
            call["id"] = call_id(form, name, number, old if old is not None else f"call_{number}")
            unanswered.append((call["id"], name))
            if old is not None:
                ids[old] = unanswered[-1]
            number += 1
        if message["role"] != "tool":
            continue
        known = ids.get(message.get("tool_call_id", ""))
        known = known or (unanswered[0] if unanswered else None)
        if known is not None:
            message["tool_call_id"] = known[0]
            message.setdefault("name", known[1])
            if known in unanswered:
                unanswered.remove(known)


def call_id(form: MessageForm, name: str, number: int, id: str) -> str:
    """The id of a call in the form that the template takes. `id`: as a client or this server calls it."""
    match form.calls.call_id:
        case "short":
            return id if len(id) == 9 and id.isalnum() else hashlib.sha256(id.encode()).hexdigest()[:9]
        case "function":
            return id if id.startswith(f"functions.{name}:") else f"functions.{name}:{number}"
    return id
