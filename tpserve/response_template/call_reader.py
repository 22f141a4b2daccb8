"""Finds the names and the arguments of calls in JSON that is still being written.

What a model writes need not be JSON; whatever it is, a reader takes it and says what it found.
"""

import json
import re
from typing import Any, NamedTuple

from tpserve.response_template.content import PLACEHOLDER

Path = tuple[str, ...]
EACH = "*"
"""In a path: an element of an array."""
NOWHERE = "\0"
"""In a path: no key of a model's."""
_TOKEN = re.compile(r'[ \t\r\n]+|[{}\[\]:,"]|[^ \t\r\n{}\[\]:,"]+')
_IN_TEXT = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)


class CallBegin(NamedTuple):
    """A call; its arguments follow. `id`: the model's own, or None."""

    name: str
    id: str | None = None


class CallArguments(NamedTuple):
    """More text of the arguments of the last call, which is JSON if the model wrote JSON."""

    text: str


CallEvent = CallBegin | CallArguments


ARGUMENTS = ("arguments",), ("parameters",)
"""The end of a path to arguments; models write one for the other."""


class CallPaths(NamedTuple):
    """Where the calls of a JSON text are. `name` None: it stands outside the text. `listed`: the text may be a list of calls."""

    name: Path | None
    arguments: Path
    listed: bool = False

    @staticmethod
    def of(transform: Any, each: bool) -> "CallPaths | None":
        """The places that a field's transform names; None when it needs the whole value."""
        call = transform.get("function", transform) if isinstance(transform, dict) else None
        if not isinstance(call, dict):
            return None
        texts = [call.get(key) for key in ("name", "arguments")]
        matches = [PLACEHOLDER.fullmatch(text) if isinstance(text, str) else None for text in texts]
        if None in matches:
            return None
        name, arguments = (tuple(match[1].split(".")) for match in matches if match is not None)
        if each:
            return CallPaths((EACH, *name), (EACH, *arguments))
        if arguments[0] != "content":
            return None
        return CallPaths(name[1:], arguments[1:], listed=True) if name[0] == "content" else CallPaths(None, arguments[1:])


class CallReader:
    """Reads one JSON text as it grows. `given`: the name of the call that stands outside the text.

    `stops`: at the end of the first object or list; else what follows is read as well.
    """

    def __init__(self, paths: CallPaths, given: CallBegin | None = None, *, stops: bool = False) -> None:
        self._stops = stops
        self._deepest = max(len(paths.name or ()), len(paths.arguments)) + 2
        """No more of the path is looked at: a model may open thousands of lists."""
        self._paths = paths
        self._events: list[CallEvent] = [] if given is None else [given]
        self._text = ""
        self._at = 0
        self._path: list[str | None] = []
        """For each open container: the key of an object, None before the first, EACH for an array."""
        self._text_begin: int | None = None
        """Where the text that is open begins."""
        self._is_key = False
        self._named = given is not None
        self._shown: int | None = None
        """While arguments are read: the index up to which they were returned."""
        self._depth = 0
        self._quoted = False
        """Whether the arguments are a text that holds JSON."""
        self._waiting = ""
        """Arguments that stand before their name."""
        self._has_arguments = False
        self._bare_end: int | None = None
        """Where a number or a word ends, which more text may continue."""
        self.end: int | None = None
        """Where the first object or list ends, in all text so far."""

    @property
    def in_text(self) -> bool:
        """Whether what follows is part of a quoted text."""
        return self._text_begin is not None

    def feed(self, text: str) -> list[CallEvent]:
        """Read more text; returns what it tells of calls."""
        self._text += text
        while self._at < len(self._text) and not (self._stops and self.end is not None):
            if self._text_begin is not None:
                if not self._end_text():
                    break
                continue
            match = _TOKEN.match(self._text, self._at)
            assert match is not None
            self._token(match[0], match.start(), match.end())
        if self._shown is not None and not self._quoted:
            self._show(self._at)
        events, self._events = self._events, []
        return events

    def _token(self, token: str, begin: int, end: int) -> None:
        self._at = end
        match token:
            case '"':
                self._text_begin = begin
                self._is_key = bool(self._path) and self._path[-1] is None
                if not self._is_key:
                    self._value_begins(begin)
            case "{" | "[":
                self._value_begins(begin)
                self._path.append(None if token == "{" else EACH)
            case "}" | "]":
                if self._path:
                    self._path.pop()
                    self._value_ends(end)
            case ",":
                if self._path and self._path[-1] != EACH:
                    self._path[-1] = None
            case ":":
                pass
            case _ if token.strip() and not (self._path and self._path[-1] is None):
                self._value_begins(begin)
                self._bare_end = end if self._shown is not None and self._depth == len(self._path) else None
                self._value_ends(end)

    def _end_text(self) -> bool:
        """Go on in a quoted text; whether it has ended."""
        assert self._text_begin is not None
        match = _IN_TEXT.match(self._text, self._at)
        assert match is not None
        self._at = match.end()
        if not self._text.startswith('"', self._at):
            return False
        self._at += 1
        begin, self._text_begin = self._text_begin, None
        if self._is_key:
            self._path[-1] = _unquoted(self._text[begin : self._at])
            return True
        if self._here() == self._paths.name:
            self._name(_unquoted(self._text[begin : self._at]))
        elif self._quoted and self._depth == len(self._path):
            self._add(_unquoted(self._text[begin : self._at]))
            self._shown, self._quoted = None, False
        self._value_ends(self._at)
        return True

    def _here(self) -> tuple[str | None, ...]:
        listed = self._paths.listed and self._path[:1] == [EACH]
        return tuple(self._path[1 if listed else 0 : self._deepest])

    def _value_begins(self, at: int) -> None:
        if self._has_arguments and at != self._bare_end:  # one call has them once
            return
        if self._shown is None and self._is_arguments(self._here()):
            self._shown, self._depth, self._quoted = at, len(self._path), self._text[at] == '"'

    def _is_arguments(self, here: tuple[str | None, ...]) -> bool:
        own = self._paths.arguments
        if here == own:
            return True
        return own[-1:] in ARGUMENTS and here[-1:] in ARGUMENTS and here[:-1] == own[:-1]

    def _value_ends(self, end: int) -> None:
        if self._shown is not None and len(self._path) == self._depth:
            self._show(end)
            self._shown = None
        own = self._paths.arguments[:-1] if self._paths.arguments else None
        if own is not None and self._here() == own and self._paths.name is not None:  # the object of a call
            if self._named and not self._has_arguments:
                self._add("{}")
            self._named, self._waiting, self._has_arguments = False, "", False
        if not self._path and self.end is None and self._text[end - 1] in "]}":
            self.end = end

    def _name(self, name: str) -> None:
        if name and not self._named:
            self._named = True
            self._events.append(CallBegin(name))
            self._add(self._waiting)
            self._waiting = ""

    def _show(self, end: int) -> None:
        assert self._shown is not None
        self._add(self._text[self._shown : end])
        self._shown = end

    def _add(self, text: str) -> None:
        if not text:
            return
        self._has_arguments = True
        if self._named:
            self._events.append(CallArguments(text))
        else:
            self._waiting += text


def _unquoted(quoted: str) -> str:
    try:
        return str(json.loads(quoted, strict=False))
    except ValueError:
        return quoted[1:-1]
