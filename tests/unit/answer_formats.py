"""The forms of calls of several families, tools, hints (texts that a random answer should often try), and a reader of answers
that shares nothing with the product's.
"""

import ast
import json
import re
from itertools import islice
from typing import Any

from tpserve.response_template.arguments import Tool
from tpserve.response_template.format import ID, INDEX, ReasoningFormat, TaggedArguments, ToolFormat

THINK = ReasoningFormat("<think>\n", "\n</think>\n\n")
HERMES = ToolFormat(call_begin='<tool_call>\n{"name": "', name_end='", "arguments": ', call_end="}\n</tool_call>", between="\n")
TAGGED = ToolFormat(
    call_begin="<tool_call>\n<function=",
    name_end=">\n",
    call_end="</function>\n</tool_call>",
    between="\n",
    arguments="tagged",
    tags=TaggedArguments("<parameter=", ">\n", "\n</parameter>\n"),
)
PAIRS = ToolFormat(
    call_begin="<tool_call>",
    name_end="\n",
    call_end="</tool_call>",
    arguments="tagged",
    tags=TaggedArguments("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>", "\n"),
)
PYTHON = ToolFormat(begin="[", call_begin="", name_end="(", call_end=")", between=", ", end="]", arguments="python")
LIST = ToolFormat(
    begin="[TOOL_CALLS][",
    call_begin='{"name": "',
    name_end='", "arguments": ',
    call_end=', "id": "' + ID + '"}',
    between=", ",
    end="]",
)
KIMI = ToolFormat(
    begin="<|calls_begin|>",
    call_begin="<|call_begin|>functions.",
    name_end=f":{INDEX}<|args_begin|>",
    call_end="<|call_end|>",
    end="<|calls_end|>",
)
FENCED = ToolFormat(
    begin="<|calls_begin|>",
    call_begin="<|call_begin|>function<|sep|>",
    name_end="\n```json\n",
    call_end="\n```<|call_end|>",
    between="\n",
    end="<|calls_end|>",
)
PLAIN = ToolFormat(call_begin='{"name": "', name_end='", "parameters": ', call_end="}", several=False)
MARKUP = ToolFormat(
    begin="\n\n<|calls|>",
    call_begin='\n<|invoke name="',
    name_end='">',
    call_end="\n</|invoke>",
    end="\n</|calls|>",
    arguments="tagged",
    tags=TaggedArguments('\n<|parameter name="', '" string="true">', "</|parameter>", "", '" string="false">'),
)
FORMATS = {
    "markup": MARKUP,
    "hermes": HERMES,
    "tagged": TAGGED,
    "pairs": PAIRS,
    "python": PYTHON,
    "list": LIST,
    "kimi": KIMI,
    "fenced": FENCED,
    "plain": PLAIN,
}
MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|calls_begin|>", "<|calls_end|>"]
MARKERS += [
    "<|call_begin|>",
    "<|call_end|>",
    "<|args_begin|>",
    "<|sep|>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
]
MARKERS += ["</function>", "</parameter>"]
HINTS = {
    "markup": ["\n\n<|calls|>", "</think>", "</|parameter>", '" string="', "}"],
    "hermes": ["<tool_call>", "</think>", '"}', '"', "}", '"city": "'],
    "tagged": ["<tool_call>\n<function=weather", "\n</parameter>\n", "</think>", "\n</function>"],
    "pairs": ["<tool_call>", "</arg_value>", "</think>", "</arg_key>", '"'],
    "python": ["[weather(", "</think>", '"', ")", "}"],
    "list": ["[TOOL_CALLS]", "</think>", '"', "}", "]"],
    "kimi": ["<|calls_begin|>", "</think>", '"', "}", "<|call_begin|>functions.weather_old:1<|args_begin|>{}<|call_end|>"],
    "fenced": ["<|calls_begin|>", "</think>", '"', "}", "<|calls_end|>", "\n```"],
    "plain": ['{"name": "weather", "parameters": ', "</think>", '"', "}"],
}
PLACE = {
    "type": "object",
    "properties": {"x": {"type": "number"}, "next": {"$ref": "#/$defs/place"}},
    "required": ["x"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"anyOf": [{"enum": ["C", "F"]}, {"type": "null"}]},
        "place": {"$ref": "#/$defs/place"},
    },
    "required": ["city", "place"],
    "additionalProperties": False,
    "$defs": {"place": PLACE},
}
TOOLS = [Tool("weather", WEATHER, True), Tool("weather_old", {"type": "object", "properties": {}}, False)]
SCHEMAS = {"weather": WEATHER, "weather_old": {"type": "object"}}


def read(text: str, tools: ToolFormat, form: ReasoningFormat | None, opened: bool) -> tuple[str, str, list[tuple[str, Any]]]:
    """Reasoning, content and calls of an answer, read in another way than the product's."""
    reasoning = ""
    if form is not None and (opened or text.startswith("<think>")):
        reasoning, text = text.removeprefix("<think>").split("</think>", 1)
    opening = (tools.begin + tools.call_begin).lstrip()
    names = "|".join(SCHEMAS)
    if tools is PLAIN or tools is PYTHON:
        found = re.match(r"\s*(?=" + re.escape(opening) + f"({names})" + re.escape(tools.name_end) + ")", text)
    else:
        alone = re.escape(tools.call_begin.lstrip()) if tools.begin and tools is not LIST else "(?!)"
        found = re.search(f"(?={re.escape(opening)}|{alone})", text)
    if found is None:
        return reasoning, text, []
    content, rest = text[: found.start()], text[found.end() :]
    rest = tools.call_begin + rest.removeprefix(opening if rest.startswith(opening) else tools.call_begin.lstrip())
    calls = []
    while True:
        assert rest.startswith(tools.call_begin)
        head = re.escape(tools.name_end).replace(re.escape(INDEX), "[0-9]{1,9}")
        found = re.match(f"({names}){head}", rest := rest[len(tools.call_begin) :])
        assert found, rest
        arguments, rest = read_arguments(rest[found.end() :], tools, SCHEMAS[found[1]])
        calls.append((found[1], arguments))
        found = re.match(re.escape(tools.call_end).replace(re.escape(ID), "[a-zA-Z0-9]{9}"), rest)
        assert found, rest
        rest = rest[found.end() :]
        if not (tools.between + tools.call_begin) or not rest.startswith(tools.between + tools.call_begin) or rest == tools.end:
            assert rest == tools.end
            return reasoning, content, calls
        rest = rest[len(tools.between) :]


def read_arguments(text: str, tools: ToolFormat, schema: Any) -> tuple[Any, str]:
    """The arguments at the beginning of a text, and what follows them."""
    if tools.arguments == "json":
        value, end = json.JSONDecoder().raw_decode(text)
        return value, text[end:]
    if tools.arguments == "python":  # one call's arguments end where Python can read them
        for end in (at for at, character in enumerate(text) if character == ")"):
            names = {"true": "True", "false": "False", "null": "None"}
            try:
                call = ast.parse("f(" + text[:end] + ")", mode="eval").body
            except SyntaxError:
                continue
            if isinstance(call, ast.Call):
                values = {}
                for keyword in call.keywords:
                    for node in ast.walk(keyword.value):
                        if isinstance(node, ast.Name):
                            node.id = names.get(node.id, node.id)
                    source = ast.unparse(keyword.value)
                    values[str(keyword.arg)] = ast.literal_eval(source)
                return values, text[end:]
        raise AssertionError(text)
    assert tools.tags is not None
    tags, arguments = tools.tags, {}
    while text.startswith((tags.begin, tags.between + tags.begin)):
        middle = re.compile("|".join(map(re.escape, filter(None, (tags.middle, tags.other_middle)))))
        (found,) = islice(middle.finditer(text := text.removeprefix(tags.between).removeprefix(tags.begin)), 1)
        key, text = text[: found.start()], text[found.end() :]
        value, text = text.split(tags.end.strip(), 1)
        text = text.removeprefix(tags.end[len(tags.end.rstrip()) :])
        value = value.removesuffix("\n")
        is_text = found[0] == tags.middle if tags.other_middle else None
        raw = schema.get("properties", {"?": 0}).get(key, {"type": "string"}).get("type") == "string" or value in "CF"
        raw = is_text if is_text is not None and key not in schema.get("properties", {}) else raw
        assert is_text in (None, raw)
        arguments[key] = value if raw else json.loads(value)
    return arguments, text
