"""The regions of an answer: text of reasoning or content, and calls, each told as it grows, in events."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tpserve.response_template.call_reader import NOWHERE, CallArguments, CallBegin, CallEvent, CallPaths, CallReader
from tpserve.response_template.content import read_content, transformed
from tpserve.response_template.schema_types import typed
from tpserve.response_template.template import Field


class Reasoning(NamedTuple):
    """More text of the reasoning."""

    text: str


class Content(NamedTuple):
    """More text of the content."""

    text: str


Event = Reasoning | Content | CallBegin | CallArguments


class TextRegion:
    """A region of reasoning or content. `strip`: white space at its beginning is dropped; of it only `gap`, unless that is None.

    `holds`: white space at its end may be dropped, too, and waits.
    """

    def __init__(self, field: Field, strip: bool, holds: bool, gap: str | None) -> None:
        self.field, self.role, self.gap = field, field.role, gap
        self.begun = False
        self.held = ""
        self._strip = strip
        self._holds = field.strips and (holds or field.role == "reasoning")

    def add(self, text: str) -> str:
        """More text; returns what became certain."""
        if self._strip and not self.begun:
            text = text.lstrip() if self.gap is None else self._behind_gap(text, self.gap)
        if not text:
            return ""
        self.begun = True
        text = self.held + text
        certain = text.rstrip() if self._holds else text
        self.held = text[len(certain) :]
        return certain

    def _behind_gap(self, text: str, gap: str) -> str:
        """The text without the gap, of which more may follow."""
        while text and gap and text[0] == gap[0]:
            text, gap = text[1:], gap[1:]
        self.gap = gap
        return text

    def event(self, text: str) -> Event:
        """The event of more text."""
        return Reasoning(text) if self.role == "reasoning" else Content(text)


class CallRegion:
    """A region of calls. `opening`: the delimiter as it was written."""

    def __init__(self, field: Field, groups: Mapping[str, str], opening: str, tools: Mapping[str, Any]) -> None:
        self.field, self.groups = field, groups
        self.begun = False
        self._opening, self._tools = opening, tools
        self._parts: list[str] = []
        self.num_calls = 0
        self._reader: CallReader | None = None
        self._quotes = CallReader(CallPaths(None, (NOWHERE,))) if field.content == "json-keyed-calls" else None
        """Follows JSON that is read as a whole."""
        if field.content == "json" and not field.content_args:
            paths = CallPaths.of(field.transform, field.transform_each)
            if paths is not None:
                given = self._given() if paths.name is None else None
                if paths.name is None and given is None:  # the delimiter has no name this time
                    paths = CallPaths(("name",), ("arguments",), listed=True)
                self._reader = CallReader(paths, given, stops=field.ends_itself)

    def _given(self) -> CallBegin | None:
        """The call whose name the delimiter tells."""
        try:
            name, _, id = _call(transformed(self.field.transform, {**self.groups, "content": {}}))
        except ValueError:
            return None
        return CallBegin(name, id)

    @property
    def is_whole(self) -> bool:
        """Whether the JSON has ended."""
        return self._reader is not None and self._reader.end is not None

    def give_back(self) -> int:
        """Drop the text behind the JSON; returns its length."""
        text = "".join(self._parts)
        end = self._reader.end if self._reader is not None else None
        self._parts = [text[:end]]
        return len(text) - len(self._parts[0])

    @property
    def in_text(self) -> bool:
        """Whether what follows is within a quoted text."""
        reader = self._reader or self._quotes
        return reader is not None and reader.in_text

    def add(self, text: str) -> Sequence[Event]:
        """More text."""
        self.begun = True
        self._parts.append(text)
        if self._quotes is not None:
            self._quotes.feed(text)
        return [] if self._reader is None else self._counted(self._reader.feed(text))

    def end(self, groups: Mapping[str, str], closing: str) -> Sequence[Event]:
        """The rest of the region: its calls, or its text when it holds none."""
        events: list[CallEvent] = []
        if self._reader is not None:
            events = self._reader.feed("")
        else:
            text = "".join(self._parts)
            calls, behind = self._parsed(text, groups), ""
            if calls is None and self.field.content == "python-call-list" and not closing:  # perhaps for text behind the list
                text, bracket, behind = text.rpartition("]")
                calls = self._parsed(text + bracket, groups)
            for name, arguments, id in calls or ():
                events += [CallBegin(name, id), CallArguments(arguments)]
            if calls and behind.strip():
                return [*self._counted(events), Content(behind.strip())]
        counted = self._counted(events)
        return counted if self.num_calls else [Content(self._opening + "".join(self._parts) + closing)]

    def _counted(self, events: Sequence[CallEvent]) -> Sequence[Event]:
        self.num_calls += sum(isinstance(event, CallBegin) for event in events)
        return events

    def _parsed(self, text: str, groups: Mapping[str, str]) -> list[tuple[str, str, str | None]] | None:
        """The calls of a text that is read as a whole; None when there are none."""
        field = self.field
        names = {**self.groups, **groups}
        try:
            value = read_content(text, field.content, field.content_args)
            if field.transform_each:
                values = [transformed(field.transform, {**names, **each}) for each in value]
            elif field.transform is not None:
                values = [transformed(field.transform, {**names, "content": value})]
            else:
                values = value if isinstance(value, list) else [value]
            calls = [_call(each) for each in values]
        except (ValueError, TypeError):
            return None
        return [(name, _arguments(arguments, self._tools.get(name)), id) for name, arguments, id in calls]


def _call(value: Any) -> tuple[str, Any, str | None]:
    """Name, arguments and id of a call. ValueError when the value is none."""
    function = value.get("function", value) if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name.strip():
        raise ValueError("no call")
    id = value.get("id")
    return name.strip(), function.get("arguments", function.get("parameters", {})), id if isinstance(id, str) and id else None


def _arguments(arguments: Any, schema: Any) -> str:
    """The arguments as JSON; a text that stands for a value of another type becomes that value."""
    if isinstance(arguments, str):
        return arguments
    if isinstance(arguments, dict):
        arguments = {key: typed(value, key, schema) for key, value in arguments.items()}
    return json.dumps(arguments, ensure_ascii=False)


def merged(events: Sequence[Event]) -> list[Event]:
    """The events with neighbours of one kind as one."""
    if len(events) < 2:
        return list(events)
    found: list[Event] = []
    for event in events:
        if found and not isinstance(event, CallBegin) and type(found[-1]) is type(event):
            found[-1] = type(event)(found[-1].text + event.text)
        else:
            found.append(event)
    return found
