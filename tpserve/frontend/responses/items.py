"""Items of a conversation: those that a client sends, as they are kept and shown, and the messages that are made of them.

Pure. An item that this server cannot read is an error that names it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tpserve.errors import UserError
from tpserve.frontend.openai.errors import Json, shown
from tpserve.frontend.openai.messages import Message

ROLES = ("user", "assistant", "system", "developer")
TEXTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")
ITEM_ID = re.compile(r"(?:msg|fc|fco|rs)_([A-Za-z0-9_-]{32})_i?[0-9]+")
"""Matches an id of this server, with that of the answer which the item belongs to."""
REFERENCE = "item_reference"


def input_items(given: str | Sequence[Json], answer_id: str, referenced: Mapping[str, Json]) -> list[Json]:
    """The input of a request as items with ids. `referenced`: earlier items by their ids. UserError names the wrong part."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    items = []
    for number, item in enumerate(given):
        where = f"input[{number}]"
        if item.get("type") == REFERENCE:
            items.append(dict(_reference(item, where, referenced)))
            continue
        prefix, plain = _item(item, where)
        id = item.get("id")
        items.append({"id": id if isinstance(id, str) and id else f"{prefix}_{answer_id}_i{number}", **plain})
    return items


def references(given: str | Sequence[Json]) -> list[str]:
    """The ids of earlier items that an input names."""
    named = [] if isinstance(given, str) else [item.get("id") for item in given if item.get("type") == REFERENCE]
    return [id for id in named if isinstance(id, str)]


def answer_of_item(id: str) -> str | None:
    """The answer that an item belongs to; None for an id of another server."""
    match = ITEM_ID.fullmatch(id)
    return match[1] if match else None


def messages_of(items: Sequence[Json], instructions: str | None) -> list[Message]:
    """The messages of a conversation. What an assistant has reasoned, said and called in one turn is one message."""
    messages: list[Message] = []
    for item in items:
        match item["type"]:
            case "reasoning":
                if text := _joined(item["content"] or item["summary"]):  # none where another server has encrypted it
                    turn = _turn(messages, "content", "tool_calls")
                    turn["reasoning"] = turn.get("reasoning", "") + text
            case "message" if item["role"] == "assistant":
                _turn(messages, "content", "tool_calls")["content"] = _joined(item["content"])
            case "message":
                messages.append({"role": item["role"], "content": _content(item["content"])})
            case "function_call":
                function = {"name": item["name"], "arguments": item["arguments"]}
                calls = _turn(messages).setdefault("tool_calls", [])
                calls.append({"id": item["call_id"], "type": "function", "function": function})
            case _:
                content = item["output"] if isinstance(item["output"], str) else _content(item["output"])
                messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
    for message in messages:
        if message["role"] == "assistant" and "tool_calls" not in message:
            message.setdefault("content", "")
    return _instructed(messages, instructions)


def without_beginning(items: Sequence[Json], start: int) -> list[Json]:
    """The items from `start` on, and before it what systems and developers said."""
    return [item for number, item in enumerate(items) if number >= start or item.get("role") in ("system", "developer")]


def _instructed(messages: list[Message], instructions: str | None) -> list[Message]:
    """With instructions in front; many chat templates know one system message at most."""
    if not instructions:
        return messages
    first = messages[0] if messages else {}
    if first.get("role") in ("system", "developer") and isinstance(first["content"], str):
        return [{"role": "system", "content": f"{instructions}\n\n{first['content']}"}, *messages[1:]]
    return [{"role": "system", "content": instructions}, *messages]


def _turn(messages: list[Message], *ended_by: str) -> Message:
    """The assistant's open message, or a new one. `ended_by`: fields after which a new one begins."""
    if not messages or messages[-1]["role"] != "assistant" or any(name in messages[-1] for name in ended_by):
        messages.append({"role": "assistant"})
    return messages[-1]


def _joined(parts: Sequence[Json]) -> str:
    return "".join(part.get("text") or part.get("refusal") or "" for part in parts)


def _content(parts: Sequence[Json]) -> str | list[Json]:
    if len(parts) == 1:
        return _joined(parts)
    return [{"type": "text", "text": _joined([part])} for part in parts]


def _item(item: Json, where: str) -> tuple[str, Json]:
    """The prefix of its id, and the item without it."""
    kind = item.get("type") or ("message" if "role" in item else None)
    match kind:
        case "message":
            if (role := item.get("role")) not in ROLES:
                raise _wrong(f"{where}.role is {shown(role)}; known are {', '.join(ROLES)}", f"{where}.role")
            default = "output_text" if role == "assistant" else "input_text"
            content = _parts(item.get("content"), f"{where}.content", default)
            return "msg", {"type": "message", "role": role, "status": "completed", "content": content}
        case "function_call":
            names = ("call_id", "name", "arguments")
            texts = {name: _text(item.get(name), f"{where}.{name}") for name in names}
            return "fc", {"type": "function_call", "status": "completed", **texts}
        case "function_call_output":
            output = item.get("output")
            plain = output if isinstance(output, str) else _parts(output, f"{where}.output", "input_text")
            call_id = _text(item.get("call_id"), f"{where}.call_id")
            return "fco", {"type": "function_call_output", "status": "completed", "call_id": call_id, "output": plain}
        case "reasoning":
            parts = {name: _parts(item.get(name) or [], f"{where}.{name}", "") for name in ("content", "summary")}
            return "rs", {"type": "reasoning", **parts}
    raise _unsupported(
        f"{where}.type is {shown(kind)}; this server reads messages, function calls, their outputs and reasoning", where
    )


def _reference(item: Json, where: str, referenced: Mapping[str, Json]) -> Json:
    id = item.get("id")
    if not isinstance(id, str) or id not in referenced:
        raise _wrong(
            f"{where}: there is no item {shown(id)}: it is unknown, belongs to another key, or has been forgotten "
            "(--resume-window); send the item itself",
            f"{where}.id",
        )
    return referenced[id]


def _parts(content: Any, where: str, kind: str) -> list[Json]:
    """The parts of a content, a text as one part of the type `kind`."""
    if isinstance(content, str) and kind:
        content = [{"type": kind, "text": content}]
    if not isinstance(content, list):
        raise _wrong(f"{where} must be a {'text or a ' if kind else ''}list of parts", where)
    return [_part(part, f"{where}[{number}]") for number, part in enumerate(content)]


def _part(part: Any, where: str) -> Json:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in TEXTS:
        raise _unsupported(f"{where}.type is {shown(kind)}; this server reads texts only", f"{where}.type")
    name = "refusal" if kind == "refusal" else "text"
    return {"type": kind, name: _text(part.get(name), f"{where}.{name}")} | ({"annotations": []} if kind == "output_text" else {})


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(f"{where} must be a text, not {shown(value)}", where)
    return value


def _wrong(text: str, param: str) -> UserError:
    return UserError(text, param=param, code="invalid_value")


def _unsupported(text: str, param: str) -> UserError:
    return UserError(text, param=param, code="unsupported_parameter")
