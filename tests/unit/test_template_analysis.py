"""How a model writes its answers, found out from its chat template: what is measured comes back through transformers' parser."""

import json
import time
from collections.abc import Mapping
from typing import Any

import pytest
from transformers.utils.chat_parsing import parse_response

from tests.unit import chat_templates as templates
from tpserve.errors import UserError
from tpserve.response_template import probe, trials
from tpserve.response_template.analysis import analyse
from tpserve.response_template.calls import CallForm
from tpserve.response_template.detect import Answers, detect
from tpserve.response_template.families import BY_NAME, FAMILIES, REASONING_PARSERS, TOOL_PARSERS, AnswerFamily
from tpserve.response_template.format import AnswerFormat, ReasoningFormat, TaggedArguments, ToolFormat, written
from tpserve.response_template.spec import spec_of
from tpserve.response_template.trials import ARGUMENTS, CALLS, SAID
from tpserve.text.chat import ChatTemplate

THINK = ReasoningFormat("<think>\n", "\n</think>\n\n")
HERMES = ToolFormat('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", between="\n")
TOOLS: list[Any] = [*trials.TOOLS]
USER = {"role": "user", "content": "Hello?"}


def template(source: str | None) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>"})


def json_list(begin: str, end: str = "]") -> ToolFormat:
    return ToolFormat('{"name": "', '", "arguments": ', "}", begin, ", ", end)


FORMATS: Mapping[str, AnswerFormat] = {
    "HERMES": AnswerFormat(tools=HERMES, tools_after_content="\n"),
    "QWEN3": AnswerFormat(THINK, tools=HERMES, tools_after_content="\n"),
    "STRIPS_REASONING": AnswerFormat(THINK, tools=HERMES, tools_after_content="\n"),
    "CLOSES_REASONING": AnswerFormat(ReasoningFormat("<think>", "</think>"), tools=HERMES, tools_after_content="\n"),
    "TAGGED": AnswerFormat(
        tools_after_content="\n",
        tools=ToolFormat(
            "<tool_call>\n<function=",
            ">",
            "\n</function>\n</tool_call>",
            between="\n",
            arguments="tagged",
            tags=TaggedArguments("\n<parameter=", ">\n", "\n</parameter>"),
        ),
    ),
    "GLM": AnswerFormat(
        ReasoningFormat("<think>", "</think>"),
        tools=ToolFormat(
            "<tool_call>",
            "",
            "</tool_call>",
            arguments="tagged",
            tags=TaggedArguments("<arg_key>", "</arg_key><arg_value>", "</arg_value>"),
        ),
    ),
    "DSML": AnswerFormat(
        tools=ToolFormat(
            '\n<invoke name="',
            '">',
            "\n</invoke>",
            "\n\n<calls>",
            "",
            "\n</calls>",
            "tagged",
            TaggedArguments('\n<argument name="', '" string="true">', "</argument>", "", '" string="false">'),
        )
    ),
    "LLAMA_JSON": AnswerFormat(tools_after_content=None, tools=ToolFormat('{"name": "', '", "parameters": ', "}", several=False)),
    "PYTHONIC": AnswerFormat(tools=ToolFormat("", "(", ")", "[", ", ", "]", "python")),
    "LFM2": AnswerFormat(tools=ToolFormat("", "(", ")", "<|tool_call_start|>[", ", ", "]<|tool_call_end|>", "python")),
    "MISTRAL": AnswerFormat(tools_after_content=None, tools=json_list("[TOOL_CALLS] [")),
    "MISTRAL_ARGS": AnswerFormat(tools=ToolFormat("[TOOL_CALLS]", "[ARGS]", "")),
    "FENCED": AnswerFormat(
        tools_after_content=None,
        tools=ToolFormat("<call>function<name>", "\n```json\n", "\n```</call>", "<calls>", "\n", "</calls>"),
    ),
    "KIMI": AnswerFormat(
        tools=ToolFormat("<|call|>functions.", ":{index}<|args|>", "<|done|>", "<|section|>", "", "<|section_end|>"),
    ),
    "LISTED": AnswerFormat(tools=json_list("functools[")),
    "MARKED_CONTENT": AnswerFormat(
        ReasoningFormat("<|think|>", "<|done|>"),
        "<|say|>",
        "<|/say|>",
        None,
        ToolFormat('\n{"call_id": "{index}", "tool": "', '", "parameters": ', "}", "<|action|>[", ",", "\n]<|/action|>"),
    ),
    "NO_TOOLS": AnswerFormat(tools_after_content=None),
    "REFUSES": AnswerFormat(tools_after_content=None),
}
WITH_TOOLS = [name for name, format in FORMATS.items() if format.tools is not None]


@pytest.mark.parametrize("name", FORMATS)
def test_format(name: str) -> None:
    assert analyse(template(getattr(templates, name))).format == FORMATS[name]


def function_calls(count: int) -> list[dict[str, Any]]:
    return [{"name": name, "arguments": dict(arguments)} for name, arguments in CALLS[:count]]


def read(found: Answers, prompt: str, text: str) -> dict[str, Any]:
    return parse_response(text, dict(found.spec), prefix=prompt, tools=TOOLS)


def without_end(text: str) -> str:
    for end in ("<|im_end|>\n", "</s>", "<|eot_id|>", "<|call|>", "<|return|>"):
        text = text.removesuffix(end)
    return text


@pytest.mark.parametrize("name", [*WITH_TOOLS, "HARMONY"])
def test_rendered_calls_come_back_through_transformers(name: str) -> None:
    chat = template(getattr(templates, name))
    found = detect(chat, {})
    assert not found.off.keys() & {"content", "call"}
    count = 2 if "calls" in found.source else 1
    rendered = chat.render([USER, found.messages.calls.message(CALLS[:count])], add_generation_prompt=False, tools=TOOLS)
    message = read(found, without_end(rendered), "")
    assert [call["function"] for call in message["tool_calls"]] == function_calls(count)
    assert "content" not in message


@pytest.mark.parametrize("name", [*WITH_TOOLS, "HARMONY"])
def test_written_answers_come_back_through_transformers(name: str) -> None:
    chat = template(getattr(templates, name))
    found = detect(chat, {})
    prompt, count = chat.render([USER], tools=TOOLS), 2 if "calls" in found.source else 1
    opened = prompt.endswith(("<think>", "<think>\n"))
    thought = "So, 1 < 2.\n\nYes." if found.format.reasoning else ""
    for content, calls in ((SAID, ()), ("", CALLS[:count]), (SAID, CALLS[:1])):
        if content and calls and found.format.tools_after_content is None:
            continue
        closed = prompt.endswith("</think>")
        text = written(found.format, "" if closed else thought, content, calls)
        text = text[len(found.format.reasoning.begin) :] if opened and found.format.reasoning else text
        message = read(found, prompt, text)
        assert message.get("content", "") == content
        assert [call["function"] for call in message.get("tool_calls", [])] == function_calls(len(calls))
        assert message.get("thinking", "") == ("" if closed else thought)


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_answers_after_the_result_of_a_tool(name: str) -> None:
    """The calls before the result are not part of the answer, whatever opens the turn then."""
    chat = template(getattr(templates, name))
    found = detect(chat, {})
    call = found.messages.calls.message(CALLS[:1])
    prompt = chat.render(
        [USER, call, {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": "It rains."}], tools=TOOLS
    )
    message = read(found, prompt, ("</think>" if name == "STRIPS_REASONING" else "") + written(found.format, "", "Good."))
    assert message == {"role": "assistant", "content": "Good."}


def test_reasoning_that_a_prompt_opens_or_closes() -> None:
    chat = template(templates.QWEN3)
    found = detect(chat, {})
    assert found.messages.switch == "enable_thinking" and found.messages.reasoning == "reasoning_content"
    off = chat.render([USER], variables={"enable_thinking": False})
    assert off.endswith("</think>\n\n")
    assert read(found, off, "Hello.") == {"role": "assistant", "content": "Hello."}
    strips = template(templates.STRIPS_REASONING)
    found = detect(strips, {})
    assert found.source["reasoning"] == "chat template"
    prompt = strips.render([USER])
    assert read(found, prompt, "Hm.\n</think>\n\nHello.") == {"role": "assistant", "thinking": "Hm.", "content": "Hello."}


@pytest.mark.parametrize("name", ["CLOSES_REASONING", "GLM"])
def test_a_prompt_that_only_closes_reasoning(name: str) -> None:
    chat = template(getattr(templates, name))
    found = detect(chat, {})
    opened, closed = (chat.render([USER], variables={"thinking": on}) for on in (True, False))
    assert closed.endswith("\n</think>") and opened.endswith("\n<think>")
    assert read(found, closed, "Hello.") == {"role": "assistant", "content": "Hello."}
    assert read(found, opened, "Hm.</think>Hello.") == {"role": "assistant", "thinking": "Hm.", "content": "Hello."}


def test_a_spec_forgives_white_space_and_the_order_of_keys() -> None:
    found = detect(template(templates.HERMES), {})
    text = 'Well. <tool_call>{ "arguments": {"text": "a</tool"},\n"name": "gpaxu_fow" }  </tool_call>\n\n\n<tool_call>'
    message = read(found, "", text + '{"name": "hbizo_qet", "arguments": {}}</tool_call>\n')
    assert message["content"] == "Well."
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["gpaxu_fow", "hbizo_qet"]
    tagged = detect(template(templates.TAGGED), {})
    text = "<tool_call><function=gpaxu_fow><parameter=count>7</parameter><parameter=text>\n  a\n\n</parameter></function>"
    message = read(tagged, "", text + "\n</tool_call>")
    assert message["tool_calls"][0]["function"]["arguments"] == {"count": 7, "text": "  a\n"}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("HERMES", CallForm()),
        ("MISTRAL", CallForm(call_id="short")),
        ("MISTRAL_ARGS", CallForm("json")),
        ("FENCED", CallForm(content="null")),
        ("KIMI", CallForm(call_id="function")),
    ],
)
def test_how_calls_are_handed_to_a_template(name: str, form: CallForm) -> None:
    assert analyse(template(getattr(templates, name))).messages.calls == form


def test_names_of_results_and_developers() -> None:
    plain = analyse(template(templates.HERMES)).messages
    assert not plain.tool_name and not plain.developer
    named = templates.HERMES.replace("{{ message.content }}", "{{ message.name or '' }}{{ message.content }}")
    assert analyse(template(named)).messages.tool_name
    assert analyse(template(templates.HERMES + "{# developer #}")).messages.developer


def test_order_of_sources() -> None:
    hermes = template(templates.HERMES)
    given = detect(hermes, {}).spec
    assert set(detect(hermes, {}).source.values()) == {"chat template"}
    config = {"response_template": given}
    assert set(detect(hermes, config).source.values()) == {"tokenizer_config.json"}
    assert detect(hermes, config).spec == given
    assert detect(hermes, config).format.tools == HERMES
    forced = detect(hermes, config, "mistral_list", "deepseek_r1")
    assert forced.source["call"] == "--tool-call-parser mistral_list"
    assert forced.source["reasoning"] == "--reasoning-parser deepseek_r1"
    assert "[TOOL_CALLS][" in forced.delimiters(calls=True)
    assert read(forced, "", "Hm.</think>Yes.") == {"role": "assistant", "thinking": "Hm.", "content": "Yes."}
    unseen = template(templates.TOOLS_UNSEEN_IN_HISTORY)
    tokens = {"added_tokens_decoder": {"7": {"content": "<|tool_call_start|>"}}}
    family = detect(unseen, tokens)
    assert family.source["call"] == family.source["calls"] == "family lfm2"
    assert family.format.tools == FORMATS["LFM2"].tools
    assert detect(unseen, {"extra_special_tokens": ["<|tool_call_start|>"]}).source == family.source


def test_the_own_response_template_of_a_model_is_tried_as_well() -> None:
    hermes = template(templates.HERMES)
    spec = json.loads(json.dumps(detect(hermes, {}).spec))
    renamed = {**spec, "fields": {"reasoning_content": {"open": "<think>", "close": "</think>"}, **spec["fields"]}}
    assert detect(hermes, {"response_template": renamed}).source["reasoning"] == "tokenizer_config.json"
    wrong = {**spec, "fields": {**spec["fields"], "tool_calls": {**spec["fields"]["tool_calls"], "open_pattern": "<calls>"}}}
    found = detect(hermes, {"response_template": wrong})
    assert "content comes back as '<tool_call>" in found.off["call"]
    assert "tool_calls" not in found.spec["fields"] and found.format.tools is None
    only_calls = {**wrong, "fields": {"tool_calls": wrong["fields"]["tool_calls"]}}
    assert detect(hermes, {"response_template": only_calls}).spec["fields"] == {"content": {"content": "text"}}
    broken = detect(hermes, {"response_template": {"field": {}}})
    assert "response_template has unknown keys: field" in broken.off["response_template"]
    assert broken.source == detect(hermes, {}).source


def test_names_of_parsers() -> None:
    """A name that other servers know is known; without a family of its own it leaves the choice to the template."""
    hermes = template(templates.HERMES)
    same = detect(hermes, {}, "qwen25", "qwen3")
    assert same.format.tools == HERMES and same.source["call"] == "--tool-call-parser qwen25"
    tagged = detect(template(templates.TAGGED), {}, "qwen3_xml")  # to the letter as the template has it
    assert tagged.format == FORMATS["TAGGED"] and tagged.source["calls"] == "--tool-call-parser qwen3_xml"
    assert detect(hermes, {}, "openai").format.tools_after_content is None
    assert detect(hermes, {}, "hunyuan_a13b").source["call"] == "chat template"
    with pytest.raises(UserError, match="--tool-call-parser hermess is unknown; known are .*hermes"):
        detect(hermes, {}, "hermess")
    with pytest.raises(UserError, match="--reasoning-parser r1 is unknown; known are .*deepseek_r1"):
        detect(hermes, {}, None, "r1")


OWN = ("apertus", "minimax_m3", "kimi_k3")
"""Of kinds of content that transformers does not know, and with an end of content before calls (test_family_calls.py)."""


@pytest.mark.parametrize(
    "family", [each for each in FAMILIES if each.tools is not None and each.name not in OWN], ids=lambda each: each.name
)
def test_families_write_what_transformers_reads(family: AnswerFamily) -> None:
    format = AnswerFormat(family.reasoning, *family.content, None, family.tools)
    spec = spec_of(format, ["<|assistant|>"])
    spec["fields"] |= family.fields
    count = 2 if family.tools is not None and family.tools.several else 1
    message = parse_response(written(format, "", "", CALLS[:count]), spec, prefix="<|assistant|>", tools=TOOLS)
    assert [call["function"] for call in message["tool_calls"]] == function_calls(count)
    message = parse_response(written(format, "Hm." if family.reasoning else "", SAID), spec, prefix="<|assistant|>")
    assert message["content"] == SAID and message.get("thinking", "Hm.") == "Hm."


SAMPLES: Mapping[str, str] = {
    "hermes": '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    '<tool_call>\n{"arguments": {}, "name": "g"}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>\n"
    "<tool_call>\n<function=g>\n</function>\n</tool_call>",
    "llama3_json": '<|python_tag|>{"name": "f", "parameters": {"a": 1}}',
    "pythonic": "[f(a=1), g()]",
    "lfm2": "<|tool_call_start|>[f(a=1), g()]<|tool_call_end|>",
    "mistral": '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}',
    "mistral_list": '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}, "id": "123456789"}]',
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
    '{"a": 1}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v31": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
    "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "glm": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>\n<tool_call>g</tool_call>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0 <|tool_call_argument_begin|> "
    '{"a": 1}<|tool_call_end|><|tool_call_begin|>functions.g:1<|tool_call_argument_begin|>{}<|tool_call_end|>'
    "<|tool_calls_section_end|>",
    "gpt_oss": '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'
    "<|start|>assistant to=functions.g<|channel|>commentary json<|message|>{}<|call|>",
    "granite": '<tool_call> [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
    "functools": 'functools[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
    "minimax_m2": '<minimax:tool_call>\n<invoke name="f">\n<parameter name="a">1</parameter>\n</invoke>\n'
    '<invoke name="g">\n</invoke>\n</minimax:tool_call>',
    "minicpm5": '<function name="f"><param name="a"><![CDATA[1]]></param></function>\n<function name="g"></function>',
    "gemma4": "<|tool_call>call:f{a:1}<tool_call|><|tool_call>call:g{}<tool_call|>",
}


@pytest.mark.parametrize("name", SAMPLES)
def test_what_models_of_a_family_write(name: str) -> None:
    format = AnswerFormat(tools=BY_NAME[name].tools)
    spec = spec_of(format, ["<|assistant|>"])
    spec["fields"] |= BY_NAME[name].fields
    tools: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}}]
    message = parse_response(SAMPLES[name], spec, prefix="", tools=tools)
    functions = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]
    assert [call["function"] for call in message["tool_calls"]] == functions[: 1 if name == "llama3_json" else 2]
    assert "content" not in message


def test_numbers_of_calls_are_written() -> None:
    assert "functions.hbizo_qet:1<|args|>" in written(FORMATS["KIMI"], calls=CALLS)


def test_tables_of_names() -> None:
    names = {family.name for family in FAMILIES} | {"template"}
    assert set(TOOL_PARSERS.values()) | set(REASONING_PARSERS.values()) <= names
    known = {
        "hermes",
        "llama3_json",
        "pythonic",
        "mistral",
        "deepseek_v3",
        "deepseek_v31",
        "glm45",
        "kimi_k2",
        "openai",
        "granite",
    }
    assert known | {"qwen25", "qwen3_coder", "gpt-oss", "glm47", "deepseekv31", "phi4_mini_json"} <= TOOL_PARSERS.keys()
    assert {
        "deepseek_r1",
        "qwen3",
        "granite",
        "mistral",
        "glm45",
        "kimi_k2",
        "openai_gptoss",
        "gpt-oss",
    } <= REASONING_PARSERS.keys()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "the model has no chat template"),
        (templates.NO_TOOLS, "the chat template does not show tools to the model"),
        (templates.TOOLS_UNSEEN_IN_HISTORY, "the chat template shows no tool calls, and no known family is recognised"),
        (templates.REFUSES, "the chat template does not show tools to the model"),
    ],
)
def test_features_that_are_off(source: str | None, reason: str) -> None:
    found = detect(template(source), {"eos_token": {"content": "</s>"}, "added_tokens_decoder": {"1": {}, "2": None}})
    assert found.off["call"] == found.off["calls"] == reason
    assert found.spec["fields"] == {"content": {"content": "text"}}
    assert found.format.tools is None and found.format.reasoning is None


def test_calls_that_a_template_garbles_are_off() -> None:
    """Names come back, arguments do not: the spec would make calls that the model did not mean."""
    garbled = templates.HERMES.replace("call.function.arguments | tojson", "call.function.arguments | tojson | upper")
    assert "call" in detect(template(garbled), {}).off
    cut = templates.TAGGED.replace("value | tojson", "'?'")
    assert "count': '?'" in detect(template(cut), {}).off["call"]


def test_values_that_a_template_renders_otherwise_than_models_write_them() -> None:
    """Nested ones, that is: what else it renders comes back, and so does what its format writes."""
    found = detect(template(templates.TAGGED.replace("value | tojson", "value | string")), {})
    assert found.source["calls"] == "chat template" and found.format == FORMATS["TAGGED"]


def test_objects_that_nothing_separates_are_one_call() -> None:
    several = templates.LISTED.replace("functools[", "").replace("]{%- endif", "{%- endif").replace("%}, {%", "%}{%")
    found = detect(template(several), {})
    assert found.off["calls"] == "chat template has one call in an answer" and found.source["call"] == "chat template"


@pytest.mark.parametrize(("limit", "value"), [("MAX_CHARS", 20), ("MAX_RENDERINGS", 0)])
def test_a_template_that_does_too_much_is_refused(monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    monkeypatch.setattr(probe, limit, value)
    assert analyse(template(templates.HERMES)).format == FORMATS["REFUSES"]


def test_it_takes_no_time() -> None:
    begun = time.process_time()
    detect(template(templates.GLM), {})
    assert time.process_time() - begun < 2  # about 50 ms on an idle core


def test_arguments_of_trials_are_hard() -> None:
    text = json.dumps(ARGUMENTS, ensure_ascii=False)
    assert all(part in text for part in ('\\"', "\\n", "日本", "🙂", "[1, {", "true", "-7", "{}"))
