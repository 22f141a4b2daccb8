"""The fields of structured output: each form gives a grammar that takes and refuses the right texts."""

import asyncio
import json
from typing import Any

import pytest

from tpserve.errors import UserError
from tpserve.frontend.openai.body import parse
from tpserve.frontend.openai.grammar import grammar_of
from tpserve.frontend.openai.schema import ChatCompletionRequest, CompletionRequest
from tpserve.structured_output.checker import GrammarChecker
from tpserve.structured_output.compiler import GrammarError, compile_grammar, vocabulary
from tpserve.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load("tpserve/builtin/model")
VOCABULARY = vocabulary(TOKENIZER, TOKENIZER.vocab_size, ())
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TAG = {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f"]}


def grammar(fields: dict[str, Any]) -> str:
    call, warnings = parse({"prompt": "", **fields}, CompletionRequest, set())
    assert not warnings
    return grammar_of(call)


def takes(compiled: str, text: str) -> bool:
    """Whether the whole text is in the language."""
    matcher = compile_grammar(VOCABULARY, compiled)
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    return matcher.consume_tokens(ids) and matcher.is_accepting()


@pytest.mark.parametrize(("fields", "good", "bad"), [
    ({"response_format": {"type": "json_object"}}, '{"x": [1, {"y": null}]}', "[1]"),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, '{"a": 1}', '{"a": "1"}'),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}}, '{"a": 1}', "{}"),
    ({"response_format": {"type": "regex", "regex": "a+"}}, "aaa", "ab"),
    ({"response_format": {"type": "structural_tag", **TAG}}, 'hello <f>{"a": 1}</f> bye', "hello <f>1</f>"),
    ({"structured_outputs": {"json": SCHEMA}}, '{ "a" : 1 }', '{"a": 1, "b": 2}'),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, '{"a": 1}', "{}"),
    ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, '{"a":1}', '{"a": 1}'),
    ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": "_"}}, '{"a":_1}', '{"a": 1}'),
    ({"structured_outputs": {"json": {"properties": {"a": {}}}, "disable_additional_properties": True}}, '{"a": 1}', '{"b": 1}'),
    ({"structured_outputs": {"json_object": True}}, "{}", "1"),
    ({"structured_outputs": {"regex": "[0-9]{3}"}}, "123", "12"),
    ({"structured_outputs": {"choice": ["yes", "n\u00f6 \U0001f600"]}}, "n\u00f6 \U0001f600", "maybe"),
    ({"structured_outputs": {"grammar": 'root ::= "a" [0-9]+'}}, "a12", "a"),
    ({"structured_outputs": {"grammar": 'start: "a" /[0-9]+/'}}, "a12", "b1"),
    ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, "no tag at all", "<f>{}</f>"),
    ({"guided_json": SCHEMA}, '{"a": 1}', "{}"),
    ({"guided_regex": "x|y"}, "y", "z"),
    ({"guided_choice": ["p", "q"]}, "q", "r"),
    ({"guided_grammar": 'root ::= "k"'}, "k", "l"),
    ({"json_schema": json.dumps(SCHEMA)}, '{"a": 1}', "{}"),
    ({"regex": "x"}, "x", "y"),
    ({"ebnf": 'root ::= "k"'}, "k", "l"),
], ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None)  # fmt: skip
def test_each_form_takes_and_refuses(fields: dict[str, Any], good: str, bad: str) -> None:
    compiled = grammar(fields)
    assert takes(compiled, good) and not takes(compiled, bad)


@pytest.mark.parametrize("fields", [
    {},
    {"response_format": {"type": "text"}},
    {"response_format": None},
    {"structured_outputs": {}},
    {"structured_outputs": {"json": None, "regex": None, "disable_fallback": False, "backend": "xgrammar"}},
], ids=str)  # fmt: skip
def test_forms_without_effect(fields: dict[str, Any]) -> None:
    assert grammar(fields) == ""


def test_blanks_between_the_parts_of_json_are_bounded() -> None:
    compiled = grammar({"guided_json": SCHEMA})
    for blanks, allowed in ((" ", True), ("\t", True), ("\n" + " " * 32, True), ("\r\n", True), ("  ", False), ("\n\n", False)):
        assert takes(compiled, f'{{{blanks}"a": 1}}') is allowed, blanks
    assert not takes(compiled, '{\n%s"a": 1}' % (" " * 33))


@pytest.mark.parametrize(("fields", "says"), [
    ({"guided_regex": "(a"}, "unclosed group"),
    ({"guided_json": {"type": "foo"}}, "Invalid type: foo"),
    ({"guided_json": {"not": {"type": "string"}}}, "not"),
    ({"guided_grammar": "start: nothing"}, "nothing"),
], ids=str)  # fmt: skip
def test_what_cannot_be_compiled_is_said_in_llguidances_words(fields: dict[str, Any], says: str) -> None:
    with pytest.raises((GrammarError, UserError), match=says):
        compile_grammar(VOCABULARY, grammar(fields))


CONST = {"type": "const_string", "value": "yes"}
ANY = {"type": "any_text"}
JSON = {"type": "json_schema", "json_schema": SCHEMA}
NEW_TAG = {"type": "tag", "begin": "<f>", "content": JSON, "end": "</f>"}
TEXT_TAG = {"type": "tag", "begin": "<t>", "content": ANY, "end": ["</t>", "</u>"]}
TAGS = {"triggers": ["<"], "tags": [NEW_TAG, TEXT_TAG]}


@pytest.mark.parametrize(("form", "good", "bad"), [
    (CONST, ["yes"], ["no", "yesyes"]),
    (JSON, ['{"a": 1}'], ["{}"]),
    (ANY, ["", "any\ntext"], []),
    ({**ANY, "excludes": ["no", "/"]}, ["n o"], ["a no", "a/b"]),
    ({"type": "regex", "pattern": "a/?b"}, ["a/b"], ["a//b"]),
    ({"type": "grammar", "grammar": 'root ::= "k" [0-9]'}, ["k1"], ["k"]),
    ({"type": "sequence", "elements": [CONST, JSON, CONST]}, ['yes{"a": 1}yes'], ["yesyes"]),
    ({"type": "sequence", "elements": [ANY, CONST]}, ["yes", "oh yes"], ["oh", "yes no"]),
    ({"type": "sequence", "elements": [CONST, ANY]}, ["yes", "yes, well"], ["well"]),
    ({"type": "or", "elements": [CONST, NEW_TAG]}, ["yes", '<f>{"a": 1}</f>'], ["", "<f>"]),
    (NEW_TAG, ['<f>{"a": 1}</f>'], ["<f>1</f>", '<f>{"a": 1}']),
    (TEXT_TAG, ["<t>a <b></t>", "<t></u>"], ["<t>a", "<t></t></t>"]),
    ({"type": "triggered_tags", **TAGS}, ["", "hi", 'a <f>{"a": 1}</f> b <t>x</u>'], ["a < b", "<f>1</f>"]),
    ({"type": "triggered_tags", **TAGS, "at_least_one": True}, ["a <t>x</t>"], ["", "hi"]),
    ({"type": "triggered_tags", **TAGS, "stop_after_first": True}, ["hi", "a <t>x</t>"], ["<t>x</t> b"]),
    ({"type": "sequence", "elements": [{"type": "triggered_tags", **TAGS}, CONST]}, ["a <t>x</t> yes"], ["a <t>x</t>", "yes no"]),
    ({"type": "tags_with_separator", "tags": TAGS["tags"], "separator": ","}, ["", "<t></t>,<t>a</t>"], ["<t></t><t></t>", "hi"]),
    ({"type": "tags_with_separator", "tags": [NEW_TAG], "separator": ",", "at_least_one": True}, ['<f>{"a": 1}</f>'], [""]),
    ({"type": "optional", "content": CONST}, ["", "yes"], ["yesyes"]),
    ({"type": "plus", "content": CONST}, ["yes", "yesyes"], [""]),
    ({"type": "star", "content": CONST}, ["", "yesyes"], ["no"]),
    ({"type": "repeat", "content": CONST, "min": 2, "max": 3}, ["yesyes"], ["yes", "yes" * 4]),
], ids=lambda value: value["type"] if isinstance(value, dict) else "")  # fmt: skip
def test_the_newer_form_of_structural_tags(form: Any, good: list[str], bad: list[str]) -> None:
    compiled = grammar({"response_format": {"type": "structural_tag", "format": form}})
    assert [text for text in good if not takes(compiled, text)] == []
    assert [text for text in bad if takes(compiled, text)] == []


@pytest.mark.parametrize(("form", "param", "says"), [
    (5, "format.type", "known are const_string"),
    ({"type": "dispatch"}, "format.type", "'dispatch'"),
    ({"type": "const_string"}, "format.value", "a text"),
    ({"type": "sequence", "elements": []}, "format.elements", "at least one"),
    ({"type": "sequence", "elements": [ANY, JSON]}, "format.elements[0]", "to have an end"),
    ({"type": "tag", "begin": {"type": "token", "token": 5}, "content": ANY, "end": "x"}, "format.begin", "a text"),
    ({"type": "tag", "begin": "x", "content": ANY, "end": {"type": "token", "token": 5}}, "format.end", "tokens"),
    ({"type": "triggered_tags", "tags": [NEW_TAG], "triggers": ["<g"]}, "format.tags[0]", "no trigger begins '<f>'"),
    ({"type": "json_schema", "json_schema": SCHEMA, "style": "qwen_xml"}, "format", "only style json"),
    ({"type": "repeat", "content": CONST, "min": 2, "max": 1}, "format", "min <= max"),
    ({**ANY, "max_tokens": 5}, "format", "not supported"),
], ids=str)  # fmt: skip
def test_what_structural_tags_cannot_say(form: Any, param: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as refusal:
        grammar({"response_format": {"type": "structural_tag", "format": form}})
    assert refusal.value.param == f"response_format.{param}"


def test_structural_tags_are_bounded() -> None:
    form: Any = CONST
    for _ in range(40):
        form = {"type": "optional", "content": form}
    for deep_or_wide in (form, {"type": "or", "elements": [CONST] * 3000}):
        with pytest.raises(UserError, match="make it smaller"):
            grammar({"response_format": {"type": "structural_tag", "format": deep_or_wide}})


def test_chat_has_the_same_fields() -> None:
    call, _ = parse({"messages": [{"role": "user", "content": "x"}], "guided_choice": ["a"]}, ChatCompletionRequest, set())
    assert takes(grammar_of(call), "a")


def test_a_structure_needs_a_trigger() -> None:
    with pytest.raises(UserError, match="no trigger begins '<f>'"):
        grammar({"structured_outputs": {"structural_tag": {**TAG, "triggers": ["<g"]}}})


def test_ids_of_the_model_without_a_token_and_tokens_that_the_model_lacks() -> None:
    for vocab_size, eos_ids in ((300, ()), (300, (1,)), (5000, (1, 4000)), (TOKENIZER.vocab_size, (1,))):
        compiled = compile_grammar(vocabulary(TOKENIZER, vocab_size, eos_ids), grammar({"guided_regex": "[a-z ]{1,30}x"}))
        bits = compiled.compute_bitmask()
        allowed = [id for id in range(vocab_size) if bits[id // 8] >> (id % 8) & 1]
        assert allowed and max(allowed) < min(vocab_size, TOKENIZER.vocab_size), "no id without text, and no end yet"
        assert all(set(TOKENIZER.token_text(id)) <= set("abcdefghijklmnopqrstuvwxyz ") for id in allowed)


async def refusal(grammar: str) -> str:
    try:
        await GrammarChecker(TOKENIZER).check(grammar)
    except UserError as error:
        assert error.code == "invalid_grammar" and error.status == 400
        return str(error)
    return ""


@pytest.mark.parametrize(("fields", "says"), [
    ({"guided_choice": [f"choice {i}" for i in range(3000)]}, ""),
    ({"guided_json": {"oneOf": [{"minimum": 1}, {"maximum": 3}]}}, "an instance may be valid for two schemas of oneOf"),
    ({"guided_json": {"type": "string", "format": "path"}}, "Unknown format: path: leave it out; known are date"),
    ({"guided_grammar": 'start: e\ne: e e | "a" | e "a" e | /[a-z ]/ | ""\n'}, "Too many items"),
    ({"guided_json": {"type": "string", "pattern": "^\\x01$"}}, "no answer is in its language"),
], ids=["choice", "oneOf", "format", "ambiguous", "control"])  # fmt: skip
def test_what_is_too_complex_from_its_first_tokens_on_is_refused(fields: dict[str, Any], says: str) -> None:
    found = asyncio.run(refusal(grammar(fields)))
    assert says in found and bool(says) == bool(found), found
