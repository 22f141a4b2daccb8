"""How a chat template writes tool calls, measured from renderings of an assistant's turn with one and with two calls."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct

from tpserve.response_template.format import ID, INDEX, TaggedArguments, ToolFormat
from tpserve.response_template.probe import (
    CONTENT,
    KEYS,
    NAMES,
    VALUES,
    Probe,
    after,
    answer_in,
    common_prefix,
    common_suffix,
    without_prefix,
    without_suffix,
)

HEX_IDS = ("call_a0b1c2d3e4f5061728394a5b", "call_b1c2d3e4f5061728394a5ba0")
SHORT_IDS = ("aB3dE6gH9", "bC4eF7hJ0")
ONE_CALL = (NAMES[0], {KEYS[0]: VALUES[0]})
WORDS = (*NAMES, *KEYS, *VALUES)
CallId = Literal["call", "short", "function"]


class CallForm(Struct, frozen=True):
    """How calls in a message have to be handed to a template.

    `arguments`: an object, or its JSON text. `content`: of a message with calls only. `call_id`: "call", as OpenAI's; "short",
    9 letters and digits; "function", "functions.NAME:INDEX".
    """

    arguments: Literal["object", "json"] = "object"
    content: Literal["text", "null", "absent"] = "text"
    call_id: CallId = "call"

    def message(self, calls: Sequence[tuple[str, Mapping[str, Any]]], content: str = "") -> dict[str, Any]:
        """An assistant's message with calls, each a name and arguments."""
        entries = [
            {
                "id": self.id_of(name, index),
                "type": "function",
                "function": {
                    "name": name,
                    "arguments": arguments if self.arguments == "object" else json.dumps(arguments, ensure_ascii=False),
                },
            }
            for index, (name, arguments) in enumerate(calls)
        ]
        message: dict[str, Any] = {"role": "assistant", "tool_calls": entries}
        if content or self.content != "absent":
            message["content"] = content or (None if self.content == "null" else "")
        return message

    def id_of(self, name: str, index: int) -> str:
        """The id of the probe's call number `index`."""
        return f"functions.{name}:{index}" if self.call_id == "function" else self.ids[index]

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids that a template can show."""
        return {"call": HEX_IDS, "short": SHORT_IDS, "function": ()}[self.call_id]


FORMS = tuple(
    CallForm(arguments, content, call_id)
    for call_id in ("call", "short", "function")
    for arguments in ("object", "json")
    for content in ("text", "null", "absent")
)


class CallPlace(Struct, frozen=True):
    """Where a call stands in a text. `closing`: what closes it after its arguments, without members after them."""

    kind: Literal["json", "python", "tagged"]
    name: int
    name_end: int
    arguments: int
    arguments_end: int
    end: int
    closing: str = ""


def place(text: str, name: str, value: str, start: int = 0) -> CallPlace | None:
    """Find the call of `name` with the argument KEYS[0] = `value`."""
    at = text.find(name, start)
    key = text.find(KEYS[0], at)
    if at < 0 or key < 0 or text.find(value, key) < 0:
        return None
    name_end = at + len(name)
    for brace in braces(text, name_end, key):
        found = decoded(text, brace)
        if found is not None and found[0] == {KEYS[0]: value} and not text[name_end:brace].rstrip().endswith("{"):
            closing, end = closed(text, start, at, found[1])
            return CallPlace("json", at, name_end, brace, found[1], end, closing)
    if match := re.compile(rf"\(\s*({KEYS[0]}\s*=\s*(['\"]?){value}\2)").match(text, name_end):
        return CallPlace("python", at, name_end, match.start(1), match.end(), match.end())
    end = text.find(value, key) + len(value)
    if re.search(r"['\"]\s*:\s*\\?['\"]$", text[key + len(KEYS[0]) : end - len(value)]):  # an object that is no JSON
        return None
    return CallPlace("tagged", at, name_end, key, end, end)


def braces(text: str, start: int, end: int) -> list[int]:
    """The places of opening braces."""
    return [at for at in range(max(start, 0), end) if text[at] == "{"]


def decoded(text: str, at: int) -> tuple[Any, int] | None:
    """The JSON value at a place and its end."""
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except (ValueError, RecursionError):
        return None


def closed(text: str, start: int, name: int, arguments_end: int) -> tuple[str, int]:
    """What closes the object around a call, and where that object ends; nothing when the call is in no object."""
    for brace in braces(text, start, name):
        found = decoded(text, brace)
        if found is None or not isinstance(found[0], dict) or found[1] <= arguments_end:
            continue
        closing = text[arguments_end : found[1]]
        if set(closing) <= set("} \n"):
            return closing, found[1]
        for depth in range(1, 4):
            short = decoded(text[brace:arguments_end] + "}" * depth, 0)
            if short is not None:
                return "}" * depth, found[1]
    return "", arguments_end


class MeasuredCalls(Struct, frozen=True):
    """How a template takes calls and writes them."""

    form: CallForm
    tools: ToolFormat


def measure_calls(probe: Probe, header: tuple[str, str], ends: Sequence[str]) -> MeasuredCalls | None:
    """The calls of a template; None when it shows none, or none that can be written.

    `header`: the text between a user's words and an answer, and the part that opens the turn. `ends`: tokens that end a turn.
    """
    fallback = None
    rest = after(probe.turn({"content": CONTENT}), CONTENT)
    for form in FORMS:
        if fallback is not None and (form.call_id != fallback.form.call_id or form.arguments == fallback.form.arguments):
            continue  # only arguments that are JSON would be better
        text = answer_in(probe.turn(form.message([ONE_CALL])), *header)
        if text is None or (found := place(text, NAMES[0], VALUES[0])) is None:
            continue
        tools = Measure(probe, form, header, ends, rest).tools(text, found)
        if tools is None or any(word in literal for word in WORDS for literal in literals(tools)):
            continue
        if tools.arguments != "tagged":
            return MeasuredCalls(form, tools)
        fallback = fallback or MeasuredCalls(form, tools)
    return fallback


def literals(tools: ToolFormat) -> list[str]:
    """All texts of a format."""
    tags = tools.tags
    own = [tools.begin, tools.call_begin, tools.name_end, tools.call_end, tools.between, tools.end]
    return own + ([tags.begin, tags.middle, tags.end, tags.between] if tags is not None else [])


def masked(text: str, form: CallForm) -> str:
    """The text with ID in place of ids."""
    for id in form.ids:
        text = text.replace(id, ID)
    return text


class Measure:
    """Takes the parts of the calls from renderings that differ in one thing."""

    def __init__(self, probe: Probe, form: CallForm, header: tuple[str, str], ends: Sequence[str], content_rest: str) -> None:
        self._probe, self._form, self._header, self._ends, self._content_rest = probe, form, header, ends, content_rest

    def _turn(self, *calls: tuple[str, Mapping[str, Any]]) -> str:
        text = answer_in(self._probe.turn(self._form.message(calls)), *self._header)
        return masked(text or "", self._form)

    def tools(self, text: str, found: CallPlace) -> ToolFormat | None:
        """The format of the calls in `text`, which has one of them at `found`."""
        tags, name_end = None, text[found.name_end : found.arguments]
        if found.kind == "tagged":
            if (split := self._tags()) is None:
                return None
            tags, name_end = split
        one, last = self._turn(ONE_CALL), tags.end if tags else ""
        if (call := place(one, NAMES[0], VALUES[0])) is None:
            return None
        after_call = self._without_end(call.closing + one[call.end :])
        two = self._turn(ONE_CALL, (NAMES[1], {KEYS[0]: VALUES[1]}))
        first = place(two, NAMES[0], VALUES[0])
        second = place(two, NAMES[1], VALUES[1], first.end) if first else None
        if first is None or second is None:
            return self._single(one, call, name_end, after_call, tags)
        ends = two[first.name_end : first.arguments], two[second.name_end : second.arguments]
        common = common_prefix(*ends)
        if any(len(common.replace(INDEX, "0")) != len(end) for end in ends):
            return None
        if tags is None:
            name_end = common
        between, rest = first.closing + two[first.end : second.name], self._without_end(second.closing + two[second.end :])
        if not between.startswith(last) or not rest.startswith(last):
            return None
        call_begin = common_suffix(two[: first.name], between)
        between = without_suffix(between, call_begin)[len(last) :]
        call_end = common_prefix(between, rest[len(last) :])
        between, end = without_prefix(between, call_end), without_prefix(rest[len(last) :], call_end)
        begin = without_suffix(two[: first.name], call_begin)
        bare = f"{begin}{between}{end}{call_begin}".startswith("{") and set(call_end) <= set("} \n")
        return ToolFormat(
            call_begin=call_begin,
            name_end=name_end,
            call_end=call_end,
            begin=begin,
            between=between,
            end=end,
            arguments=found.kind,
            tags=tags,
            several=not bare,  # nothing says where an object ends and the next begins
        )

    def _single(self, one: str, call: CallPlace, name_end: str, rest: str, tags: TaggedArguments | None) -> ToolFormat | None:
        """The format of a template that takes one call only."""
        last = tags.end if tags else ""
        if not rest.startswith(last):
            return None
        return ToolFormat(
            call_begin=one[: call.name],
            name_end=masked(name_end, self._form),
            call_end=rest[len(last) :],
            arguments=call.kind,
            tags=tags,
            several=False,
        )

    def _tags(self) -> tuple[TaggedArguments, str] | None:
        """The text around each of two arguments, and what stands between a name and the first of them."""
        text = self._turn((NAMES[0], dict(zip(KEYS, VALUES, strict=True))))
        places = [at for word in (NAMES[0], KEYS[0], VALUES[0], KEYS[1], VALUES[1]) if (at := text.find(word)) >= 0]
        if len(places) < 5 or places != sorted(places):
            return None
        name, key, value, key2, value2 = places
        intro, middle = text[name + len(NAMES[0]) : key], text[key + len(KEYS[0]) : value]
        between, rest = text[value + len(VALUES[0]) : key2], text[value2 + len(VALUES[1]) :]
        if text[key2 + len(KEYS[1]) : value2] != middle:
            return None
        begin = common_suffix(intro, between)
        between = without_suffix(between, begin)
        end = common_prefix(between, self._without_end(rest))
        if not middle.strip() or not end.strip():
            return None
        number = self._turn((NAMES[0], {KEYS[0]: 17}))
        at = number.find(KEYS[0]) + len(KEYS[0])
        value = number.find("17", at)
        other = number[at:value]
        if not begin.strip() or not number[value + 2 :].startswith(end):
            return None
        tags = TaggedArguments(begin, middle, end, without_prefix(between, end), "" if other == middle else other)
        return tags, without_suffix(intro, begin)

    def _without_end(self, rest: str) -> str:
        """The text after the last call without what ends every answer."""
        rest = without_suffix(rest, common_suffix(self._content_rest, rest))
        for end in self._ends:
            if (at := rest.find(end)) >= 0:
                rest = rest[:at]
        return rest
