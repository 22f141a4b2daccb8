"""Reads a model's answer as it grows: reasoning, content and tool calls, by a `ResponseTemplate`.

Invariants:

    split    how the text is cut into pieces changes nothing in the joined events
    lost     text is in one event, or is a delimiter, or white space beside one; of a region that holds no call it is content
    held     only what may begin a delimiter, white space before one, and calls whose form must be known as a whole

Delimiters within a quoted text of JSON are text. A call that begins inside reasoning ends it, as models write that; the end of
reasoning that still follows is dropped.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import regex

from tpserve.response_template.regions import CallRegion, Content, Event, TextRegion, merged
from tpserve.response_template.template import Delimiter, Field, ResponseTemplate

MAX_READ_CHARS, SEEN_CHARS = 1 << 12, 1 << 10
"""Of an answer: text that has been read and is still kept, and what of it delimiters may see."""
Place = Literal["start", "reasoning", "content"]


class _Found(NamedTuple):
    """A delimiter in the text: the field that follows, where it stands, and its named groups."""

    field: Field | None
    begin: int
    end: int
    groups: dict[str, str]


class ResponseParser:
    """One answer. `prompt`: what it continues. `tools`: the argument schemas of the functions, by name.

    `reads_calls` False: calls are text like any other. `gap`: the white space between reasoning and content, to the letter, as a
    grammar writes it; None: all that is there. `calls_end_reasoning` False: calls inside reasoning are reasoning, as they are in
    the grammar of an answer. Attribute `reasoning`: the ranges of characters of the output that are reasoning.
    """

    def __init__(
        self,
        template: ResponseTemplate,
        prompt: str = "",
        tools: Mapping[str, Any] | None = None,
        *,
        reads_calls: bool = True,
        gap: str | None = None,
        calls_end_reasoning: bool = True,
    ) -> None:
        self._fields = [field for field in template.fields.values() if reads_calls or field.role != "tool_calls"]
        self._rest, self._tools, self._reads_calls, self._gap = template.rest, tools or {}, reads_calls, gap
        if self._rest is not None and self._rest not in self._fields:
            self._rest = None
        self._call_in_reasoning = template.call_in_reasoning if reads_calls and calls_end_reasoning else None
        self._unclosed: Field | None = None
        """Reasoning that a call has ended, and whose own end may follow."""
        self.reasoning: list[list[int]] = []
        self._events: list[Event] = []
        self._text = template.answer_begun(prompt)
        self._at = 0
        self._from = len(self._text)
        """Where the output begins: text before it belongs to the prompt."""
        self._region: TextRegion | CallRegion | None = None
        self._left = -1
        """Where a region ended before its text began."""
        self._entered = False
        """Whether any region has begun."""
        self._any = False
        """Whether a region has ended: white space at the beginning of the next is none of its text."""
        self._told: set[str] = set()
        self._parted: set[str] = set()
        """The roles with text that the next text of that role is joined to."""
        self._enter(self._rest, {})
        self._process(final=False)
        if gap is not None and isinstance(self._region, TextRegion) and self._region.role == "content":
            self._region.gap = ""  # the prompt has it, or it has none
        self._events.clear()

    @property
    def place(self) -> Place:
        """Where the answer stands."""
        if isinstance(self._region, TextRegion):
            if self._region.role == "reasoning":
                return "reasoning"
            if not self._any and not self._region.begun:
                return "start"
        return "start" if self._region is None and not self._any else "content"

    def feed(self, text: str) -> list[Event]:
        """Read more output; returns what became certain, neighbours of one kind as one."""
        if self._entered and self._at > MAX_READ_CHARS:
            self._forget(self._at - SEEN_CHARS)
        self._text += text
        self._process(final=False)
        return self._take()

    def finish(self) -> list[Event]:
        """The output has ended; returns the rest."""
        self._process(final=True)
        self._leave(last=True)
        if not self._entered and len(self._text) > self._from:  # the model wrote no delimiter, not even the one of content
            self._events.append(Content(self._text[self._from :]))
        return self._take()

    def _forget(self, count: int) -> None:
        """Drop text that has been read: to add to a text copies it."""
        self._text = self._text[count:]
        self._at, self._from, self._left = self._at - count, self._from - count, self._left - count

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return merged(events)

    def _process(self, final: bool) -> None:
        while True:
            found, hold = self._scan(final)
            if found is None:
                if self._add(len(self._text) if final else hold):
                    continue
                return
            field, begin, end, groups = found
            if begin == end == self._at and self._region is not None and field is self._rest and not self._region.begun:
                if self._left == begin:  # a region without text begins and ends here for ever
                    if begin == len(self._text):
                        return
                    self._add(begin + 1)
                    continue
                self._left = begin
            if self._add(begin):
                continue
            if isinstance(self._region, CallRegion) and self._region.in_text:  # the delimiter is part of a quoted text
                if begin == len(self._text):
                    return
                self._add(max(end, begin + 1))  # past one that is only looked for ahead, too
                continue
            self._note_unclosed(field)
            opened = self._region.groups if isinstance(self._region, CallRegion) else {}
            self._leave(groups={**opened, **groups}, closing=self._text[begin:end] if field is self._rest else "")
            self._at = end
            self._enter(field, groups, begin)

    def _note_unclosed(self, following: Field | None) -> None:
        """The current region ends: whether that leaves reasoning without its end, or finds it."""
        own = self._region.field if self._region is not None else None
        if own is not None and own.role == "reasoning" and following is not None and following.role == "tool_calls":
            self._unclosed = own
        elif following is self._rest and (own is None or own is self._rest):
            self._unclosed = None

    def _scan(self, final: bool) -> tuple[_Found | None, int]:
        """The first delimiter that counts here, and where text begins that may become an earlier one."""
        best: tuple[tuple[int, int, int], Field | None, dict[str, str]] | None = None
        hold = len(self._text)
        for delimiter, opens in self._expected:
            match = delimiter.pattern.search(self._text, self._at, partial=not final)
            if match is None:
                continue
            if not final and (match.partial or self._may_grow(delimiter, match)):
                hold = min(hold, match.start())
                continue
            key = (match.start(), -match.end(), opens is None)
            if best is None or key < best[0]:
                groups = {name: text for name, text in match.groupdict().items() if text is not None}
                best = key, opens, groups
        if best is None or (not final and best[0][0] >= hold):
            return None, hold
        (begin, negative_end, _), opens, groups = best
        return _Found(self._rest if opens is None else opens, begin, -negative_end, groups), hold

    def _delimiters(self) -> list[tuple[Delimiter, Field | None]]:
        """The delimiters that count in the current region, each with the field that it opens; None: it closes the region."""
        region = self._region
        field = region.field if region is not None else None
        if field is not None and field is not self._rest:
            ends: list[tuple[Delimiter, Field | None]] = [(field.close, None)] if field.close is not None else []
            if field.role == "reasoning" and (call := self._call_in_reasoning) is not None and call.open is not None:
                ends.append((call.open, call))
            return ends
        expected: list[tuple[Delimiter, Field | None]] = [(each.open, each) for each in self._fields if each.open is not None]
        if field is not None and field.close is not None:
            expected.append((field.close, None))
        if self._unclosed is not None and self._unclosed.close is not None:
            expected.append((self._unclosed.close, None))
        return expected

    def _may_grow(self, delimiter: Delimiter, match: "regex.Match[str]") -> bool:
        """Whether a match could be another one, or none, if text followed."""
        if match.end() == len(self._text):
            return not delimiter.is_final or match.start() == match.end()
        if delimiter.undecided.match(self._text, match.start(), partial=True) is not None:
            return True
        if not delimiter.sees_end:
            return False
        longer = delimiter.pattern.match(self._text + "\x00", match.start())
        return longer is None or longer.span() != match.span() or longer.groupdict() != match.groupdict()

    def _enter(self, field: Field | None, groups: Mapping[str, str], begin: int = 0) -> None:
        self._entered |= field is not None
        if field is None:
            self._region = None
        elif field.role == "tool_calls":
            self._region = CallRegion(field, groups, self._text[begin : self._at], self._tools)
        else:
            more = field.role == "content" and self._reads_calls
            strip = field.strips and (self._any or field.role == "reasoning")
            self._region = TextRegion(field, strip, more, self._gap if field.role == "content" else None)
        self._expected = self._delimiters()

    def _add(self, end: int) -> bool:
        """Text up to `end` belongs to the current region; whether that ended of itself before."""
        begin, self._at = self._at, end
        if begin == end or self._region is None:
            return False
        text = self._text[begin:end]
        if isinstance(self._region, CallRegion):
            self._events += self._region.add(text)
            if not (self._region.field.ends_itself and self._region.is_whole):
                return False
            self._at = end - self._region.give_back()
            self._leave()
            self._enter(self._rest, {})
            return True
        if self._region.role == "reasoning":
            own = max(0, begin - self._from), max(0, end - self._from)
            if self.reasoning and self.reasoning[-1][1] == own[0]:
                self.reasoning[-1][1] = own[1]
            elif own[1] > own[0]:
                self.reasoning.append([*own])
        if self._from > begin:  # the prompt's own, which nobody is told
            self._region.add(text[: self._from - begin])
            text = text[self._from - begin :]
        if shown := self._region.add(text):
            joint = self._region.field.join if self._region.role in self._parted else ""
            self._events.append(self._region.event(joint + shown))
            self._parted.discard(self._region.role)
            self._told.add(self._region.role)
        return False

    def _leave(self, *, groups: Mapping[str, str] | None = None, closing: str = "", last: bool = False) -> None:
        """The current region ends, with the delimiter `closing`."""
        region, self._region = self._region, None
        match region:
            case CallRegion():
                self._events += region.end(groups or {}, closing)
                self._part(region.num_calls > 0)
            case TextRegion():
                if last and region.role == "content" and region.held:
                    self._events.append(region.event(region.held))
                self._part(region.field is not self._rest)
                self._any |= region.begun

    def _part(self, ended: bool) -> None:
        """A region ended that parts the texts before it from those behind."""
        self._any |= ended
        self._parted |= self._told if ended else set()
