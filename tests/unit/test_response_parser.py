"""The parser of answers: what transformers reads from the same template, cut at every place, damaged, and cut short."""

import json
import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
from transformers.utils.chat_parsing import parse_response

from tests.unit import chat_templates
from tpserve.errors import UserError
from tpserve.response_template import content as content_module
from tpserve.response_template.call_reader import CallArguments, CallBegin
from tpserve.response_template.detect import detect
from tpserve.response_template.parser import ResponseParser
from tpserve.response_template.regions import Content, Event, Reasoning
from tpserve.response_template.template import ResponseTemplate
from tpserve.text.chat import ChatTemplate

START = "<|assistant|>"
IN_CONTENT = {"type": "function", "function": {"name": "{content.name}", "arguments": "{content.arguments}"}}
IN_DELIMITER = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
EACH = {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}}
THINK = {"open": "<think>", "close": "</think>"}


def spec(**fields: Any) -> dict[str, Any]:
    return {"start_anchor": START, "fields": fields}


TAGGED = {
    "open_pattern": r"<tool_call>\s*<function=(?P<name>[^>]+)>",
    "close_pattern": r"</function>\s*</tool_call>",
    "repeats": True,
    "content": "xml-inline",
    "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>]+)>\n(?P<value>.*?)\n</parameter>"},
    "transform": IN_DELIMITER,
}
JSON_CALLS = {"open": "<tool_call>", "close": "</tool_call>", "content": "json", "repeats": True, "transform": IN_CONTENT}
GEMMA = {
    "open_pattern": r"<call>(?P<name>\w+)(?=\{)",
    "close": "</call>",
    "repeats": True,
    "content": "json",
    "content_args": {"unquoted_keys": True, "string_delims": [["<q>", "</q>"]]},
    "transform": IN_DELIMITER,
}
SPECS = {
    "hermes": spec(thinking=THINK, tool_calls=JSON_CALLS, content={}),
    "tagged": spec(thinking=THINK, tool_calls=TAGGED, content={}),
    "named": spec(
        tool_calls={
            "open_pattern": "<call>(?P<name>.*?)<sep>",
            "close": "<end>",
            "content": "json",
            "repeats": True,
            "transform": IN_DELIMITER,
        },
        content={},
    ),
    "list": spec(tool_calls={"open": "[TOOL_CALLS]", "content": "json", "transform": EACH, "transform_each": True}, content={}),
    "python": spec(
        tool_calls={
            "open_pattern": r"(?=\[\w+\()",
            "content": "python-call-list",
            "transform": EACH,
            "transform_each": True,
        },
        content={},
    ),
    "channels": spec(
        thinking={"open": "<|c|>analysis<|m|>", "close": "<|e|>"},
        tool_calls={
            "open_pattern": r"<\|c\|>commentary to=functions\.(?P<name>\S+)\s*(?:<\|k\|>)?json<\|m\|>",
            "close": "<|call|>",
            "content": "json",
            "repeats": True,
            "transform": IN_DELIMITER,
        },
        content={"open": "<|c|>final<|m|>", "close": "<|r|>"},
    ),
    "gemma": spec(tool_calls=GEMMA, content={}),
}
Call = tuple[str, dict[str, Any]]


def written(kind: str, thinking: str, content: str, calls: Sequence[Call]) -> str:
    """An answer as a model of this kind writes it."""
    if kind == "channels":
        parts = [f"<|c|>analysis<|m|>{thinking}<|e|><|start|>assistant"] if thinking else []
        parts += [f"<|c|>commentary to=functions.{n} <|k|>json<|m|>{json.dumps(a)}<|call|>" for n, a in calls]
        return "".join(parts) + (f"<|c|>final<|m|>{content}<|r|>" if content else "")
    text = (f"<think>\n{thinking}\n</think>\n\n" if thinking and kind in ("hermes", "tagged") else "") + content
    match kind:
        case "hermes":
            for name, arguments in calls:
                call = {"name": name, "arguments": arguments}
                text += f"\n<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"
        case "tagged":
            for name, arguments in calls:
                values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
                tags = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
                text += f"\n<tool_call>\n<function={name}>\n{tags}</function>\n</tool_call>"
        case "named":
            text += "".join(f"<call>{name}<sep>{json.dumps(arguments, indent=1)}<end>" for name, arguments in calls)
        case "list" if calls:
            text += "[TOOL_CALLS] " + json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls])
        case "python" if calls:
            texts = [f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})" for name, arguments in calls]
            text += f"[{', '.join(texts)}]"
        case "gemma":
            for name, arguments in calls:
                pairs = [f"{k}:<q>{v}</q>" if isinstance(v, str) else f"{k}: {json.dumps(v)}" for k, v in arguments.items()]
                text += f"<call>{name}{{{','.join(pairs)}}}</call>"
    return text


def parsed(template: ResponseTemplate, pieces: Sequence[str], prompt: str = START, **more: Any) -> tuple[str, str, list[Any]]:
    parser = ResponseParser(template, prompt, **more)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    return told(events)


def told(events: Sequence[Event]) -> tuple[str, str, list[Any]]:
    thinking = content = ""
    calls: list[Any] = []
    for event in events:
        match event:
            case Reasoning(text):
                thinking += text
            case Content(text):
                content += text
            case CallBegin(name, _):
                calls.append([name, ""])
            case CallArguments(text):
                calls[-1][1] += text
    return thinking, content, calls


def random_case(random: random.Random, kind: str) -> tuple[str, str, list[Call]]:
    values = ["x", "two words", 'q"uo\nte', "ünï✓", 7, -1.5, True, None, [1, {"z": "[}"}], {"k": {}}]
    names = ["a", "city", "n_2"]
    calls = []
    for _ in range(random.choice((0, 1, 1, 2, 3))):
        keys = random.sample(names, random.randint(0, 3))
        calls.append((random.choice(("f", "get_weather")), {key: random.choice(values) for key in keys}))
    content = random.choice(("", "Hello\nworld", "a < b [1]", "é"))
    if kind == "channels" and calls:
        content = ""
    return random.choice(("", "hm <x> so")), content, calls


@pytest.mark.parametrize("kind", SPECS)
def test_reads_what_was_written_as_transformers_does(kind: str) -> None:
    template, draw = ResponseTemplate.load(SPECS[kind]), random.Random(kind)
    for _ in range(60):
        thinking, content, calls = random_case(draw, kind)
        text = written(kind, thinking, content, calls)
        expected = parse_response(text, SPECS[kind], prefix=START)
        own = parsed(template, [text])
        bare = [[call["function"]["name"], call["function"]["arguments"]] for call in expected.get("tool_calls", [])]
        assert [[name, json.loads(arguments)] for name, arguments in own[2]] == bare, text
        assert bare == [list(call) for call in calls] or kind == "tagged", text  # whose values are texts without schemas
        assert own[1] == content and (own[0] == thinking or kind not in ("hermes", "tagged", "channels")), text
        assert own[0] == expected.get("thinking", "")


@pytest.mark.parametrize("kind", SPECS)
def test_the_cut_changes_nothing_not_even_in_damaged_text(kind: str) -> None:
    template, draw = ResponseTemplate.load(SPECS[kind]), random.Random(kind)
    for _ in range(40):
        text = written(kind, *random_case(draw, kind))
        if draw.random() < 0.5:
            at = draw.randint(0, len(text))
            text = text[:at] + text[at + draw.randint(0, 5) :]
        whole = parsed(template, [text])
        assert parsed(template, list(text)) == whole, text
        for at in draw.sample(range(len(text) + 1), min(len(text), 8)):
            assert parsed(template, [text[:at], text[at:]]) == whole, (text, at)


@pytest.mark.parametrize("kind", SPECS)
def test_text_that_has_been_read_may_go(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long answer is not kept: each token would copy it. What delimiters see of it stays."""
    template, draw = ResponseTemplate.load(SPECS[kind]), random.Random(kind)
    for _ in range(30):
        text = written(kind, *random_case(draw, kind))
        whole, ranges = parsed(template, [text]), ResponseParser(template, START)
        ranges.feed(text)
        with monkeypatch.context() as patch:
            patch.setattr("tpserve.response_template.parser.MAX_READ_CHARS", 33)
            patch.setattr("tpserve.response_template.parser.SEEN_CHARS", 32)
            assert parsed(template, list(text)) == whole, text
            parser = ResponseParser(template, START)
            for char in text:
                parser.feed(char)
            assert parser.reasoning == ranges.reasoning
            for _ in range(200):
                parser.feed("a ")
            assert len(parser._text) < 200 or not parser._entered


def test_arguments_come_while_they_are_written() -> None:
    parser = ResponseParser(ResponseTemplate.load(SPECS["hermes"]), START)
    text = '<tool_call>\n{"name": "f", "arguments": {"file": "line'
    assert parser.feed(text) == [CallBegin("f"), CallArguments('{"file": "line')]
    assert parser.feed(" 1\\n") == [CallArguments(" 1\\n")]
    assert parser.feed('"}}\n</tool_call>') == [CallArguments('"}')]


def test_a_delimiter_within_a_quoted_text_is_text() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call>\\""}}\n</tool_call>'
    assert parsed(ResponseTemplate.load(SPECS["hermes"]), list(text)) == ("", "", [["f", '{"a": "</tool_call>\\""}']])


def test_a_delimiter_that_is_only_looked_for_ahead_is_text_within_a_quoted_text() -> None:
    """A call without an end of its own lasts until the next begins."""
    field = {"open_pattern": r"<call>(?P<name>\w+)<args>", "close_pattern": "(?=<call>)", "repeats": True, "content": "json"}
    template = ResponseTemplate.load(spec(tool_calls={**field, "transform": IN_DELIMITER}, content={}))
    text = '<call>f<args>{"a": "x <call>g<args> y"}<call>g<args>{}'
    for pieces in ([text], list(text)):
        assert parsed(template, pieces) == ("", "", [["f", '{"a": "x <call>g<args> y"}'], ["g", "{}"]])


def test_arguments_before_the_name_and_arguments_as_text() -> None:
    template = ResponseTemplate.load(SPECS["hermes"])
    assert parsed(template, list('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>'))[2] == [["f", '{"a": 1}']]
    assert parsed(template, list('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>'))[2] == [["f", '{"a": 1}']]


@pytest.mark.parametrize("text", ["<tool_call>what?</tool_call>", "<tool_call>", '<tool_call>{"nome": "f"}</tool_call> x'])
def test_a_region_without_a_call_is_content(text: str) -> None:
    thinking, content, calls = parsed(ResponseTemplate.load(SPECS["hermes"]), list(text))
    assert (thinking, calls) == ("", []) and content == text


def test_a_search_that_takes_too_long_leaves_the_call_as_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_module, "MAX_SECONDS", 1e-9)
    text = written("tagged", "", "", [("f", {"a": "x" * 200_000})])
    assert parsed(ResponseTemplate.load(SPECS["tagged"]), [text])[1:] == (text.lstrip(), [])


@pytest.mark.parametrize(
    ("family", "text"), [("qwen3_coder", "<parameter=a>\nx"), ("muse_glimmer", '<atem:parameter name="a">x')]
)
def test_tags_without_an_end_are_looked_for_once(family: str, text: str) -> None:
    begin = {"qwen3_coder": "<tool_call>\n<function=f>\n", "muse_glimmer": '<atem:invoke name="f">'}[family]
    end = {"qwen3_coder": "</function>\n</tool_call>", "muse_glimmer": "</atem:invoke>"}[family]
    template = ResponseTemplate.load(detect(ChatTemplate(None), {}, family).spec)
    began_s = time.thread_time()
    for count in (40_000, 1_500):  # more than a call may have, either way
        assert parsed(template, [begin + text * count + end])[2] in ([], [["f", "{}"]])
    assert parsed(template, [begin + text * 1_000 + end])[2] != []
    assert time.thread_time() - began_s < 10


def test_texts_in_marks_without_an_end_are_looked_for_once() -> None:
    began_s = time.thread_time()
    assert parsed(ResponseTemplate.load(SPECS["gemma"]), ["<call>f{a:" + "<q>x" * 200_000 + "}</call>"])[2] == []
    assert time.thread_time() - began_s < 10


def test_a_grammar_says_which_white_space_is_between_reasoning_and_content() -> None:
    template = ResponseTemplate.load(SPECS["hermes"])
    for prompt, text in ((f"{START}<think>\n", "so\n</think>\n\n \nYes"), (f"{START}<think>\n\n</think>\n\n", " \nYes")):
        for size in range(1, len(text) + 1):
            parser = ResponseParser(template, prompt, gap="\n\n")
            pieces = [text[at : at + size] for at in range(0, len(text), size)]
            events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
            assert "".join(event.text for event in events if isinstance(event, Content)) == " \nYes"


CALLS_IN_REASONING = {
    "hermes": "<tool_call>\n" + json.dumps({"name": "f", "arguments": {"a": 1}}) + "\n</tool_call>",
    "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
    '{"a": 1}<|tool_call_end|><|tool_calls_section_end|>',
    "glm": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
}


@pytest.mark.parametrize("family", CALLS_IN_REASONING)
def test_a_call_inside_reasoning_ends_it(family: str) -> None:
    template = ResponseTemplate.load(detect(ChatTemplate(None), {}, family, "think").spec)
    call, schema = CALLS_IN_REASONING[family], {"f": {"properties": {"a": {"type": "integer"}}}}
    for end, content in (("", ""), ("\n</think>\n\nDone.", "Done."), ("\n</think>", ""), ("Done.", "Done.")):
        text = f"<think>\nThe tag <tool_call> or <|tool_call_begin|> would do.\n{call}{end}"
        for cut in (1, 3, len(text)):
            pieces = [text[at : at + cut] for at in range(0, len(text), cut)]
            thinking, said, calls = parsed(template, pieces, tools=schema)
            assert thinking == "The tag <tool_call> or <|tool_call_begin|> would do." and said.strip() == content
            assert [(name, json.loads(arguments)) for name, arguments in calls] == [("f", {"a": 1})]
    kept = ResponseParser(template, calls_end_reasoning=False)
    events = [*kept.feed(f"<think>\n{call}\n</think>\n\nDone."), *kept.finish()]
    assert events == [Reasoning(call), Content("Done.")]


def test_a_call_cut_short_keeps_what_was_written() -> None:
    text = 'Wait.\n<tool_call>\n{"name": "f", "arguments": {"a": [1, '
    assert parsed(ResponseTemplate.load(SPECS["hermes"]), list(text)) == ("", "Wait.", [["f", '{"a": [1, ']])


def test_the_prompt_opens_or_closes_reasoning() -> None:
    template = ResponseTemplate.load(SPECS["hermes"])
    for prompt, place in ((START, "start"), (f"{START}<think>\n", "reasoning"), (f"{START}<think>\n\n</think>\n\n", "content")):
        assert ResponseParser(template, f"old {START}<think> older {prompt}").place == place
    assert parsed(template, ["so\n</think>\n\nYes"], f"{START}<think>\n") == ("so", "Yes", [])
    assert parsed(template, ["  Yes "], f"{START}<think>\n\n</think>\n\n") == ("", "Yes ", [])
    assert parsed(template, [" begun, ended"], f"{START}It has") == ("", " begun, ended", [])


def test_plain_content_stays_as_it_is() -> None:
    template = ResponseTemplate.load(SPECS["hermes"])
    assert parsed(template, list("  two \n\n words  \n")) == ("", "  two \n\n words  \n", [])
    assert parsed(template, list("a <tool_call>{}</tool_call>"), reads_calls=False)[1] == "a <tool_call>{}</tool_call>"


def test_ranges_of_reasoning_are_those_of_the_output() -> None:
    parser = ResponseParser(ResponseTemplate.load(SPECS["hermes"]), f"{START}<think>\nOne ")
    for char in "two</think>\n\nthree":
        parser.feed(char)
    parser.finish()
    assert parser.reasoning == [[0, 3]]


def test_values_get_the_types_of_their_schema() -> None:
    schema = {
        "$defs": {"day": {"enum": ["mon", "tue"]}},
        "properties": {
            **{kind: {"type": kind} for kind in ("integer", "number", "boolean", "array", "string")},
            "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
            "day": {"$ref": "#/$defs/day"},
            "huge": {"type": "number"},
            "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
    }
    written_values = {
        "integer": "3.0",
        "number": "2.5",
        "boolean": "True",
        "array": "[1]",
        "string": "7",
        "either": "12",
        "day": "mon",
        "huge": "1e999",
        "maybe": "null",
        "other": "5",
    }
    text = written("tagged", "", "", [("f", written_values)])
    ((_, arguments),) = parsed(ResponseTemplate.load(SPECS["tagged"]), [text], tools={"f": schema})[2]
    assert json.loads(arguments) == {
        "integer": 3,
        "number": 2.5,
        "boolean": True,
        "array": [1],
        "string": "7",
        "either": 12,
        "day": "mon",
        "huge": "1e999",
        "maybe": None,
        "other": "5",
    }


@pytest.mark.parametrize("name", ["HERMES", "LLAMA_JSON", "PYTHONIC", "MISTRAL_ARGS", "HARMONY", "KIMI", "GLM"])
@pytest.mark.parametrize("unit", [" ", "\n", "<", "{", "[", '{"', "<|"])
def test_a_long_run_costs_no_more_than_its_length(name: str, unit: str) -> None:
    template = ResponseTemplate.load(detect(ChatTemplate(getattr(chat_templates, name)), {}).spec)
    parser, text, begin = ResponseParser(template), unit * 12_000, time.process_time()
    for at in range(0, len(text), 6):
        parser.feed(text[at : at + 6])
        assert time.process_time() - begin < 20, "the square of its length: minutes"
    parser.finish()


READ_AS: Sequence[tuple[str, str, str, str, list[list[str]]]] = [
    ("kimi_k2", "Look.<|tool_calls_section_begin|><|tool_call_begin|>f:3<|tool_call_argument_begin|>{}<|tool_call_end|>"
     "<|tool_calls_section_end|>", "", "Look.", [["f", "{}", "f:3"]]),
    ("kimi_k2", "<think>So <|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}"
     "<|tool_call_end|><|tool_calls_section_end|>", "So", "", [["f", "{}", "functions.f:0"]]),
    ("hermes", 'One <tool_call>{"name": "f"}</tool_call> two <tool_call>[{"name": "g", "parameters": {}}]</tool_call>\nthree', "",
     "One\ntwo\nthree", [["f", "{}"], ["g", "{}"]]),
    ("llama3_json", '{"name": "f", "arguments": {"a": 1}}; {"name": "g", "parameters": {}}', "", "",
     [["f", '{"a": 1}'], ["g", "{}"]]),
    ("mistral", '[TOOL_CALLS]f{"a": "[TOOL_CALLS]"}[TOOL_CALLS]g[CALL_ID]x1y2[ARGS]{} Then this.', "", "Then this.",
     [["f", '{"a": "[TOOL_CALLS]"}'], ["g", "{}", "x1y2"]]),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1]}}, {"arguments": {}, "name": "g"}]', "", "",
     [["f", '{"a": [1]}'], ["g", "{}"]]),
    ("pythonic", "<|python_start|>[f(a=-1.5, b={'c': None}), g(a='it\\'s')]<|python_end|>", "", "",
     [["f", '{"a": -1.5, "b": {"c": null}}'], ["g", '{"a": "it\'s"}']]),
    ("pythonic", "<think>Both</think>\n[f(), g()]", "Both", "", [["f", "{}"], ["g", "{}"]]),
    ("pythonic", "[f(a={'x'}, b='1\n2')] There.", "", "There.", [["f", '{"a": ["x"], "b": "1\\n2"}']]),
    ("qwen3_coder", "<function=f>\n<parameter=a>\n\n  x\n\n</parameter>\n<parameter=b>\n</function>\n</parameter>\n</function>\n"
     "<function=g>\n</function>\n</tool_call>", "", "", [["f", '{"a": "\\n  x\\n", "b": "</function>"}'], ["g", "{}"]]),
    ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=a>\n1\n<parameter=b>\n2", "", "", [["f", '{"a": "1", "b": "2"}']]),
    ("deepseek_v32", '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="false">[1]</｜DSML｜parameter>'
     '<｜DSML｜parameter name="b" string="true">[1]</｜DSML｜parameter>\n</｜DSML｜invoke>', "", "",
     [["f", '{"a": [1], "b": "[1]"}']]),
    ("gpt_oss", "no channel at all", "", "no channel at all", []),
    ("gpt_oss", "<|channel|>analysis<|message|><|start|>assistant<|channel|>final<|message|>Empty thoughts.<|return|>", "",
     "Empty thoughts.", []),
    ("gpt_oss", '<|channel|>analysis<|message|>one<|end|><|start|>assistant<|channel|>analysis<|message|>two<|end|>'
     '<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>'
     '<|start|>assistant to=a.b<|channel|>commentary<|message|>{"a": 1}<|call|>',
     "one\ntwo", "I look.", [["a.b", '{"a": 1}']]),
]  # fmt: skip


@pytest.mark.parametrize("case", READ_AS, ids=lambda case: case[0])
def test_what_models_write_beside_their_format(case: tuple[str, str, str, str, list[list[str]]]) -> None:
    name, text, *expected = case
    reasoning = {"kimi_k2": "kimi_k2", "gpt_oss": "gpt_oss", "pythonic": "think"}.get(name)
    template = ResponseTemplate.load(detect(ChatTemplate(None), {}, name, reasoning).spec)
    for pieces in ([text], list(text)):
        parser = ResponseParser(template)
        events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
        ids = [event.id for event in events if isinstance(event, CallBegin)]
        thinking, content, calls = told(events)
        own = [[*call, id] if id else call for call, id in zip(calls, ids, strict=True)]
        assert [thinking, content, own] == expected


def test_a_delimiter_waits_for_its_optional_end() -> None:
    field = {**JSON_CALLS, "close_pattern": r"</tool_call>(?:\s*</all>)?"}
    template = ResponseTemplate.load(spec(tool_calls={key: value for key, value in field.items() if key != "close"}, content={}))
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n</all>x'
    assert parsed(template, list(text)) == parsed(template, [text]) == ("", "x", [["f", "{}"]])
    parser = ResponseParser(template)
    parser.feed('<tool_call>{"name": "f", "arguments": {}}</tool_call>')
    assert parser.feed("\n<") == [] and parser.feed("b") == [Content("<b")]


@pytest.mark.parametrize("unit", ["<parameter=a>\n", "<parameter=a>\nx</parameter", "</parameter>", "<function=f>"])
def test_tags_without_an_end_cost_no_more_than_their_length(unit: str) -> None:
    template, begin = ResponseTemplate.load(detect(ChatTemplate(None), {}, "qwen3_coder").spec), time.process_time()
    parser = ResponseParser(template)
    parser.feed("<tool_call>\n<function=f>\n" + unit * (40_000 // len(unit)))
    parser.finish()
    assert time.process_time() - begin < 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "version 2"),
        ({"fields": {}}, "needs fields"),
        ({"fields": {"content": {}, "thinking": {}}}, "two fields without open"),
        ({"fields": {"content": {}, "mood": {"open": "x"}}}, "'mood'"),
        ({"fields": {"content": {"open": ""}}}, "none of them empty"),
        ({"fields": {"content": {"open_pattern": "("}}}, "no regular expression"),
        ({"fields": {"content": {"content": "json"}}}, "plain text"),
        ({"fields": {"content": {}, "tool_calls": {**JSON_CALLS, "transform": {"name": "a {content}"}}}}, "mixes"),
        ({"fields": {"content": {}, "tool_calls": {**JSON_CALLS, "content": "xml-inline"}}}, "tag_pattern"),
        ({"start_anchor": None}, "start_anchor"),
    ],
)
def test_wrong_templates_are_refused_by_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"response_template .*{says}"):
        ResponseTemplate.load({**SPECS["hermes"], **change})
