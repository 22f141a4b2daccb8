"""The grammar of a whole answer: random legal tokens give answers that read back, illegal ones are refused, budgets are exact."""

import ast
import json
import random
import re
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

from tests.http.tiny_tokenizer import EOS, byte_level, save
from tpserve.errors import UserError
from tpserve.response_template.arguments import Tool
from tpserve.response_template.format import ID, INDEX, AnswerFormat, ReasoningFormat, TaggedArguments, ToolFormat
from tpserve.response_template.grammar import AnswerRules, answer_grammar
from tpserve.response_template.lark import SpecialTokens
from tpserve.structured_output.compiler import GrammarError, compile_grammar, vocabulary
from tpserve.text.tokenizer import Tokenizer

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
FORMATS = {
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
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}, "next": {"$ref": "#/$defs/place"}}, "required": ["x"], "additionalProperties": False}},
}  # fmt: skip
TOOLS = [Tool("weather", WEATHER, True), Tool("weather_old", {"type": "object", "properties": {}}, False)]
SCHEMAS = {"weather": WEATHER, "weather_old": {"type": "object"}}


@cache
def tokens(kind: str) -> tuple[Tokenizer, LLTokenizer, SpecialTokens]:
    """A small tokenizer whose markers are "special" tokens, "added" ones, or "text"."""
    rust = byte_level()
    if kind == "special":
        rust.add_special_tokens(MARKERS)
    elif kind == "added":
        rust.add_tokens(MARKERS)
    with TemporaryDirectory() as directory:
        tokenizer = Tokenizer.load(save(rust, Path(directory) / "model"))
    special = SpecialTokens.of(tokenizer, [EOS], tokenizer.vocab_size)
    return tokenizer, vocabulary(tokenizer, tokenizer.vocab_size, [EOS]), special


def compiled(kind: str, calls: ToolFormat | None, reasoning: ReasoningFormat | None = THINK, **rules: Any) -> LLMatcher:
    format = rules.pop("format", None) or AnswerFormat(reasoning=reasoning, tools_after_content="\n", tools=calls)
    _, vocabulary, special = tokens(kind)
    text = answer_grammar(AnswerRules(**{"format": format, "tokens": special, "tools": TOOLS, **rules}))
    assert text
    return compile_grammar(vocabulary, text)


def takes(matcher: LLMatcher, kind: str, text: str) -> bool:
    """Whether a whole text is in the language."""
    matcher = matcher.deep_copy()
    return matcher.consume_tokens(tokens(kind)[0].encode(text, add_special_tokens=False)) and matcher.is_accepting()


def allowed(matcher: LLMatcher, size: int) -> list[int]:
    bits = matcher.compute_bitmask()
    return [id for id in range(size) if bits[id // 8] >> (id % 8) & 1]


def walk(matcher: LLMatcher, kind: str, seed: int, hints: list[str]) -> str | None:
    """An answer of random legal tokens, among them often those of `hints`; None when it does not end in time."""
    matcher, rng = matcher.deep_copy(), random.Random(seed)
    tokenizer = tokens(kind)[0]
    hinted = [tokenizer.encode(hint, add_special_tokens=False) for hint in hints]
    ids: list[int] = []
    while len(ids) < 500:
        if rng.random() < 0.3:
            ids += (hint := rng.choice(hinted))[: matcher.try_consume_tokens(hint)]
        if EOS in (legal := allowed(matcher, tokenizer.vocab_size)) and (len(legal) == 1 or rng.random() < 0.3):
            return tokenizer.decode(ids, skip_special_tokens=False)
        assert legal, matcher.get_error()
        ids.append(rng.choice([id for id in legal if id != EOS]))
        assert matcher.consume_tokens(ids[-1:]), matcher.get_error()
    return None


def read(text: str, tools: ToolFormat, opened: bool = False) -> tuple[str, str, list[tuple[str, Any]]]:
    """Reasoning, content and calls of an answer, read in another way than the product's."""
    reasoning = ""
    if opened or text.startswith("<think>"):
        reasoning, text = text.removeprefix("<think>").split("</think>", 1)
    opening = (tools.begin + tools.call_begin).lstrip()
    names = "|".join(SCHEMAS)
    if tools is PLAIN or tools is PYTHON:
        found = re.search(re.escape(opening) + f"({names})" + re.escape(tools.name_end), text)
    else:
        found = re.search(re.escape(opening), text)
    if found is None:
        return reasoning, text, []
    content, rest = text[: found.start()], text[found.start() + len(tools.begin) :]
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
        key, text = text.removeprefix(tags.between).removeprefix(tags.begin).split(tags.middle, 1)
        value, text = text.split(tags.end.strip(), 1)
        text = text.removeprefix(tags.end[len(tags.end.rstrip()) :])
        value = value.removesuffix("\n")
        raw = schema.get("properties", {"?": 0}).get(key, {"type": "string"}).get("type") == "string" or value in "CF"
        arguments[key] = value if raw else json.loads(value)
    return arguments, text


HINTS = {
    "hermes": ["<tool_call>", "</think>", '"}', '"', "}", '"city": "'],
    "tagged": ["<tool_call>\n<function=weather", "\n</parameter>\n", "</think>", "\n</function>"],
    "pairs": ["<tool_call>", "</arg_value>", "</think>", "</arg_key>", '"'],
    "python": ["[weather(", "</think>", '"', ")", "}"],
    "list": ["[TOOL_CALLS]", "</think>", '"', "}", "]"],
    "kimi": ["<|calls_begin|>", "</think>", '"', "}", "<|calls_end|>"],
    "fenced": ["<|calls_begin|>", "</think>", '"', "}", "<|calls_end|>", "\n```"],
    "plain": ['{"name": "weather", "parameters": ', "</think>", '"', "}"],
}


@pytest.mark.parametrize(("name", "kind"), product(FORMATS, ("special", "added", "text")))
def test_random_legal_tokens_read_back(name: str, kind: str) -> None:
    tools, counts = FORMATS[name], []
    for choice, parallel, state in (
        ("auto", True, "start"),
        ("auto", False, "content"),
        ("required", True, "reasoning"),
        ("required", False, "content"),
    ):
        matcher = compiled(kind, tools, choice=choice, parallel=parallel, state=state)
        for seed in range(20):
            if (text := walk(matcher, kind, seed, HINTS[name])) is None:
                continue
            _, content, calls = read(text, tools, state == "reasoning")
            for called, arguments in calls:
                jsonschema.validate(arguments, SCHEMAS[called])
            assert choice == "auto" or (calls and not content.strip())
            assert len(calls) <= 1 or (parallel and tools.several)
            counts.append(len(calls))
    print(name, kind, len(counts), {n: counts.count(n) for n in sorted(set(counts))})
    assert counts.count(0) and counts.count(1)
    assert not tools.several or max(counts) > 1
