"""A model's `response_template`, checked and compiled. Source of the form: transformers, docs/source/en/chat_response_parsing.md.

A template names the fields of an answer and the delimiters around each. Served are the fields `content`, `tool_calls` and
reasoning, called `thinking`, `reasoning` or `reasoning_content`. Patterns are the regex package's; dot matches line breaks.
`repeats` and `optional` change nothing: every field may come several times, or not at all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import regex

from tpserve.errors import UserError
from tpserve.response_template.content import CONTENT_KINDS, PLACEHOLDER, is_text

Role = Literal["reasoning", "content", "tool_calls"]
ROLES: Mapping[str, Role] = {
    "thinking": "reasoning",
    "reasoning": "reasoning",
    "reasoning_content": "reasoning",
    "content": "content",
    "tool_calls": "tool_calls",
}
"""Names of fields in files -> what they mean."""
MAX_BLANKS = 16
r"""What `\s*` in a delimiter matches at most."""
_BLANKS = regex.compile(r"\[(?:\\.|[^\]\\])*\]|\\s([*+])|\\.", regex.DOTALL)
_ENDS_WITH_NAME = regex.compile(r"\(\?P<name>[^()]*\)(?:\\s\{[\d,]*\})?\Z")
_END = regex.compile(r"\$|\\[bBzZ]")
_TEMPLATE_KEYS = {"version", "defaults", "fields", "start_anchor", "start_anchor_pattern"}
_FIELD_KEYS = {
    *("open", "open_pattern", "close", "close_pattern", "content", "content_args"),
    *("repeats", "join", "optional", "transform", "transform_each"),
}


class Delimiter(NamedTuple):
    """Where a region begins or ends.

    `undecided` matches, in part, where the first choice of `pattern` could still be met if more text came. `is_final`: a match at
    the end of the text is decided. `sees_end`: the pattern asks whether the text ends.
    """

    pattern: "regex.Pattern[str]"
    undecided: "regex.Pattern[str]"
    is_final: bool
    sees_end: bool

    @staticmethod
    def of(pattern: str, *, is_final: bool = False) -> "Delimiter":
        """A delimiter of a pattern. regex.error when it is none."""
        compiled = regex.compile(pattern, regex.DOTALL)
        undecided = regex.compile(f"(?>{pattern})(?!)", regex.DOTALL)
        return Delimiter(compiled, undecided, is_final, _END.search(pattern) is not None)


@dataclass(frozen=True)
class Field:
    """A field of the answer. Without `open` it takes all text outside the other fields; without `close` it goes on to the end."""

    role: Role
    open: Delimiter | None
    close: Delimiter | None
    content: str
    content_args: Mapping[str, Any]
    transform: Any
    transform_each: bool
    join: str = "\n"
    """Goes between two texts of the field with something else between them."""

    @property
    def ends_itself(self) -> bool:
        """Whether nothing marks the end, so that JSON's own end counts."""
        own = self.content == "json" and not self.content_args
        return own and (self.close is None or self.close.pattern.pattern.startswith(("(?=", "(?<=")))

    @property
    def strips(self) -> bool:
        """Whether white space around the text is no part of it."""
        return bool(self.content_args.get("strip", True))


@dataclass(frozen=True)
class ResponseTemplate:
    """`anchor`: where the assistant's turn begins in a prompt."""

    anchor: "regex.Pattern[str]"
    fields: Mapping[Role, Field]

    @staticmethod
    def load(spec: Any) -> "ResponseTemplate":
        """Check and compile the value of `response_template`. UserError names what is wrong."""
        if not isinstance(spec, dict):
            raise _wrong("must be an object")
        if unknown := sorted(spec.keys() - _TEMPLATE_KEYS):
            raise _wrong(f"has unknown keys: {', '.join(map(str, unknown))}")
        if (version := spec.get("version", 1)) != 1:
            raise _wrong(f"has version {version}; 1 is known")
        defaults, listed = spec.get("defaults", {}), spec.get("fields")
        if not isinstance(defaults, dict) or defaults.keys() - {"role"}:
            raise _wrong("may have a default for role only")
        if not isinstance(listed, dict) or not listed:
            raise _wrong("needs fields")
        if unknown := sorted(listed.keys() - ROLES.keys()):
            raise _wrong(f"has a field {unknown[0]!r}; served are {', '.join(ROLES)}")
        fields: dict[Role, Field] = {}
        for name, value in listed.items():
            field = _field(name, value)
            if field.role in fields:
                raise _wrong(f"has two fields for {field.role}")
            fields[field.role] = field
        if sum(field.open is None for field in fields.values()) > 1:
            raise _wrong("has two fields without open; one may take the text outside the others")
        anchor = _delimiter("", spec, "start_anchor", "start_anchor_pattern")
        if anchor is None:
            raise _wrong("needs start_anchor or start_anchor_pattern")
        return ResponseTemplate(anchor.pattern, fields)

    @property
    def rest(self) -> Field | None:
        """The field that takes the text outside the others."""
        return next((field for field in self.fields.values() if field.open is None), None)

    @cached_property
    def call_in_reasoning(self) -> Field | None:
        """The field of calls, if a call that begins inside reasoning differs from reasoning that speaks of calls: by a marker and
        by what has to follow it. None for reasoning whose end looks ahead: that says itself what ends it."""
        field, reasoning = self.fields.get("tool_calls"), self.fields.get("reasoning")
        if field is None or field.open is None or reasoning is None or reasoning.close is None:
            return None
        opening = field.open.pattern.pattern
        if r"\A" in opening or "(?=" in reasoning.close.pattern.pattern:
            return None
        if field.content == "json" and "(?P<name>" not in opening:
            return replace(field, open=Delimiter.of(rf"(?:{opening})(?=\s{{0,{MAX_BLANKS}}}[\[{{])"))
        if field.content == "xml-inline" and _ENDS_WITH_NAME.search(opening):
            return replace(field, open=Delimiter.of(rf"(?:{opening})(?=\s{{0,{MAX_BLANKS}}}<[a-z/])"))
        return field

    def answer_begun(self, prompt: str) -> str:
        """The end of a prompt that belongs to the answer: after the last anchor, all of it without one."""
        end = 0
        for match in self.anchor.finditer(prompt):
            end = match.end()
        return prompt[end:]


def _field(name: str, value: Any) -> Field:
    if not isinstance(value, dict):
        raise _wrong(f"{name} must be an object")
    if unknown := sorted(value.keys() - _FIELD_KEYS):
        raise _wrong(f"{name} has unknown keys: {', '.join(map(str, unknown))}")
    content, args, transform = value.get("content", "text"), value.get("content_args", {}), value.get("transform")
    if content not in CONTENT_KINDS:
        raise _wrong(f"{name} has content {content!r}; known are {', '.join(CONTENT_KINDS)}")
    if not isinstance(args, dict):
        raise _wrong(f"{name}.content_args must be an object")
    if content == "xml-inline":
        tags = _delimiter(f"{name}.content_args", args, "tag", "tag_pattern")
        if tags is None or not {"key", "value"} <= tags.pattern.groupindex.keys():
            raise _wrong(f"{name}.content_args.tag_pattern needs the groups key and value")
    role = ROLES[name]
    if role != "tool_calls" and (content != "text" or transform is not None):
        raise _wrong(f"{name} must be plain text: no content, no transform")
    each = value.get("transform_each", False)
    if each not in (True, False) or (each and transform is None):
        raise _wrong(f"{name}.transform_each must be true or false, and goes with a transform")
    _check_transform(name, transform)
    if not is_text(join := value.get("join", "\n")):
        raise _wrong(f"{name}.join must be a text")
    opening, closing = (_delimiter(name, value, end, f"{end}_pattern") for end in ("open", "close"))
    names = {group for each in (opening, closing) if each is not None for group in each.pattern.groupindex}
    if names and transform is None:
        raise _wrong(f"{name} names groups ({', '.join(sorted(names))}) and has no transform that would take them")
    return Field(role, opening, closing, content, args, transform, bool(each), join)


def _delimiter(scope: str, value: Mapping[str, Any], literal_key: str, pattern_key: str) -> Delimiter | None:
    where = f"{scope}.{literal_key}" if scope else literal_key
    if literal_key in value and pattern_key in value:
        raise _wrong(f"has {where} and {pattern_key}; keep one of them")
    if literal_key in value:
        texts = [value[literal_key]] if isinstance(value[literal_key], str) else value[literal_key]
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise _wrong(f"{where} must be a text or a list of texts, none of them empty")
        longest_first = sorted(set(texts), key=lambda text: (-len(text), text))
        grows = any(one != other and one.startswith(other) for one in texts for other in texts)
        return Delimiter.of("|".join(map(regex.escape, longest_first)), is_final=not grows)
    if (pattern := value.get(pattern_key)) is None:
        return None
    try:
        return Delimiter.of(_BLANKS.sub(_bounded, pattern))
    except (regex.error, TypeError, RecursionError) as error:
        raise _wrong(f"{where}_pattern is no regular expression: {error}") from None


def _bounded(found: "regex.Match[str]") -> str:
    r"""A `\s*` or `\s+` with an end: a model at a loss may write thousands of blanks, and a search begins at each of them."""
    return found[0] if found[1] is None else rf"\s{{{0 if found[1] == '*' else 1},{MAX_BLANKS}}}"


def _check_transform(name: str, transform: Any) -> None:
    if isinstance(transform, dict | list):
        for part in transform.values() if isinstance(transform, dict) else transform:
            _check_transform(name, part)
    elif is_text(transform) and PLACEHOLDER.search(transform) and not PLACEHOLDER.fullmatch(transform):
        raise _wrong(f"{name}.transform mixes a placeholder with other text in {transform!r}")


def _wrong(text: str) -> UserError:
    return UserError(f"response_template {text}")
