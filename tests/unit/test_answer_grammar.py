"""The grammar of a whole answer: random legal tokens give answers that read back, illegal ones are refused, budgets are exact."""

import json
import random
import re
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from tests.http.tiny_tokenizer import EOS, byte_level, save
from tests.unit.answer_formats import (
    FORMATS,
    HERMES,
    HINTS,
    LIST,
    MARKERS,
    PLAIN,
    PYTHON,
    SCHEMAS,
    TAGGED,
    THINK,
    TOOLS,
    WEATHER,
    read,
)
from tpserve.errors import UserError
from tpserve.response_template.arguments import Tool
from tpserve.response_template.call_reader import CallArguments, CallBegin
from tpserve.response_template.format import AnswerFormat, ReasoningFormat, ToolFormat
from tpserve.response_template.grammar import AnswerRules, answer_grammar
from tpserve.response_template.lark import SpecialTokens
from tpserve.response_template.parser import ResponseParser
from tpserve.response_template.spec import spec_of
from tpserve.response_template.template import ResponseTemplate
from tpserve.structured_output.compiler import GrammarError, compile_grammar, vocabulary
from tpserve.text.tokenizer import Tokenizer


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
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
    return [int(id) for id in np.flatnonzero(bits[:size])]


def walk(matcher: LLMatcher, kind: str, seed: int, hints: list[str]) -> str | None:
    """An answer of random legal tokens, among them often those of `hints`; None when it does not end in time."""
    matcher, rng = matcher.deep_copy(), random.Random(seed)
    tokenizer = tokens(kind)[0]
    hinted = [tokenizer.encode(hint, add_special_tokens=False) for hint in hints]
    ids: list[int] = []
    while len(ids) < 400:
        if rng.random() < 0.3:
            ids += (hint := rng.choice(hinted))[: matcher.try_consume_tokens(hint)]
        if EOS in (legal := allowed(matcher, tokenizer.vocab_size)) and (len(legal) == 1 or rng.random() < 0.3):
            return tokenizer.decode(ids, skip_special_tokens=False)
        assert legal, matcher.get_error()
        ids.append(rng.choice([id for id in legal if id != EOS]))
        assert matcher.consume_tokens(ids[-1:]), matcher.get_error()
    return None


def parsed(tools: ToolFormat, reasoning: ReasoningFormat | None, text: str, prompt: str) -> list[tuple[str, Any]]:
    """The calls as the product reads them, by the template that it makes of the same format."""
    template = ResponseTemplate.load(spec_of(AnswerFormat(reasoning=reasoning, tools=tools), ["<|assistant|>"]))
    parser, calls = ResponseParser(template, prompt, SCHEMAS, calls_end_reasoning=False), []
    for event in [*parser.feed(text), *parser.finish()]:
        if isinstance(event, CallBegin):
            calls.append((event.name, ""))
        elif isinstance(event, CallArguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments or "{}"), SCHEMAS[name])
    return calls


KINDS = [*product(FORMATS, ("special", "text")), ("hermes", "added")]
COURSES = (("auto", True, "start"), ("auto", False, "content"), ("required", True, "reasoning"), ("required", False, "content"))


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_random_legal_tokens_read_back(name: str, kind: str) -> None:
    tools, counts = FORMATS[name], []
    reasoning = None if tools in (PYTHON, PLAIN) else THINK  # calls that look like prose begin the answer
    for choice, parallel, state in COURSES:
        state = "start" if reasoning is None else state
        matcher = compiled(kind, tools, reasoning, choice=choice, parallel=parallel, state=state)
        for seed in range(6 if max(counts, default=2) > 1 else 24):  # of many calls few answers end in time
            text = walk(matcher, kind, seed, HINTS[name])
            if text is None or re.search(r"[eE]\+?[0-9]{3}", text):  # a number beyond those of Python
                continue
            _, content, calls = read(text, tools, reasoning, state == "reasoning")
            prompt = "<|assistant|><think>" if state == "reasoning" else "<|assistant|>"
            assert [name for name, _ in calls] == [name for name, _ in parsed(tools, reasoning, text, prompt)]
            for called, arguments in calls:
                jsonschema.validate(arguments, SCHEMAS[called])
            assert choice == "auto" or (calls and not content.strip())
            assert len(calls) <= 1 or (parallel and tools.several)
            counts.append(len(calls))
    assert len(counts) > 10 and 0 in counts and 1 in counts
    assert kind == "text" or not tools.several or max(counts) > 1


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "place": {"x": 1}}}\n</tool_call>'
OLD = '<tool_call>\n{"name": "weather_old", "arguments": {"any": [1]}}\n</tool_call>'
OBJECT = LLMatcher.grammar_from_json_schema('{"type": "object"}')


@pytest.mark.parametrize("kind", ["special", "added", "text"])
@pytest.mark.parametrize(("rules", "good", "bad"), [
    ({}, ["", "hi", CALL, f"hi {CALL}\n{OLD}", f"<think>\n{CALL} or not</think>\n\nhi", f"<think></think>{OLD}", "a <b> [c] {d}"],
     ["<think>\nhm", f"{CALL} hi", CALL.replace("weather", "other"), CALL.replace('"Rome"', "5"), CALL[:-4], f"<think>{CALL}",
      CALL.replace('"arguments"', '"parameters"'), f"{CALL}{CALL}"]),
    ({"parallel": False}, [CALL, "hi", f"hi{OLD}"], [f"{CALL}\n{OLD}"]),
    ({"state": "reasoning"}, [f"hm {CALL}</think>hi", f"</think>\n\n{CALL}"], ["hi", CALL, "<think>\nhm"]),
    ({"state": "content"}, ["hi", CALL, "<thin"], [CALL[:-1]]),
    ({"choice": "required"}, [CALL, f"{CALL}\n{OLD}", f"<think>\nhm</think>\n\n{OLD}"],
     ["", "hi", f"hi{CALL}", f"<think>hm</think>{CALL}", "<think>hm</think>\n\nhi", "<think>hm</think>\n\n"]),
    ({"choice": "required", "tools": TOOLS[:1], "parallel": False}, [CALL], [OLD, f"{CALL}\n{CALL}"]),
    ({"choice": "none", "answer": OBJECT}, ["{}", "<think>hm</think>\n\n{}"], ["", "hi", CALL, "<think>hm</think>\n\nhi"]),
    ({"answer": OBJECT}, ["{}", CALL, f"<think>hm</think>\n\n{CALL}\n{OLD}", '<think>hm</think>\n\n{"a": 1}'],
     ["hi", f"{{}}{CALL}"]),
    ({"answer": 'start: A "!"\nA: /[a-c]+/'}, ["abc!", CALL], ["abc", "abd!"]),
    ({"answer": LLMatcher.grammar_from_regex("(?s:.*)")}, ["any", CALL, "<think>hm</think>\n\nx"], [CALL[:-1]]),
    ({"thinking_budget": 0, "choice": "none"}, ["hi", "<think></think>hi"], ["<think>hm</think>hi"]),
], ids=lambda value: str(sorted(value)) if isinstance(value, dict) else "")  # fmt: skip
def test_what_is_in_the_language_and_what_is_not(kind: str, rules: Any, good: list[str], bad: list[str]) -> None:
    matcher = compiled(kind, HERMES, **rules)
    assert [text for text in good if not takes(matcher, kind, text)] == []
    assert [text for text in bad if takes(matcher, kind, text)] == []


def test_nothing_is_constrained() -> None:
    format = AnswerFormat(reasoning=THINK, tools=HERMES)
    for rules in (
        {"tools": TOOLS, "choice": "none"},
        {},
        {"thinking_budget": 5, "state": "content"},
        {"format": AnswerFormat(), "thinking_budget": 5},
    ):
        assert answer_grammar(AnswerRules(**{"format": format, "tokens": tokens("text")[2], **rules})) == ""
    with pytest.raises(UserError, match="tool_choice asks for a call"):
        answer_grammar(AnswerRules(format=AnswerFormat(), tokens=tokens("text")[2], tools=TOOLS, choice="required"))


@pytest.mark.parametrize("kind", ["special", "added", "text"])
@pytest.mark.parametrize("budget", [1, 2, 5])
def test_a_budget_counts_tokens(kind: str, budget: int) -> None:
    """Whatever the tokens are, bytes of a character or the beginning of the end, the end is forced behind the last one."""
    tokenizer = tokens(kind)[0]
    matcher = compiled(kind, None, tools=(), thinking_budget=budget, state="reasoning", answer='start: "done"')
    for text in ("The cat sat on the mat", "\U0001f600\U0001f600", "</thi</thi", "\n\n\n\n\n\n"):
        running, ids = matcher.deep_copy(), tokenizer.encode(text, add_special_tokens=False)[:budget]
        for id in ids:
            assert len(allowed(running, tokenizer.vocab_size)) > 40
            assert running.consume_tokens([id])
        again = matcher.deep_copy()  # as after a preemption
        assert again.consume_tokens(ids) and allowed(again, tokenizer.vocab_size) == allowed(running, tokenizer.vocab_size)
        while (legal := allowed(running, tokenizer.vocab_size)) != [EOS]:
            assert len(legal) == 1 and running.consume_tokens(legal)
            ids += legal
        shown = tokenizer.decode(ids, skip_special_tokens=False)
        assert shown.count("</think>\n\ndone") == 1 and shown.endswith("</think>\n\ndone")


def test_reasoning_within_the_budget_may_end_itself() -> None:
    for kind in ("special", "added", "text"):
        matcher = compiled(kind, HERMES, thinking_budget=20, choice="required")
        assert takes(matcher, kind, f"<think>The cat</think>\n\n{CALL}") and not takes(
            matcher, kind, f"<think>The{' cat' * 20}</think>\n\n{CALL}"
        )


CHANNELS = AnswerFormat(
    reasoning=ReasoningFormat("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
    content_begin="<|channel|>final<|message|>",
    content_end="<|return|>",
    tools=ToolFormat(call_begin="<|channel|>to=", name_end=" json<|message|>", call_end="<|call|>", several=False),
)


def test_channels_and_tokens_that_end_the_answer() -> None:
    rust = byte_level()
    rust.add_special_tokens(["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|return|>", "<|call|>"])
    with TemporaryDirectory() as directory:
        tokenizer = Tokenizer.load(save(rust, Path(directory) / "model"))
    ends = [id for text in ("<|return|>", "<|call|>") if (id := tokenizer.id_of(text)) is not None]
    rules = AnswerRules(format=CHANNELS, tokens=SpecialTokens.of(tokenizer, ends, tokenizer.vocab_size), tools=TOOLS)
    matcher = compile_grammar(vocabulary(tokenizer, tokenizer.vocab_size, ends), answer_grammar(rules))
    think, call = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant", "<|channel|>to=weather_old json<|message|>{}"
    for text, good in (
        (f"{think}{call}", True),
        (call, True),
        (f"{think}<|channel|>final<|message|>hi", True),
        ("hi", False),
        (f"{call}{call}", False),
    ):
        ids, running = tokenizer.encode(text, add_special_tokens=False), matcher.deep_copy()
        assert (running.consume_tokens(ids) and running.is_accepting()) == good, text
        assert not good or set(ends) <= {*allowed(running, tokenizer.vocab_size)}


def call_of(arguments: str) -> str:
    return f"<tool_call>\n<function=f>\n{arguments}</function>\n</tool_call>"


def argument(key: str, value: str) -> str:
    return f"<parameter={key}>\n{value}\n</parameter>\n"


TREE = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "children": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(("schema", "good", "bad"), [
    (TREE, [{"name": "a"}, {"name": "a", "children": '[{"name": "b", "children": []}]'}],
     [{"children": "[]"}, {"name": "a", "children": '[{"children": []}]'}, {"name": "a", "x": "1"}]),
    ({"properties": {"n": {"type": "integer"}}}, [{}, {"n": "5"}], [{"n": "x"}, {"m": "5"}]),
    ({"properties": {"n": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}},
     [{"nn": "true", "m": "false"}, {"n": "5", "x": "true"}], [{"nn": "5"}, {"n": "true"}]),
    ({"properties": {"s": {"enum": ["a", 1, None]}}, "required": ["s"]},
     [{"s": "a"}, {"s": "1"}, {"s": "null"}], [{}, {"s": '"a"'}, {"s": "ab"}]),
    ({"properties": {"s": {"type": ["string", "null"]}}}, [{"s": "a\n</b>"}, {"s": "null"}, {"s": ""}], []),
    ({"properties": {"s": {"anyOf": [{"const": "x"}, {"type": "integer"}]}}}, [{"s": "x"}, {"s": "12"}], [{"s": "y"}]),
    ({"properties": {"s": {"type": "string", "minLength": 2, "maxLength": 3}}},
     [{"s": "ab"}, {"s": "\u00e9b\n"}], [{"s": "a"}, {"s": "abcd"}]),
    ({"properties": {"s": {"type": "string", "pattern": "^[a-z]+/(x|y)$"}}}, [{"s": "ab/x"}], [{"s": "ab/z"}, {"s": " ab/x"}]),
    ({"properties": {"s": {"type": "string", "pattern": "b+"}}}, [{"s": "abba"}], [{"s": "aa"}]),
    ({"$ref": "#/$defs/p", "$defs": {"p": {"properties": {"o": {"$ref": "#/$defs/q"}}}, "q": {"type": "number"}}},
     [{"o": "1.5"}], [{"o": "x"}]),
    ({"properties": {"{id}": {"type": "integer"}}}, [{"{id}": "5"}], [{"a1B2c3D4e": "5"}]),
    ({}, [{}, {"any": "thing"}], []),
    (None, [{}], [{"any": "thing"}]),
], ids=str)  # fmt: skip
def test_arguments_in_tags(schema: Any, good: list[dict[str, str]], bad: list[dict[str, str]]) -> None:
    matcher = compiled("text", TAGGED, tools=[Tool("f", schema, True)], choice="required", state="content")
    for arguments in (*good, *bad):
        text = call_of("".join(argument(*pair) for pair in arguments.items()))
        assert takes(matcher, "text", text) == (arguments in good), text


@pytest.mark.parametrize(("strict", "good", "bad"), [
    (True, ['name="x"', 'name="x", children=[{"name": "y"}]'],
     ["", "name='x'", 'children=[]', 'name="x",children=[]', 'name="x", y=1']),
    (False, ["", "a='x', b=True, c={'k': [1.5, None]}", 'a="it\'s"', "name=1"], ["1", "a=x", "a=1,", "a='x"]),
])  # fmt: skip
def test_arguments_of_python(strict: bool, good: list[str], bad: list[str]) -> None:
    matcher = compiled("text", PYTHON, tools=[Tool("f", TREE, strict)], choice="required", state="content")
    for arguments in (*good, *bad):
        assert takes(matcher, "text", f"[f({arguments})]") == (arguments in good), arguments


def test_prose_that_looks_like_a_call_stays_prose() -> None:
    for tools, text in ((PLAIN, 'Write {"name": "Ann", "parameters": 1}'), (PYTHON, "[see (1)] or [f(x)"), (LIST, "[TOOLS] {}")):
        assert takes(compiled("text", tools), "text", text)


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize("schema", [
    5, [], "x", False, {"properties": 5}, {"properties": {"a": 5}}, {"properties": {"a": {"type": "foo"}}},
    {"required": [1]}, {"required": "a"},
    {"$ref": "#/nowhere"}, {"properties": {"a": {"$ref": "#/nowhere"}}}, {"type": "string"}, {"additionalProperties": 5},
    {"properties": {"a": {"type": "string", "pattern": "(a"}}}, {"properties": {"a": {"type": "string", "minLength": "x"}}},
    {"properties": {"a": {"anyOf": [1]}}, "required": ["a"]}, {"properties": {"\ud800": {"type": "integer"}}},
], ids=lambda schema: str(schema)[:60])  # fmt: skip
@pytest.mark.parametrize("tools", [HERMES, TAGGED, PYTHON], ids=["json", "tagged", "python"])
def test_a_bad_schema_is_refused(tools: ToolFormat, schema: Any) -> None:
    with pytest.raises((GrammarError, UserError)):
        compiled("text", tools, tools=[Tool("f", schema, True)])


@pytest.mark.parametrize("tools", [HERMES, TAGGED, PYTHON], ids=["json", "tagged", "python"])
def test_a_schema_nested_too_deeply_is_refused(tools: ToolFormat) -> None:
    with pytest.raises((GrammarError, UserError)):
        compiled("text", tools, tools=[Tool("f", nested(3000), True)])


def test_what_cannot_be_enforced_in_tags_is_said() -> None:
    with pytest.raises(UserError, match="'anyOf' at the root of the parameters of 'f'"):
        compiled("text", TAGGED, tools=[Tool("f", {"anyOf": [TREE]}, True)])


def test_names_are_escaped_within_json() -> None:
    matcher = compiled("text", HERMES, tools=[Tool('a"b')], choice="required", state="content")
    assert takes(matcher, "text", '<tool_call>\n{"name": "a\\"b", "arguments": {}}\n</tool_call>')


def test_hundreds_of_tools() -> None:
    tools = [Tool(f"tool_{number}", WEATHER if number % 2 else TREE, number % 3 == 0) for number in range(150)]
    assert takes(compiled("text", HERMES, tools=tools), "text", OLD.replace("weather_old", "tool_149"))
    huge = [
        Tool(
            f"tool_{number}",
            {"properties": {f"p{number}_{at}": {"enum": [f"{number} {at} {i}" for i in range(99)]} for at in range(9)}},
            True,
        )
        for number in range(300)
    ]
    with pytest.raises(GrammarError):
        compiled("text", HERMES, tools=huge)


@pytest.mark.parametrize("format", [
    AnswerFormat(reasoning=ReasoningFormat("", ""), tools=HERMES),
    AnswerFormat(reasoning=ReasoningFormat("<think>", "</s>"), tools=HERMES),
    AnswerFormat(reasoning=ReasoningFormat("</s>", "{id}"), tools=HERMES),
    AnswerFormat(content_begin="</s>", content_end="</s>x", tools=HERMES),
    AnswerFormat(content_end="END", tools_after_content=None, tools=HERMES),
    AnswerFormat(tools=ToolFormat("</s>", "", "")),
    AnswerFormat(tools=ToolFormat("", "", "")),
    AnswerFormat(tools=ToolFormat("\n", "{index}", "{id}")),
    AnswerFormat(tools=ToolFormat("<f>", ">", "</f>", arguments="tagged")),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("choice", ["auto", "required", "none"])
def test_odd_formats_of_templates_have_a_grammar(format: AnswerFormat, choice: Any) -> None:
    for budget in (None, 0, 1, 3):
        rules = AnswerRules(format=format, tokens=tokens("special")[2], tools=TOOLS, choice=choice, thinking_budget=budget)
        if text := answer_grammar(rules):
            compile_grammar(tokens("special")[1], text)
