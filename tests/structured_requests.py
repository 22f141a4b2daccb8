"""Random requests with structured output, each with a check of the answers that end with `stop`.

`requests(count, seed)` is the same on every machine. A kind of output is a function in `KINDS`, from dice to fields of a request
and a check: None for a text that is in the language, else what is wrong with it. A new kind is one more function there. Of a
request with tools the text is `message_text`: content and calls as JSON.
"""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.schemas import error_of, validator_of

Check = Callable[[str], str | None]
"""What is wrong with a text, or None."""
WORDS = ("red", "green fish", "n\u00f6", "\U0001f41f", 'say "hi"', "back\\slash", "a", "", "tab\there", "x" * 40)
NAMES = ("a", "b", "name", "n\u00f6", "two words", "k1", "not", 'q"')
FORMATS = ("date", "date-time", "time", "ipv4", "uuid", "email", "hostname")


@dataclass(frozen=True)
class StructuredRequest:
    """A request: path, body, and the check of a text that ended with `stop`."""

    path: str
    body: dict[str, Any]
    check: Check


def requests(count: int, seed: int = 0) -> list[StructuredRequest]:
    """The first `count` requests of a seed."""
    return [_request(random.Random(f"{seed} {index}"), index) for index in range(count)]


def _request(dice: random.Random, index: int) -> StructuredRequest:
    fields, check = dice.choice(KINDS)(dice)
    body = {"seed": index, "n": dice.choice((1, 1, 1, 2, 3)), "return_token_ids": True, **_sampling(dice), **fields}
    text = f"Once upon a time {index}, " + "there was a fox " * dice.randrange(4)
    if dice.random() < 0.3 or "tools" in fields:
        if dice.random() < 0.5:
            body["thinking_token_budget"] = dice.choice((0, 1, 4, 30))
        if dice.random() < 0.5:
            body["enable_thinking"] = dice.random() < 0.5
        return StructuredRequest("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **body}, check)
    return StructuredRequest("/v1/completions", {"prompt": text, **body}, check)


def message_text(content: str | None, calls: list[tuple[str, str]]) -> str:
    """What the check of a request with tools is given: names and arguments of the calls in order."""
    return json.dumps({"content": content or "", "calls": calls})


def _sampling(dice: random.Random) -> dict[str, Any]:
    """Parameters that change what is drawn."""
    maybe = {
        "top_p": dice.choice((0.1, 0.6, 0.95)), "top_k": dice.choice((1, 5, 50)), "min_p": dice.choice((0.05, 0.5)),
        "presence_penalty": dice.uniform(-2, 2), "frequency_penalty": dice.uniform(-2, 2),
        "repetition_penalty": dice.uniform(0.5, 2),
        "logit_bias": {str(dice.randrange(500)): dice.uniform(-100, 100) for _ in range(3)}, "ignore_eos": True,
        "min_tokens": dice.choice((1, 10)), "bad_words": [dice.choice(("fox", "the", "0"))], "allowed_token_ids": [70, 71, 72],
    }  # fmt: skip
    chosen = dice.sample(sorted(maybe), dice.choice((0, 0, 1, 2, 3)))
    fixed = {"temperature": dice.choice((0.0, 0.7, 1.0, 1.8)), "max_tokens": dice.choice((20, 120, 250))}
    return {**fixed, **{name: maybe[name] for name in chosen}}


def _json(dice: random.Random) -> tuple[dict[str, Any], Check]:
    schema = random_schema(dice)
    validator = validator_of(schema)
    assert validator is not None, schema

    def check(text: str) -> str | None:
        try:
            return error_of(validator, json.loads(text))
        except ValueError as error:
            return f"no JSON: {error}"

    described = {"name": "x", "schema": schema}
    forms: list[dict[str, Any]] = [
        {"structured_outputs": {"json": schema, "disable_any_whitespace": True}},
        {"structured_outputs": {"json": json.dumps(schema)}},
        {"response_format": {"type": "json_schema", "json_schema": described}},
        {"guided_json": schema},
    ]
    return dice.choice(forms), check


def random_schema(dice: random.Random) -> dict[str, Any]:
    """A schema of bounded instances, with a definition that some of it refers to."""
    defined = _schema(dice, 1)
    schema = _schema(dice, 3)
    if dice.random() < 0.3:
        schema = {"type": "object", "properties": {"first": schema, "second": {"$ref": "#/$defs/d"}}, "required": ["second"],
                  "additionalProperties": False}  # fmt: skip
    return {**schema, "$defs": {"d": defined}}


def _schema(dice: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_string, _string, _number, lambda dice: {"type": dice.choice(("boolean", "null"))}, _constant]
    if depth:
        kinds += [lambda dice: _array(dice, depth - 1), *[lambda dice: _object(dice, depth - 1)] * 3]
        kinds.append(lambda dice: {"anyOf": [_schema(dice, depth - 1) for _ in range(dice.randint(1, 3))]})
        kinds.append(lambda dice: {"oneOf": [_number(dice), _string(dice), _object(dice, depth - 1)]})
        kinds.append(lambda dice: {"allOf": [_object(dice, 0), {"required": [dice.choice(NAMES)]}, {"maxProperties": 9}]})
    return dice.choice(kinds)(dice)


def _string(dice: random.Random) -> dict[str, Any]:
    least = dice.randrange(4)
    bounded = {"type": "string", "minLength": least, "maxLength": least + dice.randrange(12)}
    pattern = {"type": "string", "pattern": f"^{_expression(dice, 2)}$"}
    return dice.choice((bounded, bounded, pattern, {"type": "string", "format": dice.choice(FORMATS), "maxLength": 60}))


def _number(dice: random.Random) -> dict[str, Any]:
    low = dice.choice((-1000, -1, 0, 3, 2**53))
    schema: dict[str, Any] = {"type": dice.choice(("integer", "integer", "number"))}
    schema[dice.choice(("minimum", "exclusiveMinimum"))] = low
    schema[dice.choice(("maximum", "exclusiveMaximum"))] = low + dice.choice((7, 100, 123456))
    if schema["type"] == "integer" and dice.random() < 0.3:
        schema["multipleOf"] = dice.choice((2, 3, 7))
    return schema


def _constant(dice: random.Random) -> dict[str, Any]:
    values = [*dice.sample(WORDS, 3), dice.randrange(-99, 99), dice.choice((0.5, -1.25, 1e-3)), None, True, [1, {"k": "v"}]]
    return dice.choice(({"const": dice.choice(values)}, {"enum": dice.sample(values, dice.randint(1, 6))}))


def _array(dice: random.Random, depth: int) -> dict[str, Any]:
    least = dice.randrange(3)
    schema = {"type": "array", "items": _schema(dice, depth), "minItems": least, "maxItems": least + dice.randrange(4)}
    if dice.random() < 0.3:
        schema["prefixItems"] = [_schema(dice, 0) for _ in range(2)]
    return schema


def _object(dice: random.Random, depth: int) -> dict[str, Any]:
    names = dice.sample(NAMES, dice.randint(1, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: _schema(dice, depth) for name in names}}
    schema["required"] = dice.sample(names, dice.randint(0, len(names)))
    schema["additionalProperties"] = dice.choice((False, False, False, {"type": "integer"}))
    if schema["additionalProperties"] and dice.random() < 0.5:
        schema["patternProperties"] = {"^p": {"type": "boolean"}}
    if len(schema["required"]) == len(names) and schema["additionalProperties"]:
        schema["minProperties"], schema["maxProperties"] = len(names), len(names) + 2
    return schema


def _expression(dice: random.Random, depth: int) -> str:
    """A regular expression that Python and llguidance read alike. Of bounded texts."""
    if not depth or dice.random() < 0.2:
        return dice.choice(("[a-f]", "[0-9]", "x", "[!-/:-@]", "fox", "\u00f6", "\\.", "[ _-]"))
    part = _expression(dice, depth - 1)
    forms = (
        f"{part}{_expression(dice, depth - 1)}",
        f"(?:{part}|{_expression(dice, depth - 1)})",
        f"(?:{part}){{{dice.randrange(3)},{dice.randint(3, 6)}}}",
        f"(?:{part})?{_expression(dice, depth - 1)}",
    )
    return dice.choice(forms)


def _regex(dice: random.Random) -> tuple[dict[str, Any], Check]:
    pattern = _expression(dice, 4)
    fields = dice.choice(({"structured_outputs": {"regex": pattern}}, {"guided_regex": pattern}))
    return fields, lambda text: None if re.fullmatch(pattern, text) else f"does not match {pattern}"


def _choice(dice: random.Random) -> tuple[dict[str, Any], Check]:
    choices = dice.sample([word for word in WORDS if word], dice.randint(1, 5))
    fields = dice.choice(({"structured_outputs": {"choice": choices}}, {"guided_choice": choices}))
    return fields, lambda text: None if text in choices else f"none of {choices}"


def _lark(dice: random.Random) -> tuple[dict[str, Any], Check]:
    """A list of numbers in nested brackets: no regular language."""
    grammar = 'start: list\nlist: "(" (item (" " item){0,3})? ")"\nitem: /[0-9]{1,3}/ | list\n'

    def check(text: str) -> str | None:
        try:
            value = json.loads(re.sub(r"\b0+(?=\d)", "", text.replace("(", "[").replace(")", "]").replace(" ", ",")))
        except ValueError as error:
            return f"no list: {error}"
        return None if isinstance(value, list) else "no list"

    return {"structured_outputs": {"grammar": grammar}}, check


def _tag(dice: random.Random) -> tuple[dict[str, Any], Check]:
    """Free text with calls in it. Its first letter is a trigger, so that a random model comes to one."""
    schema = {"type": "object", "properties": {"x": _number(dice)}, "required": ["x"], "additionalProperties": False}
    letter = dice.choice("aeo")
    tag = {"structures": [{"begin": f"{letter}<", "schema": schema, "end": ">"}], "triggers": [letter]}
    validator = validator_of(schema)

    def check(text: str) -> str | None:
        at = 0
        while (at := text.find(letter, at)) >= 0:
            try:
                value, end = json.JSONDecoder().raw_decode(text, at + 2)
            except ValueError as error:
                return f"no JSON after {text[at : at + 20]!r}: {error}"
            if text[at + 1] != "<" or text[end : end + 1] != ">" or error_of(validator, value):
                return f"not the structure: {text[at : end + 1]!r}"
            at = end
        return None

    return {"structured_outputs": {"structural_tag": tag}}, check


def _tools(dice: random.Random) -> tuple[dict[str, Any], Check]:
    """Calls of one to three functions, required, of one by name, or of the model's choice."""
    schemas, strict = {}, {}
    for name in dice.sample(("f", "get_weather", "a.b-c"), dice.randint(1, 3)):
        schemas[name], strict[name] = _object(dice, 1), dice.choice((True, True, False, None))
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema, "strict": strict[name]}}
        for name, schema in schemas.items()
    ]
    choice: Any = dice.choice(("required", "required", "auto", {"type": "function", "function": {"name": next(iter(schemas))}}))
    fields = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": dice.random() < 0.5}

    def check(text: str) -> str | None:
        message = json.loads(text)
        content, calls = message["content"], message["calls"]
        if choice != "auto" and (content or not calls):
            return "a call was required, and nothing else"
        if len(calls) > 1 and (not fields["parallel_tool_calls"] or isinstance(choice, dict)):
            return "more calls than one"
        for name, arguments in calls:
            if name not in schemas or (isinstance(choice, dict) and name != choice["function"]["name"]):
                return f"{name} may not be called"
            value = json.loads(arguments)
            if strict[name] and (error := error_of(validator_of(schemas[name]), value)):
                return f"arguments of {name}: {error}"
        return None

    return fields, check


KINDS: list[Callable[[random.Random], tuple[dict[str, Any], Check]]] = [
    *[_json] * 4,
    *[_regex] * 2,
    _choice,
    _lark,
    _tag,
    *[_tools] * 3,
]
