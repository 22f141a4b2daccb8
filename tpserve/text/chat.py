"""Chat templates: render messages to a prompt in the model's format.

Owns finding the templates of a model directory and rendering one in Jinja2's immutable sandbox, with the few names that
templates expect. Never takes a template from a request, never tokenizes. Every failure of a template is a UserError with the
template's own message.

A message's content is a text or a list of text parts. A template that supports parts gets the list, as in transformers. Other
templates would fail on a list, print it or omit it, so they get the parts joined, without a separator.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from tpserve.errors import UserError
from tpserve.text.tokenizer_config import read_json

MAX_PROMPT_CHARS = 64 << 20
MAX_ERROR_CHARS = 200
DEFAULT = "default"
"""The name of the template that is used if a model has several."""
NAME = re.compile(r"[\w-]+")
"""Matches a template's name, which --chat-template may give instead of a template."""
PRINTED = re.compile(r"""['"]text['"]: ?['"](?:\s|\\[nrt])*\Z""")
"""Matches the text before a part's text in a list that Python or JSON printed."""
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""The exceptions that a template can raise: it is untrusted code that runs on a client's values."""


class ChatTemplate:
    """A model's chat template. Without a template, `render` raises UserError with the text `missing`."""

    def __init__(
        self,
        source: str | None,
        special: Mapping[str, str] | None = None,
        where: str = "chat template",
        missing: str = "this model has no chat template: ask for completions of plain texts, or give it one with --chat-template",
    ) -> None:
        self._special = dict(special or {})
        self._missing = missing
        self._template: jinja2.Template | None = None
        self.source = source
        if source is None:
            return
        try:
            self._template = environment().from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"{where} is no valid Jinja template: {error}") from error

    @staticmethod
    def load(directory: str | os.PathLike[str], special: Mapping[str, str], given: str | None = None) -> "ChatTemplate":
        """Load the template of a tokenizer's directory, or `given`: a template's text, or the name of one of the directory's.

        `special`: the tokenizer's special tokens by role. UserError for a broken template or an unknown name; a directory
        without a template is no error.
        """
        named, path = find(Path(directory))
        if given is not None and given not in named:
            if not NAME.fullmatch(given):
                return ChatTemplate(given, special, "--chat-template")
            known = f"the model's templates {', '.join(named)}" if named else "a model's templates, and this one has none"
            raise UserError(
                f"--chat-template {given} is neither a file, nor a template itself, nor one of {known}", param="chat_template"
            )
        if given is None and named and DEFAULT not in named:
            names = ", ".join(named)
            missing = f"this model has several chat templates ({names}) and none is called {DEFAULT}; start the server with "
            return ChatTemplate(None, missing=missing + "--chat-template NAME")
        return ChatTemplate(named.get(given or DEFAULT), special, str(path))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),
        documents: Sequence[Mapping[str, Any]] = (),
        tools: Sequence[Mapping[str, Any]] = (),
        now_s: float | None = None,
    ) -> str:
        """Render `messages` to a prompt. `variables`: further names for the template. `documents`: for retrieval. `now_s`: the
        time that the template sees, if not the present.

        `tools`: the functions that the model may call, each as {"type": "function", "function": {name, description, parameters}}.

        `add_generation_prompt` opens the assistant's turn; `continue_final_message` leaves the last message open instead.
        UserError when the template fails, or when a variable has a reserved name.
        """
        if self._template is None:
            raise UserError(self._missing, param="messages")
        if continue_final_message and add_generation_prompt:
            raise UserError("continue_final_message needs add_generation_prompt false", param="continue_final_message")
        if taken := sorted(name for name in variables if name in RESERVED or name in self._special):
            raise UserError(
                f"chat_template_kwargs must not set {taken[0]}: the server gives it to the template", param="chat_template_kwargs"
            )
        # Some templates test whether tools is none without testing whether it is defined.
        always: dict[str, Any] = {"tools": list(tools) or None, "documents": list(documents) or None}
        if now_s is not None:
            always["strftime_now"] = datetime.fromtimestamp(now_s).strftime
        names = {**self._special, **always, **variables, "add_generation_prompt": add_generation_prompt}
        prompt = self._render_parts(names, messages) if any(isinstance(each.get("content"), list) for each in messages) else None
        if prompt is None:
            messages = [joined(message) for message in messages]
            try:
                prompt = self._generate(names | {"messages": messages})
            except TEMPLATE_ERRORS as error:
                what = f"the chat template refused the messages: {shown(error)}"
                if isinstance(error, SecurityError):  # transformers refuses it as well
                    what += "; a template may not change values: give one that does not with --chat-template"
                raise UserError(what, param="messages") from error
        return open_final_message(prompt, messages) if continue_final_message else prompt

    def _render_parts(self, names: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> str | None:
        """Render messages with lists of parts; None when the template omits a part, or prints the list as data."""
        try:
            prompt = self._generate({**names, "messages": messages})
        except TEMPLATE_ERRORS:
            return None
        return prompt if shows_parts(prompt, messages) else None

    def _generate(self, names: Mapping[str, Any]) -> str:
        assert self._template is not None
        parts, size = [], 0
        for part in self._template.generate(names):
            parts.append(part)
            size += len(part)
            if size > MAX_PROMPT_CHARS:
                raise UserError(
                    f"the chat template made more than {MAX_PROMPT_CHARS} characters of the messages", param="messages"
                )
        return "".join(parts)


def shows_parts(prompt: str, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the prompt contains the text of every part, and not inside a printed list."""
    at = 0
    for message in messages:
        for part in content if isinstance(content := message.get("content"), list) else ():
            text = part["text"].strip()
            begin = prompt.find(text, at)
            if begin < 0:  # a template may put messages in another order
                begin = prompt.find(text)
            if begin < 0 or PRINTED.search(prompt, max(0, begin - 64), begin):
                return False
            at = begin + len(text)
    return True


def joined(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with its text parts joined to one text."""
    content = message.get("content")
    return {**message, "content": "".join(part["text"] for part in content)} if isinstance(content, list) else message


def shown(error: Exception) -> str:
    """A template's error message, truncated: it may repeat its whole input."""
    text = str(error)
    return text if len(text) <= MAX_ERROR_CHARS else text[: MAX_ERROR_CHARS - 1] + "…"


def open_final_message(prompt: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Truncate a rendered prompt after the text of the last message, or after its last part. UserError when it is not found."""
    text = messages[-1].get("content") or ""
    if isinstance(text, list):
        text = text[-1]["text"]
    for shown in (text, text.strip()):  # templates often trim
        end = prompt.rfind(shown) + len(shown)
        if shown and end >= len(shown):
            return prompt[:end]
    raise UserError(
        "continue_final_message needs a last message whose text the chat template shows", param="continue_final_message"
    )


def find(root: Path) -> tuple[dict[str, str], Path]:
    """The templates by name, and their file. As in transformers, only the newest convention that the directory uses counts."""
    files = {DEFAULT: root / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((root / "additional_chat_templates").glob("*.jinja"))}
    named = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    if named:
        return named, files[DEFAULT]
    for path in (root / "chat_template.json", root / "tokenizer_config.json"):
        template = read_json(path).get("chat_template")
        if isinstance(template, str):
            return {DEFAULT: template}, path
        if template:
            return _named(template, path), path
    return {}, root


def _named(templates: Any, path: Path) -> dict[str, str]:
    """Parse several templates in one file: an object by name, or a list of objects with `name` and `template`."""
    try:
        named = templates if isinstance(templates, dict) else {entry["name"]: entry["template"] for entry in templates}
    except (TypeError, KeyError):
        named = {}
    if not named or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise UserError(f"{path}: chat_template is neither a template nor a list of named ones; download the model again")
    return named


class GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; a server renders only its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the nodes of the tag's body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateNamespace(Namespace):
    """`namespace()` of templates: no attribute with a leading underscore, which could reach into the interpreter."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as Jinja's, so that a template may name an attribute self
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not have the attribute {name!r}")


def environment() -> ImmutableSandboxedEnvironment:
    """The sandbox with the names that templates on the hub expect, as in transformers: values cannot be changed, not by
    `list.append` either."""
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    sandbox.filters["tojson"] = to_json  # Jinja's own escapes for HTML
    names: dict[str, Callable[..., Any]] = {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": TemplateNamespace,
    }
    sandbox.globals.update(names)
    return sandbox


def raise_exception(message: str) -> NoReturn:
    """Raise TemplateError; templates call it to refuse messages."""
    raise jinja2.TemplateError(message)


def strftime_now(pattern: str) -> str:
    """The local time, formatted for a template."""
    return datetime.now().strftime(pattern)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` with the parameters that transformers gives it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


RESERVED = frozenset(
    {"messages", "add_generation_prompt", "continue_final_message", "tools", "documents", "self", "super", "loop", "caller"}
    | {f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
    | {"additional_special_tokens", "varargs", "kwargs", "true", "false", "none", "True", "False", "None"}
    | environment().globals.keys()
)
"""Names with a meaning in templates; a request must not set them."""
