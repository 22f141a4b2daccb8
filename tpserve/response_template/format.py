"""The literal text that a model writes around reasoning, content and tool calls, as its chat template renders them.

A `response_template` (see `template`) says how an answer is read, with patterns that forgive; an `AnswerFormat` says how it is
written, to the letter. A grammar is built from the latter, since a pattern cannot be turned around.
"""

from typing import Literal

from msgspec import Struct

INDEX = "{index}"
"""In a literal: the number of a call, from 0."""
ID = "{id}"
"""In a literal: the id of a call."""


class ReasoningFormat(Struct, frozen=True):
    """The text around reasoning, with all line breaks: "<think>\\n" and "\\n</think>\\n\\n"."""

    begin: str
    end: str


class TaggedArguments(Struct, frozen=True):
    """The text around each argument, when arguments are no JSON object: `begin` KEY `middle` VALUE `end`.

    A value of a schema of type string is written as it is, any other as JSON. `between`: between two arguments.
    """

    begin: str
    middle: str
    end: str
    between: str = ""


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

    `content_begin` and `content_end`: around content, mostly empty. `tools_after_content`: between content and calls.
    """

    reasoning: ReasoningFormat | None = None
    content_begin: str = ""
    content_end: str = ""
    tools_after_content: str = ""
    tools: ToolFormat | None = None
