"""Makes a `response_template` from an `AnswerFormat`: patterns that forgive white space, and JSON with keys in any order."""

import json
import re
from collections.abc import Sequence
from typing import Any

from tpserve.response_template.format import ID, INDEX, AnswerFormat, ReasoningFormat, ToolFormat

MAX_NAME = 256
"""The longest name of a function, in characters: so far the text is held back that may become a call."""
START = r"(?:\A|(?<=</think>)|(?<=\[/THINK\]))"
"""Where calls may begin that nothing opens: at the beginning, or behind reasoning."""
NAME = "zqnamezq"
"""Stands for a name while the form of a call is read."""


def spec_of(format: AnswerFormat, anchors: Sequence[str], *, always_reasons: bool = False) -> dict[str, Any]:
    """The `response_template` of a format. `anchors`: the texts after which an answer begins; without any, at the prompt's end.

    `always_reasons`: an answer begins with reasoning, also without its opening tag.
    """
    fields: dict[str, Any] = {}
    if format.reasoning is not None:
        fields["thinking"] = reasoning_field(format.reasoning, always_reasons)
    begin, end = format.content_begin.strip(), format.content_end.strip()
    fields["content"] = {**({"open": begin} if begin else {}), **({"close": end} if end else {}), "content": "text"}
    if format.tools is not None:
        fields["tool_calls"] = calls_field(format.tools)
    anchor: dict[str, Any] = {"start_anchor": list(anchors)} if anchors else {"start_anchor_pattern": r"\Z"}
    return {"version": 1, "defaults": {"role": "assistant"}, **anchor, "fields": fields}


def reasoning_field(reasoning: ReasoningFormat, always: bool = False) -> dict[str, Any]:
    """The field of reasoning."""
    begin, end = reasoning.begin.strip(), reasoning.end.strip()
    opening = {"open_pattern": rf"\A\s*(?:{re.escape(begin)})?"} if always else {"open": begin}
    return {**opening, "close": end, "content": "text"}


def calls_field(tools: ToolFormat) -> dict[str, Any]:
    """The field of calls."""
    if tools.arguments == "python":
        return python_field(tools)
    if tools.arguments == "tagged":
        return tagged_field(tools)
    wrapped = wrapper(tools) or keyed(tools)
    return named_field(tools, {"content": "json"}) if wrapped is None else wrapped


def call(name: str, arguments: str) -> dict[str, Any]:
    """The transform to a call as OpenAI writes it."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def wrapper(tools: ToolFormat) -> dict[str, Any] | None:
    """The field of calls that are JSON objects with name and arguments, alone or in a list; None for other calls."""
    for at in range(len(tools.call_begin)):
        if tools.call_begin[at] != "{":
            continue
        rest = f'{tools.call_begin[at:]}{NAME}{tools.name_end}{{"{NAME}": 0}}{tools.call_end}'
        try:
            value, size = json.JSONDecoder().raw_decode(rest.replace(INDEX, "0"))
        except ValueError:
            continue
        name, arguments = path_of(value, NAME), path_of(value, {NAME: 0})
        if name and arguments:
            closing = rest.replace(INDEX, "0")[size:]
            return object_field(tools, tools.call_begin[:at], closing, name, arguments)
    return None


def keyed(tools: ToolFormat) -> dict[str, Any] | None:
    """The field of calls that are members of a JSON object, the name the key, each in an object of its own in a list."""
    begin, end = tools.begin.strip(), tools.end.strip()
    is_keyed = (tools.call_begin.strip(), tools.name_end.strip(), tools.call_end.strip()) == ('{"', '":', "}")
    if not is_keyed or not begin.endswith("[") or not end.startswith("]"):
        return None
    opening, closing = begin[:-1].strip(), end[1:].strip()
    opened = rf"\s*{loose(opening)}\s*(?=\[)" if opening else rf"{START}\s*(?=\[\s*\{{)"
    transform = call("{name}", "{arguments}")
    closed = {"close": closing} if closing else {}
    return {"open_pattern": opened, **closed, "content": "json-keyed-calls", "transform": transform, "transform_each": True}


def object_field(tools: ToolFormat, before: str, behind: str, name: Sequence[str], arguments: Sequence[str]) -> dict[str, Any]:
    """The field of calls in objects. `before` and `behind`: the text around each object."""
    begin, end = tools.begin.strip(), tools.end.strip()
    keys = "|".join(dict.fromkeys(re.escape(path[0]) for path in (name, arguments)))
    ahead = rf'(?=\{{\s*"(?:{keys}|id|type)")'
    if begin.endswith("[") and end.startswith("]") and not before.strip() and not behind.strip():
        transform = call(*("{" + ".".join(path) + "}" for path in (name, arguments)))
        opening, closing = begin[:-1].strip(), end[1:].strip()
        opened = rf"\s*{loose(opening)}\s*(?=\[)" if opening else rf"{START}\s*(?=\[\s*{ahead})"
        closed = {"close": closing} if closing else {}
        return {"open_pattern": opened, **closed, "content": "json", "transform": transform, "transform_each": True}
    transform = call(*("{content." + ".".join(path) + "}" for path in (name, arguments)))
    field = {"repeats": True, "content": "json", "transform": transform}
    if before.strip():
        return {"open_pattern": opening_pattern(tools, before), **closing_pattern(tools, behind, before), **field}
    if behind.strip():
        return {"open_pattern": rf"\s*(?:{loose(begin)})?\s*{ahead}", **closing_pattern(tools, behind, before), **field}
    between = re.escape(tools.between.strip())
    if begin:  # objects one after another
        opened, next_one = rf"\s*(?:{loose(begin)}|(?<=\}})\s*{between})\s*{ahead}", rf"(?<=\}})(?=\s*{between}\s*{ahead})"
        return {"open_pattern": opened, "close_pattern": rf"\s*{loose(end)}\s*|{next_one}" if end else next_one, **field}
    if between:
        return {
            "open_pattern": rf"(?:{START}|{between})\s*{ahead}",
            "close_pattern": rf"(?<=\}})(?=\s*{between}\s*{ahead})",
            **field,
        }
    return {"open_pattern": rf"{START}\s*(?:<\|python_tag\|>)?\s*{ahead}", **field}


def named_field(tools: ToolFormat, content: dict[str, Any]) -> dict[str, Any]:
    """The field of calls whose name stands outside their arguments."""
    outer, _, own = tools.call_begin.strip().rpartition("\n")
    middle, opening = loose(tools.name_end), opening_pattern(tools, tools.call_begin)
    closing = closing_pattern(tools, tools.call_end, tools.call_begin or tools.between)
    if (
        tools.arguments == "tagged" and outer and own.startswith("<") and not tools.begin.strip()
    ):  # models leave the outer tag out
        opening = rf"\s*(?:{loose(outer)}\s*)?{loose(own)}"
        inner = loose(tools.call_end.strip().partition("\n")[0])
        closing = {"close_pattern": rf"\s*{loose(tools.call_end)}\s*|\s*{inner}(?={opening})"}
    if not tools.call_begin.strip() and not tools.begin.strip():
        opening = rf"(?:{START}|{loose(tools.between)})" if tools.between.strip() else START
    name = rf"(?P<name>[\w.:/-]{{1,{MAX_NAME}}}{'?' if middle else ''})"
    ahead = r"\s*(?=\{)" if content["content"] == "json" else ""
    return {
        "open_pattern": rf"{opening}\s*{name}\s*{middle}{ahead}",
        **closing,
        "repeats": True,
        **content,
        "transform": call("{name}", "{content}"),
    }


def tagged_field(tools: ToolFormat) -> dict[str, Any]:
    """The field of calls whose arguments stand in tags."""
    tags = tools.tags
    assert tags is not None
    middle = loose(tags.middle)
    if tags.other_middle.strip() and loose(tags.other_middle) != middle:
        middle = rf"(?:{middle}|(?P<json>{loose(tags.other_middle)}))"
    first, last = (r"\n?" if line else "" for line in (tags.middle.endswith("\n"), tags.end.startswith("\n")))
    begin = loose(tags.begin)
    head, end = rf"{begin}\s*+(?P<key>[^<>\"\s][^<>\"\n]{{0,255}}?)\s*+{middle}{first}", loose(tags.end)
    patterns = {"tag_pattern": rf"{head}(?P<value>.*?){last}{end}", "tag_end": end}
    if begin:  # a tag that nothing closes
        patterns["tag_open_pattern"] = rf"{head}(?P<value>.*?){last}(?:(?={begin})|\Z)"
    return named_field(tools, {"content": "xml-inline", "content_args": patterns})


def python_field(tools: ToolFormat) -> dict[str, Any]:
    """The field of a list of calls as Python writes them."""
    field = {"content": "python-call-list", "transform": call("{name}", "{arguments}"), "transform_each": True}
    opening, closing = tools.begin.strip().removesuffix("[").strip(), tools.end.strip().removeprefix("]").strip()
    opened = rf"\s*{loose(opening)}\s*(?=\[)" if opening else START + r"\s*(?=\[\s*[A-Za-z_][\w.-]*\()"
    return {"open_pattern": opened, **({"close": closing} if closing else {}), **field}


def opening_pattern(tools: ToolFormat, before: str) -> str:
    """Matches what opens a call, with what opens all calls when it is there."""
    section = rf"(?:{loose(tools.begin)}\s*)?" if tools.begin.strip() and before.strip() else loose(tools.begin)
    return rf"\s*{section}{loose(before)}"


def closing_pattern(tools: ToolFormat, behind: str, before: str) -> dict[str, str]:
    """Matches what closes a call, with what closes all calls when it is there; else a call lasts until the next begins."""
    if behind.strip():
        section = rf"(?:\s*{loose(tools.end)})?" if tools.end.strip() else ""
        return {"close_pattern": rf"\s*{loose(behind)}{section}\s*"}
    following = rf"(?=\s*{loose(before)})" if before.strip() else ""
    if tools.end.strip():
        return {"close_pattern": rf"\s*{loose(tools.end)}\s*" + (f"|{following}" if following else "")}
    return {"close_pattern": following} if following else {}


def loose(text: str) -> str:
    """A pattern of a text: no matter how much white space is between its words and tags, and whatever its numbers and ids are."""
    parts = [part for word in text.split() for part in re.split(r"(<[^<>]+>)", word) if part]
    pattern = r"\s*".join(map(re.escape, parts))
    return pattern.replace(re.escape(INDEX), r"\d+").replace(re.escape(ID), r"[\w.:-]*")


def path_of(value: Any, wanted: Any) -> tuple[str, ...]:
    """The keys that lead to a value within objects; empty when it is not there."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if inner == wanted:
            return (key,)
        if path := path_of(inner, wanted):
            return (key, *path)
    return ()
