"""Families whose calls are not JSON all through: their grammar has what models write, and random legal answers read back."""

import json
import random
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from tests.http.tiny_tokenizer import EOS, byte_level, save
from tpserve.response_template.arguments import Tool
from tpserve.response_template.call_reader import CallArguments, CallBegin
from tpserve.response_template.families import BY_NAME
from tpserve.response_template.format import AnswerFormat, written
from tpserve.response_template.grammar import AnswerRules, answer_grammar
from tpserve.response_template.lark import SpecialTokens
from tpserve.response_template.parser import ResponseParser
from tpserve.response_template.regions import Content, Reasoning
from tpserve.response_template.spec import spec_of
from tpserve.response_template.template import ResponseTemplate
from tpserve.structured_output.compiler import compile_grammar, vocabulary
from tpserve.text.tokenizer import Tokenizer

MARKERS = {
    "gemma4": ["<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"],
    "functiongemma": ["<start_function_call>", "<end_function_call>", "<escape>"],
    "apertus": ["<|tools_prefix|>", "<|tools_suffix|>", "<|inner_prefix|>", "<|inner_suffix|>"],
    "kimi_k3": ["<|open|>", "<|close|>", "<|sep|>"],
    "muse_glimmer": ["<|message|>", "<|eom|>", "<|start|>"],
    "minimax_m3": ["]<]minimax[>["],
}
DAY = {"type": "object", "properties": {"n": {"type": "integer"}, "next": {"$ref": "#/$defs/day"}}, "required": ["n"]}
SCHEMA = {
    "type": "object",
    "properties": {
        "town": {"type": "string"},
        "code": {"type": "string", "pattern": "^[A-Z]{2}$"},
        "unit": {"anyOf": [{"enum": ["C", "F"]}, {"type": "null"}]},
        "days": {"type": "array", "items": {"$ref": "#/$defs/day"}, "minItems": 1, "maxItems": 3},
        "exact": {"type": "boolean"},
    },
    "required": ["days", "town"],
    "additionalProperties": False,
    "$defs": {"day": {**DAY, "additionalProperties": False}},
}
SELFIE: dict[str, Any] = {"type": "object", "properties": {"any": {}}}
TOOLS = [Tool("search", SCHEMA, True), Tool("selfie", SELFIE, False)]
SCHEMAS = {"search": SCHEMA, "selfie": SELFIE}
ARGUMENTS = {"town": 'Ulm, "x" {1}', "unit": None, "days": [{"n": 1, "next": {"n": -2}}]}
M3 = "]<]minimax[>["
CALLED = {  # search(ARGUMENTS), selfie(), as the families' own templates write them
    "gemma4": '<|tool_call>call:search{days:[{n:1,next:{n:-2}}],town:<|"|>Ulm, "x" {1}<|"|>,unit:null}<tool_call|>'
    "<|tool_call>call:selfie{}<tool_call|>",
    "functiongemma": '<start_function_call>call:search{town:<escape>Ulm, "x" {1}<escape>,unit:<escape>null<escape>,'
    'days:<escape>[{"n": 1, "next": {"n": -2}}]<escape>}<end_function_call>'
    "<start_function_call>call:selfie{}<end_function_call>",
    "apertus": '<|tools_prefix|>[{"search": {"town": "Ulm, \\"x\\" {1}", "unit": null, "days": [{"n": 1, "next": {"n": -2}}]}}, '
    '{"selfie": {}}]<|tools_suffix|>',
    "kimi_k3": '<|close|>response<|sep|><|open|>tools<|sep|><|open|>call tool="search" index="1"<|sep|>'
    '<|open|>argument key="town" type="string"<|sep|>Ulm, "x" {1}<|close|>argument<|sep|>'
    '<|open|>argument key="unit" type="null"<|sep|>null<|close|>argument<|sep|>'
    '<|open|>argument key="days" type="array"<|sep|>[{"n": 1, "next": {"n": -2}}]<|close|>argument<|sep|><|close|>call<|sep|>'
    '<|open|>call tool="selfie" index="2"<|sep|><|close|>call<|sep|><|close|>tools<|sep|>',
    "muse_glimmer": ' to=search<|message|><atem:function_calls>\n<atem:invoke name="search">\n'
    '<atem:parameter name="town">Ulm, "x" {1}</atem:parameter>\n<atem:parameter name="unit">null</atem:parameter>\n'
    '<atem:parameter name="days">[{"n": 1, "next": {"n": -2}}]</atem:parameter>\n</atem:invoke>\n</atem:function_calls>'
    '<|eom|><|start|>assistant to=selfie<|message|><atem:function_calls>\n<atem:invoke name="selfie">\n</atem:invoke>\n'
    "</atem:function_calls>",
    "minimax_m3": f'{M3}<tool_call>\n{M3}<invoke name="search">{M3}<town>Ulm, "x" {{1}}{M3}</town>{M3}<unit>null{M3}</unit>'
    f"{M3}<days>{M3}<item>{M3}<n>1{M3}</n>{M3}<next>{M3}<n>-2{M3}</n>{M3}</next>{M3}</item>{M3}</days>{M3}</invoke>\n"
    f'{M3}<invoke name="selfie">{M3}</invoke>\n{M3}</tool_call>',
}
HINTS = {
    "minimax_m3": [f"{M3}</", f"{M3}</invoke>", "town>", "item>"],
    "kimi_k3": ["<|close|>argument<|sep|>", "<|close|>response<|sep|>"],
    "muse_glimmer": ["</atem:parameter>\n"],
}
WRONG = {  # of the text: another one that is not in the language
    "gemma4": [("n:1", 'n:<|"|>1<|"|>'), ("{n:1,", "{"), ("town:", "towns:"), ('<|"|>Ulm, "x" {1}<|"|>', '"Ulm"'),
               ("days", "x:1,days")],
    "functiongemma": [(": 1,", ': "1",'), ("{town", "{towns"), ("call:search", "call:searches"), ("null", "K")],
    "apertus": [('"search"', '"searches"'), (": 1,", ': "1",'), (', {"selfie": {}}', ', {"selfie": 1}')],
    "kimi_k3": [('type="null"', 'type="number"'), ('type="array"', 'type="object"'), (": 1,", ': "1",'),
                ('tool="search"', 'tool="s"')],
    "minimax_m3": [("<n>1", "<n>x"), ("</town>", "</towns>"), ('name="search"', 'name="s"'),
                   (f"{M3}<unit>null{M3}</unit>", f"{M3}<b>{M3}</b>")],
    "muse_glimmer": [('invoke name="search"', 'invoke name="selfie"'), (" to=search", " to=searches"), (": 1,", ': "1",')],
}  # fmt: skip


def format_of(family: str) -> AnswerFormat:
    own = BY_NAME[family]
    return AnswerFormat(own.reasoning, *own.content, own.after_content, own.tools, own.ends_content)


@cache
def tokens(family: str, kind: str) -> tuple[Tokenizer, LLTokenizer, SpecialTokens]:
    """A small tokenizer in which the family's markers are special tokens, or text."""
    rust = byte_level()
    if kind == "special":
        rust.add_special_tokens(MARKERS[family])
    with TemporaryDirectory() as directory:
        tokenizer = Tokenizer.load(save(rust, Path(directory) / "model"))
    special = SpecialTokens.of(tokenizer, [EOS], tokenizer.vocab_size)
    return tokenizer, vocabulary(tokenizer, tokenizer.vocab_size, [EOS]), special


def compiled(family: str, kind: str, **rules: Any) -> LLMatcher:
    _, words, special = tokens(family, kind)
    made = {"tools": TOOLS, "state": "content", **rules}
    return compile_grammar(words, answer_grammar(AnswerRules(format=format_of(family), tokens=special, **made)))


def takes(matcher: LLMatcher, family: str, kind: str, text: str) -> bool:
    matcher = matcher.deep_copy()
    return matcher.consume_tokens(tokens(family, kind)[0].encode(text, add_special_tokens=False)) and matcher.is_accepting()


def read(family: str, text: str, cut: int | None = None) -> tuple[str, str, list[tuple[str, Any]]]:
    """Reasoning, content and calls, as the product reads a text in pieces of `cut` characters."""
    spec = spec_of(format_of(family), ["<|assistant|>"])
    template = ResponseTemplate.load({**spec, "fields": {**spec["fields"], **BY_NAME[family].fields}})
    parser, texts, calls = ResponseParser(template, "<|assistant|>", SCHEMAS), {Reasoning: "", Content: ""}, list[list[str]]()
    pieces = [text[at : at + (cut or len(text))] for at in range(0, len(text), cut or max(len(text), 1))]
    for event in [*(event for piece in pieces for event in parser.feed(piece)), *parser.finish()]:
        if isinstance(event, CallBegin):
            calls.append([event.name, ""])
        elif isinstance(event, CallArguments):
            calls[-1][1] += event.text
        else:
            texts[type(event)] += event.text
    return texts[Reasoning], texts[Content], [(name, json.loads(arguments or "{}")) for name, arguments in calls]


@pytest.mark.parametrize("kind", ["special", "text"])
@pytest.mark.parametrize("family", MARKERS)
def test_what_a_model_writes_is_in_its_grammar(family: str, kind: str) -> None:
    called, calls = CALLED[family], [("search", ARGUMENTS), ("selfie", {})]
    assert read(family, called) == ("", "", calls)
    ordered = dict(sorted(ARGUMENTS.items())) if family == "gemma4" else ARGUMENTS
    if family != "kimi_k3":  # which counts from 1
        assert written(format_of(family), "", "", [("search", ordered), ("selfie", {})]) == called
    matcher = compiled(family, kind, choice="required")
    assert takes(matcher, family, kind, called)
    for old, new in WRONG[family]:
        assert old in called and not takes(matcher, family, kind, called.replace(old, new)), new
    own = BY_NAME[family]
    begin, end = own.content
    free = compiled(family, kind, choice="auto")
    assert takes(free, family, kind, f"{begin}Hello to=you, { {} }{end}")
    text = written(format_of(family), "", "Hello.", [("search", ordered), ("selfie", {})])
    assert takes(free, family, kind, text) and not takes(
        free, family, kind, text.replace("n", "m", 1) if "n:1" in text else text[:-3]
    )
    for cut in (1, 2, 7):
        assert read(family, text, cut) == ("", "Hello.", calls)


@pytest.mark.parametrize("kind", ["special", "text"])
@pytest.mark.parametrize("family", MARKERS)
def test_random_legal_answers_read_back(family: str, kind: str) -> None:
    tokenizer = tokens(family, kind)[0]
    hints = [
        tokenizer.encode(text, add_special_tokens=False) for text in (*MARKERS[family], *HINTS.get(family, ()), "}", '"', "]")
    ]
    ended = 0
    for seed in range(16):
        choice = ("required", "auto")[seed % 2]
        matcher, dice, ids = compiled(family, kind, choice=choice).deep_copy(), random.Random(seed), list[int]()
        while len(ids) < 500:
            if dice.random() < 0.3:
                ids += (hint := dice.choice(hints))[: matcher.try_consume_tokens(hint)]
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
            legal = [int(id) for id in np.flatnonzero(bits[: tokenizer.vocab_size])]
            if EOS in legal and (len(legal) == 1 or dice.random() < 0.3):
                ended += 1
                text = tokenizer.decode(ids, skip_special_tokens=False)
                _, _, calls = read(family, text)
                assert calls or choice == "auto", text
                assert (
                    choice == "required" or calls or not any(name in text for name in ("call:", "invoke name", "call tool="))
                ), text
                for name, arguments in calls:
                    jsonschema.validate(arguments, SCHEMAS[name])
                break
            ids.append(dice.choice([id for id in legal if id != EOS]))
            assert matcher.consume_tokens(ids[-1:]), matcher.get_error()
    assert ended > 2


def test_channels_of_an_answer() -> None:
    matcher = compiled("muse_glimmer", "special", choice="auto", state="start")
    for text in (" to=user<|message|>Hi", " to=self<|message|>Hm.<|eom|><|start|>assistant to=user<|message|>Hi"):
        assert takes(matcher, "muse_glimmer", "special", text)
    assert not takes(matcher, "muse_glimmer", "special", " to=other<|message|>Hi")
    required = compiled("kimi_k3", "special", choice="required", state="reasoning")
    assert takes(required, "kimi_k3", "special", "Hm.<|close|>think<|sep|><|open|>response<|sep|>" + CALLED["kimi_k3"])
    assert read("kimi_k3", "Hello.<|close|>response<|sep|><|close|>message<|sep|>", 3) == ("", "Hello.", [])


@pytest.mark.parametrize(("body", "arguments"), [
    ("{M}<days>{M}</days>{M}<town>{M}</town>", {"days": [], "town": ""}),
    ("{M}<days>{M}<item>{M}<n>1{M}</n>{M}</item>{M}<item>{M}<n>2", {"days": [{"n": 1}, {"n": 2}]}),
    ("{M}<any>{M}<a>1{M}</a>{M}<b>{M}<c>x{M}</c>{M}</b>{M}</any>", {"any": {"a": "1", "b": {"c": "x"}}}),
    ("{M}<any>{M}<item>x{M}</item>{M}<item>y{M}</item>{M}</any>", {"any": ["x", "y"]}),
    ("{M}<exact>true{M}</exact>{M}<unit>C{M}</unit>", {"exact": True, "unit": "C"}),
    ("{M}<any>{M}<t>a{M}</t>{M}<t>b{M}</t>{M}<u>1{M}</u>{M}</any>", {"any": {"t": ["a", "b"], "u": "1"}}),
    ("{M}</town>", None), ("text", None), ("{M}text", None), ("{M}<a>" * 100, None),
])  # fmt: skip
def test_tags_within_tags_are_read_by_schema(body: str, arguments: Any) -> None:
    text = f'{M3}<invoke name="search">{body.replace("{M}", M3)}{M3}</invoke>'
    assert read("minimax_m3", text) == (("", text, []) if arguments is None else ("", "", [("search", arguments)]))
