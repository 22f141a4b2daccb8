"""The grammar of a request's output, from the fields of structured output: OpenAI's, vLLM's, vLLM's older ones and SGLang's.

    response_format      text | json_object | json_schema | structural_tag, also regex | grammar
    structured_outputs   one of json, json_object, regex, choice, grammar, structural_tag, with options for JSON
    guided_json, guided_regex, guided_choice, guided_grammar

Only the form is checked here; `Grammars.check` compiles the result. Source of the target language: llguidance, docs/syntax.md.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from llguidance import LLMatcher, grammar_from

from tpserve.errors import UserError
from tpserve.frontend.openai.schema import ChatCompletionRequest, CompletionRequest
from tpserve.frontend.openai.structural_tag import structural_tag
from tpserve.structured_output.json_schema import WHITESPACE, prepared

JSON_OPTIONS = ("disable_any_whitespace", "whitespace_pattern", "disable_additional_properties")
_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&~/-]")
"""What a regular expression of llguidance does not take for itself."""
FIELDS = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
"""Each describes the output."""
IGNORED_OPTIONS = ("backend", "disable_fallback", "reasoning_parser")
"""Of other servers' implementations; they have no effect on the language."""


def grammar_of(call: CompletionRequest | ChatCompletionRequest) -> str:
    """The grammar in llguidance's form; empty when the output may be any text. UserError names the wrong field."""
    found: dict[str, str] = {}
    if call.response_format is not None and (grammar := _of_response_format(call.response_format)):
        found["response_format"] = grammar
    if call.structured_outputs is not None and (grammar := _of_structured_outputs(call.structured_outputs)):
        found["structured_outputs"] = grammar
    for name, value in (
        ("json", call.guided_json),
        ("regex", call.guided_regex),
        ("choice", call.guided_choice),
        ("grammar", call.guided_grammar),
    ):
        if value is not None:
            found[f"guided_{name}"] = _KINDS[name](value, f"guided_{name}", {})
    if len(found) > 1:
        raise _wrong(f"{' and '.join(found)} each describe the output; keep one of them", list(found)[1])
    return next(iter(found.values()), "")


def describes_output(call: CompletionRequest | ChatCompletionRequest) -> bool:
    """Whether a request has any of these fields: a large one takes time. The type `text` describes nothing."""
    format = call.response_format
    return any(getattr(call, name) is not None for name in FIELDS[1:]) or (format is not None and format.get("type") != "text")


def field_of_grammar(call: CompletionRequest | ChatCompletionRequest) -> str | None:
    """The field that an answer's grammar comes from: one that describes the output, before tools."""
    return next((name for name in (*FIELDS, "tools") if getattr(call, name, None)), None)


def _of_response_format(value: Mapping[str, Any]) -> str:
    kind, field = value.get("type"), "response_format"
    match kind:
        case "text":
            return ""
        case "json_object":
            return _json(value.get("schema") or {"type": "object"}, f"{field}.schema", {})
        case "json_schema":
            described = value.get("json_schema")
            if not isinstance(described, dict) or described.get("schema") is None:
                raise _wrong(f'{field}: type json_schema needs {{"json_schema": {{"name": ..., "schema": {{...}}}}}}', field)
            return _json(described["schema"], f"{field}.json_schema.schema", {})
        case "structural_tag":
            return _structural_tag(value, field, {})
        case "regex" | "grammar":
            text = value.get(kind, value.get("pattern"))
            return _KINDS[kind](text, f"{field}.{kind}", {})
    known = "text, json_object, json_schema, structural_tag, regex and grammar"
    raise _wrong(f"{field}.type is {kind!r}; known are {known}", f"{field}.type")


def _of_structured_outputs(value: Mapping[str, Any]) -> str:
    field = "structured_outputs"
    given = {name: content for name, content in value.items() if content is not None and content is not False}
    options = {name: given.pop(name) for name in JSON_OPTIONS if name in given}
    kinds = [name for name in given if name in _KINDS]
    if unknown := [name for name in given if name not in _KINDS and name not in IGNORED_OPTIONS]:
        raise _wrong(f"{field}: {unknown[0]!r} is unknown; known are {', '.join((*_KINDS, *JSON_OPTIONS))}", field)
    if not kinds and not options:
        return ""
    if len(kinds) != 1:
        raise _wrong(f"{field} needs exactly one of {', '.join(_KINDS)}, this has {' and '.join(kinds) or 'none'}", field)
    if options and kinds[0] not in ("json", "json_object"):
        raise _wrong(f"{field}: {next(iter(options))} goes with json and json_object only; leave it out", field)
    return _KINDS[kinds[0]](given[kinds[0]], f"{field}.{kinds[0]}", options)


def _json(schema: Any, field: str, options: Mapping[str, Any]) -> str:
    schema = _parsed(schema, field)
    if options.get("disable_additional_properties"):
        schema = _closed(schema)
    whitespace = None if options.get("disable_any_whitespace") else WHITESPACE
    if pattern := options.get("whitespace_pattern"):
        whitespace = _text(pattern, "structured_outputs.whitespace_pattern")
    return LLMatcher.grammar_from_json_schema(msgspec.json.encode(prepared(schema, field, whitespace)).decode())


def _parsed(value: Any, field: str) -> Any:
    """The value, or that of a text which holds it as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise _wrong(f"{field} is no JSON: {error}", field) from None


def _json_object(value: Any, field: str, options: Mapping[str, Any]) -> str:
    return _json({"type": "object"}, field, options)


def _closed(schema: Any) -> Any:
    """The schema with `additionalProperties` false wherever it says nothing about them."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(part) for name, part in schema.items()}
    if "properties" in closed or closed.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed


def _regex(value: Any, field: str, options: Mapping[str, Any]) -> str:
    return LLMatcher.grammar_from_regex(_text(value, field))


def _choice(value: Any, field: str, options: Mapping[str, Any]) -> str:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise _wrong(f"{field} must be a list of texts, at least one", field)
    # One expression: as alternatives of a Lark rule, thousands of texts cost their first mask a second, or too much.
    return LLMatcher.grammar_from_regex("|".join(_SPECIAL.sub(r"\\\g<0>", text) for text in value))


def _grammar(value: Any, field: str, options: Mapping[str, Any]) -> str:
    try:
        return grammar_from("grammar", _text(value, field))  # Lark, or GBNF, which it turns into Lark
    except ValueError as error:
        raise _wrong(f"{field}: {error}", field) from None


def _structural_tag(value: Any, field: str, options: Mapping[str, Any]) -> str:
    return structural_tag(_parsed(value, field), field)


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(f"{field} must be a text that is not empty", field)
    return value


def _wrong(text: str, param: str) -> UserError:
    return UserError(text, param=param, code="invalid_value")


_KINDS: dict[str, Callable[[Any, str, Mapping[str, Any]], str]] = {
    "json": _json,
    "json_object": _json_object,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "structural_tag": _structural_tag,
}
