"""Families of models by how they write answers, for templates that do not show it, and the parser names of other servers.

Formats are facts of the models: their cards and chat templates. Names of parsers: vLLM 0.33, SGLang 0.5.23.
"""

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from tpserve.errors import UserError
from tpserve.response_template.family_fields import (
    FUNCTIONGEMMA_CALL,
    GEMMA_CALL,
    GEMMA_VALUES,
    GRANITE_CALLS,
    GRANITE_THINKING,
    HARMONY_FIELDS,
    KIMI_K2_CALL,
    KIMI_K3_CALL,
    KIMI_K3_CONTENT,
    KIMI_K3_TAGS,
    LLAMA_CALL,
    M3,
    M3_TAGS,
    MINICPM_CALL,
    MINIMAX_M3_CALL,
    MISTRAL_CALL,
    MUSE_CALL,
    MUSE_CONTENT,
    PYTHONIC_CALLS,
)
from tpserve.response_template.format import INDEX, NAME, ReasoningFormat, TaggedArguments, ToolFormat

XML_TAGS = TaggedArguments("<parameter=", ">\n", "\n</parameter>\n")
TEMPLATE = "template"
"""In the tables of names: what the model's own chat template shows."""


class AnswerFamily(Struct, frozen=True):
    """How a family writes. `fields`: of its `response_template`, where its format says too little.

    `after_content`: the text between content and calls; None when an answer has one or the other. `ends_content`: as in
    `AnswerFormat`.

    `markers`: texts that the chat template or the special tokens of its models have, all of them; none: found by name only.
    `always_reasons`: an answer begins with reasoning, whether or not something opens it. `leads`: goes before the analysis, since
    these models write otherwise than their template does.
    """

    name: str
    markers: tuple[str, ...] = ()
    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None
    content: tuple[str, str] = ("", "")
    fields: Mapping[str, Mapping[str, Any]] = {}
    always_reasons: bool = False
    leads: bool = False
    after_content: str | None = "\n"
    ends_content: bool = False


def json_calls(begin: str, end: str, arguments: str = "arguments", between: str = "\n") -> ToolFormat:
    """Calls that are JSON objects, each between `begin` and `end`."""
    return ToolFormat(f'{begin}{{"name": "', f'", "{arguments}": ', f"}}{end}", between=between)


def json_list(begin: str, end: str = "") -> ToolFormat:
    """Calls that are JSON objects in one list."""
    return ToolFormat('{"name": "', '", "arguments": ', "}", f"{begin}[", ", ", f"]{end}")


def xml_calls(begin: str, end: str) -> ToolFormat:
    """Calls with tags as Qwen3-Coder has them."""
    return ToolFormat(f"{begin}\n<function=", ">\n", f"</function>\n{end}", between="\n", arguments="tagged", tags=XML_TAGS)


def dsml(calls: str) -> ToolFormat:
    """Calls as DeepSeek's markup language has them since V3.2."""
    tags = TaggedArguments('\n<｜DSML｜parameter name="', '" string="true">', "</｜DSML｜parameter>", "", '" string="false">')
    begin, end = f"\n\n<｜DSML｜{calls}>", f"\n</｜DSML｜{calls}>"
    return ToolFormat('\n<｜DSML｜invoke name="', '">', "\n</｜DSML｜invoke>", begin, "", end, "tagged", tags)


THINK = ReasoningFormat("<think>\n", "\n</think>\n\n")
GLM_TAGS = TaggedArguments("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n")
MINIMAX_TAGS = TaggedArguments('<parameter name="', '">', "</parameter>\n")

FAMILIES = (
    AnswerFamily(
        "gpt_oss",
        ("<|channel|>", "<|message|>", "<|start|>assistant"),
        ToolFormat("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", "", several=False),
        ReasoningFormat("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
        ("<|channel|>final<|message|>", ""),
        HARMONY_FIELDS,
        leads=True,
        after_content=None,
    ),
    AnswerFamily(
        "gemma4",
        ("<|tool_call>", "<|channel>"),
        ToolFormat("<|tool_call>call:", "{", "}<tool_call|>", arguments="tagged", tags=GEMMA_VALUES),
        ReasoningFormat("<|channel>thought\n", "\n<channel|>"),
        fields={"tool_calls": GEMMA_CALL},
        after_content="",
    ),
    AnswerFamily(
        "functiongemma",
        ("<start_function_call>", "<escape>"),
        ToolFormat(
            "<start_function_call>call:",
            "{",
            "}<end_function_call>",
            arguments="tagged",
            tags=TaggedArguments("", ":<escape>", "<escape>", ","),
        ),
        fields={"tool_calls": FUNCTIONGEMMA_CALL},
        after_content="",
    ),
    AnswerFamily(
        "apertus",
        ("<|inner_prefix|>", "<|tools_prefix|>"),
        ToolFormat('{"', '": ', "}", "<|tools_prefix|>[", ", ", "]<|tools_suffix|>"),
        ReasoningFormat("<|inner_prefix|>", "<|inner_suffix|>"),
        after_content="",
    ),
    AnswerFamily(
        "apriel",
        ("[BEGIN FINAL RESPONSE]",),
        None,
        ReasoningFormat("Here are my reasoning steps:\n", "\n[BEGIN FINAL RESPONSE]\n"),
        leads=True,
    ),
    AnswerFamily(
        "kimi_k3",
        ("<|open|>", "<|sep|>", "<|close|>"),
        ToolFormat(
            '<|open|>call tool="',
            f'" index="{INDEX}"<|sep|>',
            "<|close|>call<|sep|>",
            "<|open|>tools<|sep|>",
            "",
            "<|close|>tools<|sep|>",
            "tagged",
            KIMI_K3_TAGS,
        ),
        ReasoningFormat("<|open|>think<|sep|>", "<|close|>think<|sep|><|open|>response<|sep|>"),
        ("", "<|close|>response<|sep|>"),
        {"content": KIMI_K3_CONTENT, "tool_calls": KIMI_K3_CALL},
        after_content="",
        ends_content=True,
    ),
    AnswerFamily(
        "muse_glimmer",
        ("<atem:function_calls>",),
        ToolFormat(
            " to=",
            f'<|message|><atem:function_calls>\n<atem:invoke name="{NAME}">\n',
            "</atem:invoke>\n</atem:function_calls>",
            between="<|eom|><|start|>assistant",
            arguments="tagged",
            tags=TaggedArguments('<atem:parameter name="', '">', "</atem:parameter>\n"),
        ),
        reasoning=ReasoningFormat(" to=self<|message|>", "<|eom|><|start|>assistant"),
        content=(" to=user<|message|>", ""),
        fields={"content": MUSE_CONTENT, "tool_calls": MUSE_CALL},
        after_content="<|eom|><|start|>assistant",
    ),
    AnswerFamily("deepseek_v32", ("｜DSML｜", "function_calls"), dsml("function_calls"), ReasoningFormat("<think>", "</think>")),
    AnswerFamily("deepseek_v4", ("｜DSML｜", "tool_calls"), dsml("tool_calls"), ReasoningFormat("<think>", "</think>")),
    AnswerFamily(
        "deepseek_v3",
        ("<｜tool▁calls▁begin｜>", "```json"),
        ToolFormat(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
            "\n```json\n",
            "\n```<｜tool▁call▁end｜>",
            "<｜tool▁calls▁begin｜>",
            "\n",
            "<｜tool▁calls▁end｜>",
        ),
        THINK,
    ),
    AnswerFamily(
        "deepseek_v31",
        ("<｜tool▁calls▁begin｜>",),
        ToolFormat(
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁begin｜>",
            "",
            "<｜tool▁calls▁end｜>",
        ),
        ReasoningFormat("<think>", "</think>"),
    ),
    AnswerFamily(
        "kimi_k2",
        ("<|tool_calls_section_begin|>",),
        ToolFormat(
            "<|tool_call_begin|>functions.",
            f":{INDEX}<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
            "<|tool_calls_section_begin|>",
            "",
            "<|tool_calls_section_end|>",
        ),
        ReasoningFormat("<think>", "</think>"),
        fields={"tool_calls": KIMI_K2_CALL},
    ),
    AnswerFamily(
        "glm",
        ("<arg_key>",),
        ToolFormat("<tool_call>", "\n", "</tool_call>", between="\n", arguments="tagged", tags=GLM_TAGS),
        ReasoningFormat("<think>", "</think>\n"),
    ),
    AnswerFamily(
        "minimax_m2",
        ("<minimax:tool_call>",),
        ToolFormat(
            '<invoke name="', '">\n', "</invoke>", "<minimax:tool_call>\n", "\n", "\n</minimax:tool_call>", "tagged", MINIMAX_TAGS
        ),
        THINK,
    ),
    AnswerFamily(
        "minimax_m3",
        (M3,),
        ToolFormat(
            f'{M3}<invoke name="',
            '">',
            f"{M3}</invoke>\n",
            f"{M3}<tool_call>\n",
            "",
            f"{M3}</tool_call>",
            "tagged",
            M3_TAGS,
        ),
        ReasoningFormat("<mm:think>", "</mm:think>"),
        fields={"tool_calls": MINIMAX_M3_CALL},
        after_content="",
    ),
    AnswerFamily("granite-20b-fc", ("<function_call>",), json_calls("<function_call> ", "", between="")),
    AnswerFamily(
        "minicpm5",
        ('<function name="', "<![CDATA["),
        ToolFormat(
            '<function name="',
            '">',
            "</function>",
            between="\n",
            arguments="tagged",
            tags=TaggedArguments('<param name="', '">', "</param>"),
        ),
        THINK,
        fields={"tool_calls": MINICPM_CALL},
        leads=True,
    ),
    AnswerFamily(
        "seed_oss",
        ("<seed:tool_call>",),
        xml_calls("<seed:tool_call>", "</seed:tool_call>"),
        THINK,
    ),
    AnswerFamily("qwen3_coder", ("<tool_call>", "<function=", "<parameter="), xml_calls("<tool_call>", "</tool_call>"), THINK),
    AnswerFamily(
        "mistral",
        ("[TOOL_CALLS]", "[ARGS]"),
        ToolFormat("[TOOL_CALLS]", "[ARGS]", ""),
        ReasoningFormat("[THINK]", "[/THINK]"),
        fields={"tool_calls": MISTRAL_CALL},
    ),
    AnswerFamily(
        "mistral_list",
        ("[TOOL_CALLS]",),
        json_list("[TOOL_CALLS]"),
        ReasoningFormat("[THINK]", "[/THINK]"),
    ),
    AnswerFamily(
        "lfm2",
        ("<|tool_call_start|>",),
        ToolFormat("", "(", ")", "<|tool_call_start|>[", ", ", "]<|tool_call_end|>", "python"),
        ReasoningFormat("<think>", "</think>"),
    ),
    AnswerFamily("phi4_mini", ("<|tool|>", "<|/tool|>"), json_list("<|tool_call|>", "<|/tool_call|>")),
    AnswerFamily("functools", ("functools[",), json_list("functools")),
    AnswerFamily(
        "granite",
        ("<|tool_call|>",),
        json_list("<|tool_call|>"),
        ReasoningFormat("Here is my thought process:\n", "\nHere is my response:\n"),
        fields={"thinking": GRANITE_THINKING, "tool_calls": GRANITE_CALLS},
    ),
    AnswerFamily("internlm", ("<|plugin|>",), json_calls("<|action_start|><|plugin|>\n", "<|action_end|>", "parameters")),
    AnswerFamily("longcat", ("<longcat_tool_call>",), json_calls("<longcat_tool_call>\n", "\n</longcat_tool_call>")),
    AnswerFamily("jamba", ("<tool_calls>",), json_list("<tool_calls>", "</tool_calls>")),
    AnswerFamily("hermes", ("<tool_call>",), json_calls("<tool_call>\n", "\n</tool_call>"), THINK),
    AnswerFamily(
        "llama3_json",
        ("<|python_tag|>", "<|start_header_id|>"),
        ToolFormat('{"name": "', '", "parameters": ', "}", several=False),
        fields={"tool_calls": LLAMA_CALL},
        after_content=None,
    ),
    AnswerFamily("xlam", (), json_list(""), after_content=None),
    AnswerFamily(
        "pythonic",
        (),
        ToolFormat("", "(", ")", "[", ", ", "]", "python"),
        fields={"tool_calls": PYTHONIC_CALLS},
        after_content=None,
    ),
    AnswerFamily("cohere", ("<|START_THINKING|>",), None, ReasoningFormat("<|START_THINKING|>", "<|END_THINKING|>")),
    AnswerFamily("think", ("<think>",), None, THINK),
    AnswerFamily("deepseek_r1", (), None, THINK, always_reasons=True),
)
BY_NAME: Mapping[str, AnswerFamily] = {family.name: family for family in FAMILIES}

TOOL_PARSERS: Mapping[str, str] = {
    **{name: name for name in BY_NAME if BY_NAME[name].tools is not None or "tool_calls" in BY_NAME[name].fields},
    **dict.fromkeys(("qwen", "qwen25", "qwen3_json", "granite4", "interns1", "mimo", "trinity", "ernie45"), "hermes"),
    **dict.fromkeys(("qwen3_xml", "step3p5", "nemotron_v3", "nano_v3"), "qwen3_coder"),
    **dict.fromkeys(("llama3", "llama4_json"), "llama3_json"),
    "llama4_pythonic": "pythonic",
    "deepseekv3": "deepseek_v3",
    "deepseekv31": "deepseek_v31",
    "deepseekv32": "deepseek_v32",
    **dict.fromkeys(("deepseekv4", "deepseek-v4"), "deepseek_v4"),
    **dict.fromkeys(("glm45", "glm47", "poolside_v1", "ling3"), "glm"),
    **dict.fromkeys(("openai", "gpt-oss"), "gpt_oss"),
    "phi4_mini_json": "functools",
    "minimax-m2": "minimax_m2",
    **dict.fromkeys(("auto", "hf", "gigachat3", "cohere_command3", "cohere_command4", "hunyuan_a13b"), TEMPLATE),
    **dict.fromkeys(("hy_v3", "plamo3", "template"), TEMPLATE),
}
"""Names of --tool-call-parser -> the family, or TEMPLATE."""

REASONING_PARSERS: Mapping[str, str] = {
    **{name: name for name in BY_NAME if BY_NAME[name].reasoning is not None},
    **dict.fromkeys(("deepseek-r1", "qwen3-thinking", "minimax", "minimax_m2_append_think", "step3"), "deepseek_r1"),
    **dict.fromkeys(("qwen3", "nemotron_v3", "nano_v3", "minicpmv", "step3p5", "interns1", "mimo", "olmo3"), "think"),
    **dict.fromkeys(("holo2", "hunyuan_a13b", "ernie45", "minimax-append-think"), "think"),
    **dict.fromkeys(("deepseek-v3", "poolside_v1", "ling3"), "deepseek_v31"),
    "deepseek-v4": "deepseek_v4",
    **dict.fromkeys(("glm45", "glm47"), "glm"),
    "kimi": "kimi_k2",
    **dict.fromkeys(("openai_gptoss", "gpt-oss"), "gpt_oss"),
    **dict.fromkeys(("cohere_command3", "cohere_command4"), "cohere"),
    "minimax-m2": "minimax_m2",
    **dict.fromkeys(("auto", "hf", "granite_thinking_parser", "hy_v3", "plamo3", "template"), TEMPLATE),
}
"""Names of --reasoning-parser -> the family, or TEMPLATE."""


def forced(flag: str, name: str | None, known: Mapping[str, str]) -> AnswerFamily | None:
    """The family that a flag names; None when it leaves the choice to the template. UserError lists the known names."""
    if name is None:
        return None
    if name not in known:
        raise UserError(f"{flag} {name} is unknown; known are {', '.join(sorted(known))}", param=flag.removeprefix("--"))
    return BY_NAME.get(known[name])


def as_marked(family: AnswerFamily, text: str) -> AnswerFamily:
    """Mistral's newer form under its name, or the older one where only that is marked in a text."""
    older = BY_NAME["mistral_list"]
    return older if family.name == "mistral" and family not in marked(text) and older in marked(text) else family


def marked(text: str) -> list[AnswerFamily]:
    """The families whose markers are all in a text: a chat template with the special tokens."""
    return [family for family in FAMILIES if family.markers and all(marker in text for marker in family.markers)]
