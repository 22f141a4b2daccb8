"""The literal text that a model writes around reasoning, content and tool calls, as its chat template renders them.

A `response_template` (see `template`) says how an answer is read, with patterns that forgive; an `AnswerFormat` says how it is
written, to the letter. A grammar is built from the latter, since a pattern cannot be turned around.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct

INDEX = "{index}"
"""In a literal: the number of a call, from 0."""
ID = "{id}"
"""In a literal: the id of a call."""
NAME = "{name}"
"""In the text behind the name of a function: the name again."""
KEY = "{key}"
"""In the end of an argument's tag: its key."""
TYPE = "{type}"
"""In the text before a value that is no string: its type in JSON (integers are numbers)."""


class ReasoningFormat(Struct, frozen=True):
    """The text around reasoning, with all line breaks: "<think>\\n" and "\\n</think>\\n\\n"."""

    begin: str
    end: str


class TaggedArguments(Struct, frozen=True):
    """The text around each argument, when arguments are no JSON object: `begin` KEY `middle` VALUE `end`.

    A value of a schema of type string is written as it is, any other as JSON. `between`: between two arguments. `other_middle`:
    the middle before a value that is no string, when that differs.

    `mark`: what stands around strings, in arguments and within values; then all values are in this dialect of JSON, with bare
    keys and no blanks. `sorts`: arguments and keys come in alphabetical order.

    `item`: the key of an array's items; then objects and arrays are tags within tags, down to strings and other values.
    """

    begin: str
    middle: str
    end: str
    between: str = ""
    other_middle: str = ""
    mark: str = ""
    sorts: bool = False
    item: str = ""


class ToolFormat(Struct, frozen=True):
    """The text around tool calls.

        begin (call_begin NAME name_end ARGUMENTS call_end) between (call_begin ...) end

    `arguments`: "json", one JSON object; "tagged", each in the text of `tags`; "python", keyword arguments `key=value` with `, `
    between, values as in Python or JSON. `several`: whether one answer may hold several calls.
    """

    call_begin: str
    name_end: str
    call_end: str
    begin: str = ""
    between: str = ""
    end: str = ""
    arguments: Literal["json", "tagged", "python"] = "json"
    tags: TaggedArguments | None = None
    several: bool = True


class AnswerFormat(Struct, frozen=True):
    """An answer: reasoning, then content, then tool calls, each optional. None: the model does not write that.

    `content_begin` and `content_end`: around content, mostly empty. `tools_after_content`: between content and calls; None when
    an answer has one or the other. `ends_content`: the end of content stands before calls also when there is none.
    """

    reasoning: ReasoningFormat | None = None
    content_begin: str = ""
    content_end: str = ""
    tools_after_content: str | None = ""
    tools: ToolFormat | None = None
    ends_content: bool = False


Call = tuple[str, Mapping[str, Any]]
"""A name and arguments."""


def written(format: AnswerFormat, reasoning: str = "", content: str = "", calls: Sequence[Call] = ()) -> str:
    """The text of an answer, to the letter. The format has all that is given; empty is left out."""
    text = ""
    if reasoning and format.reasoning is not None:
        text += f"{format.reasoning.begin}{reasoning}{format.reasoning.end}"
    if content:
        text += f"{format.content_begin}{content}{format.content_end}"
    elif calls and format.ends_content:
        text += format.content_end
    if not calls or (tools := format.tools) is None:
        return text
    bodies = [
        f"{tools.call_begin}{name}{tools.name_end.replace(NAME, name)}{_arguments(tools, arguments)}{tools.call_end}".replace(
            INDEX, str(index)
        )
        for index, (name, arguments) in enumerate(calls)
    ]
    between = (format.tools_after_content or "") if content else ""
    return text + between + (tools.begin + tools.between.join(bodies) + tools.end).replace(ID, "a1B2c3D4e")


def _arguments(tools: ToolFormat, arguments: Mapping[str, Any]) -> str:
    texts = {key: json.dumps(value, ensure_ascii=False) for key, value in arguments.items()}
    if tools.arguments == "json":
        return json.dumps(arguments, ensure_ascii=False)
    if tools.arguments == "python" or (tags := tools.tags) is None:
        return ", ".join(f"{key}={text}" for key, text in texts.items())
    if tags.mark:
        return marked(arguments, tags)[1:-1]
    if tags.item:
        return "".join(nested(key, value, tags) for key, value in arguments.items())
    parts = []
    for key, value in arguments.items():
        is_text = isinstance(value, str)
        middle = tags.middle if is_text else (tags.other_middle or tags.middle).replace(TYPE, type_of(value))
        parts.append(f"{tags.begin}{key}{middle}{value if is_text else texts[key]}{tags.end}")
    return tags.between.join(parts)


def marked(value: Any, tags: TaggedArguments) -> str:
    """A value in the dialect of JSON whose strings stand between marks."""
    match value:
        case str():
            return f"{tags.mark}{value}{tags.mark}"
        case Mapping():
            keys = sorted(value) if tags.sorts else value
            return "{" + ",".join(f"{bare_key(key)}:{marked(value[key], tags)}" for key in keys) + "}"
        case list():
            return "[" + ",".join(marked(item, tags) for item in value) + "]"
    return json.dumps(value)


def nested(key: str, value: Any, tags: TaggedArguments) -> str:
    """An argument in tags, and within them those of its members or items."""
    match value:
        case str():
            inner = value
        case Mapping():
            inner = "".join(nested(*member, tags) for member in value.items())
        case list():
            inner = "".join(nested(tags.item, item, tags) for item in value)
        case _:
            inner = json.dumps(value)
    return f"{tags.begin}{key}{tags.middle}{inner}{tags.end.replace(KEY, key)}"


def bare_key(key: str) -> str:
    """A key of that dialect; in quotes when it would not be read otherwise."""
    return key if re.fullmatch(r"[\w.$-]+", key) else json.dumps(key, ensure_ascii=False)


def type_of(value: Any) -> str:
    """The type of a value in JSON."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
    return "object" if isinstance(value, Mapping) else "array"
