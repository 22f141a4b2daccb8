"""Finds out how a model writes its answers, and accepts each feature by its own round trip.

In this order: a parser that is named, `response_template` of tokenizer_config.json, the analysis of the chat template, a family
that the chat template or the special tokens point to. A feature that does not come back as it was is off, with the reason.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct, structs

from tpserve.errors import UserError
from tpserve.response_template.analysis import Analysis, MessageForm, analyse
from tpserve.response_template.families import REASONING_PARSERS, TOOL_PARSERS, AnswerFamily, as_marked, forced, marked
from tpserve.response_template.format import AnswerFormat, ReasoningFormat, ToolFormat
from tpserve.response_template.spec import spec_of
from tpserve.response_template.template import ROLES, ResponseTemplate
from tpserve.response_template.trials import Trials
from tpserve.text.chat import ChatTemplate

CONFIG = "tokenizer_config.json"
ANALYSIS = "chat template"


class Answers(Struct, frozen=True):
    """How a model's answers are read and written.

    `spec`: the `response_template`. `format`: for grammars; None in it for what is off or cannot be written to the letter.
    `source`: where each feature that is on comes from: content, reasoning, call (one in an answer), calls (several). `off`: why
    each of the others is off.
    """

    spec: Mapping[str, Any]
    format: AnswerFormat
    messages: MessageForm
    source: Mapping[str, str]
    off: Mapping[str, str]

    def delimiters(self, *, calls: bool) -> str:
        """The texts around fields and in patterns, as they are written: special tokens of answers may be looked for in it.

        `calls`: also those of calls.
        """
        fields = {name: field for name, field in self.spec["fields"].items() if calls or ROLES[name] != "tool_calls"}
        format = self.format if calls else structs.replace(self.format, tools=None, tools_after_content="")
        texts = json.dumps([fields, structs.asdict(format)], ensure_ascii=False, default=structs.asdict)
        return re.sub(r"\\+([^\w\s])", r"\1", texts)


class Choice(Struct, frozen=True):
    """One way in which a model may write a feature. `field`: of the spec, where the format says too little.

    `always_reasons` and `after_content`: as in `AnswerFamily`. `is_forced`: the template may show another way.
    """

    source: str
    reasoning: ReasoningFormat | None = None
    tools: ToolFormat | None = None
    field: Mapping[str, Any] | None = None
    always_reasons: bool = False
    is_forced: bool = False
    after_content: str | None = ""


def detect(
    template: ChatTemplate, config: Mapping[str, Any], tool_call_parser: str | None = None, reasoning_parser: str | None = None
) -> Answers:
    """Choose and try. `config`: tokenizer_config.json; a broken `response_template` in it is one of what is off. UserError for an
    unknown parser."""
    tools = forced("--tool-call-parser", tool_call_parser, TOOL_PARSERS)
    reasoning = forced("--reasoning-parser", reasoning_parser, REASONING_PARSERS)
    detection = Detection(template, config, tools, reasoning)
    detection.find_reasoning(f"--reasoning-parser {reasoning_parser}" if reasoning else "")
    detection.find_content()
    detection.find_calls(f"--tool-call-parser {tool_call_parser}" if tools else "")
    return detection.answers()


class Detection:
    """What is known of a model so far."""

    def __init__(
        self, template: ChatTemplate, config: Mapping[str, Any], tools: AnswerFamily | None, reasoning: AnswerFamily | None
    ) -> None:
        self._given, broken = usable(config.get("response_template"))
        ends = ends_of(config)
        text = (template.source or "") + "".join(special_tokens(config))
        self._analysis: Analysis = analyse(template, ends)
        self._trials = Trials(template, self._analysis, ends)
        self._tools = as_marked(tools, text) if tools is not None else None
        self._reasoning, self._marked = reasoning, marked(text)
        self._has_template, self._text = template.source is not None, text
        found = self._analysis.format
        self._format = AnswerFormat(content_begin=found.content_begin, content_end=found.content_end)
        self._fields: dict[str, Mapping[str, Any]] = {}
        self._always_reasons = False
        self._source: dict[str, str] = {}
        self._off: dict[str, str] = {"response_template": broken} if broken else {}
        self._content_source = CONFIG if self._given is not None else ANALYSIS if self._has_template else "plain text"
        leading = next((each for each in (tools, reasoning, *self._marked) if each is not None and any(each.content)), None)
        if leading is not None and self._given is None:
            begin, end = leading.content
            self._format = structs.replace(self._format, content_begin=begin, content_end=end, ends_content=leading.ends_content)
            self._fields["content"] = leading.fields["content"]
            self._content_source = f"family {leading.name}"

    def find_reasoning(self, flag: str) -> None:
        """Choose how reasoning is written."""
        found = self._analysis.format.reasoning
        choices = self._choices("thinking", flag, self._reasoning, Choice(ANALYSIS, reasoning=found) if found else None)
        reasons: list[str] = []
        for choice in choices:
            format = structs.replace(self._format, reasoning=choice.reasoning)
            fields = self._fields | ({"thinking": choice.field} if choice.field is not None else {})
            field = "" if choice.is_forced else self._analysis.messages.reasoning
            self._trials.assumed = choice.reasoning if choice.always_reasons else None
            failure = self._trials.reasoning(self._spec(format, fields, choice.always_reasons), format, field)
            if not failure:
                self._format, self._fields, self._always_reasons = format, fields, choice.always_reasons
                self._source["reasoning"] = choice.source
                return
            reasons.append(f"by {choice.source}, {failure}")
        self._trials.assumed = None
        self._off["reasoning"] = reasons[0] if reasons else self._nothing("reasoning")

    def find_content(self) -> None:
        """Try the content; without its own delimiters when it does not come back with them."""
        failure = self._trials.content(self._spec(self._format, self._fields), self._format)
        if failure and (self._format.content_begin or self._format.content_end):
            self._fields.pop("content", None)
            self._content_source = ANALYSIS
            self._format = structs.replace(self._format, content_begin="", content_end="", ends_content=False)
            failure = self._trials.content(self._spec(self._format, self._fields), self._format)
        if failure:
            self._off["content"] = failure
        else:
            self._source["content"] = self._content_source

    def find_calls(self, flag: str) -> None:
        """Choose how calls are written, and whether there may be several."""
        found = self._analysis.format
        analysed = Choice(ANALYSIS, tools=found.tools, after_content=found.tools_after_content) if found.tools else None
        reasons: list[str] = []
        for choice in self._choices("tool_calls", flag, self._tools, analysed):
            format = structs.replace(self._format, tools=choice.tools, tools_after_content=choice.after_content)
            fields = self._fields | ({"tool_calls": choice.field} if choice.field is not None else {})
            spec, rendered = self._spec(format, fields), not choice.is_forced or choice.tools is None
            if choice.source != CONFIG and choice.tools is None and not self._trials.renders_calls:
                reasons.append(f"{choice.source} has no format, and the chat template shows no call to try")
                continue
            if unwritten := self._trials.writes(spec, format):  # perhaps because nothing marks a call after content
                format = structs.replace(format, tools_after_content=None)
                unwritten = self._trials.writes(spec, format)
            if failure := self._trials.calls(spec, format, 1, rendered=rendered):
                reasons.append(f"by {choice.source}, {failure}")
                continue
            if unwritten and (choice.is_forced or not self._trials.renders_calls) and choice.tools is not None:
                reasons.append(f"by {choice.source}, {unwritten}")
                continue
            self._fields, self._source["call"] = fields, choice.source
            if unwritten:  # it is read, not written
                self._fields, format = fields | {"tool_calls": spec["fields"]["tool_calls"]}, structs.replace(format, tools=None)
            self._format = format
            self._find_several(choice, spec, rendered)
            return
        self._off["call"] = self._off["calls"] = reasons[0] if reasons else self._nothing("tool calls")

    def _find_several(self, choice: Choice, spec: Mapping[str, Any], rendered: bool) -> None:
        if choice.tools is not None and not choice.tools.several:
            self._off["calls"] = f"{choice.source} has one call in an answer"
        elif failure := self._trials.calls(spec, self._format, 2, rendered=rendered):
            self._off["calls"] = failure
            if self._format.tools is not None:
                self._format = structs.replace(self._format, tools=structs.replace(self._format.tools, several=False))
        else:
            self._source["calls"] = choice.source

    def answers(self) -> Answers:
        """What was found."""
        spec = self._spec(self._format, self._fields)
        on = {"content"} | {"reasoning"} & self._source.keys() | ({"tool_calls"} if "call" in self._source else set())
        fields = {name: field for name, field in spec["fields"].items() if ROLES[name] in on} or {"content": {"content": "text"}}
        return Answers({**spec, "fields": fields}, self._format, self._analysis.messages, self._source, self._off)

    def _choices(self, name: str, flag: str, family: AnswerFamily | None, analysed: Choice | None) -> list[Choice]:
        """The ways to try, in order. `name`: of the field."""
        if family is not None:
            return [choice_of(family, name, flag, analysed, is_forced=True)]
        if self._given is not None:
            has = any(ROLES[each] == ROLES[name] for each in self._given["fields"])
            return [structs.replace(analysed or Choice(CONFIG), source=CONFIG)] if has else []
        families = [each for each in self._marked if self._may_be(each, name)]
        choices = [choice_of(each, name, f"family {each.name}", None) for each in families]
        first = [choice for each, choice in zip(families, choices, strict=True) if each.leads]
        rest = [choice for each, choice in zip(families, choices, strict=True) if not each.leads]
        return [*first, *([analysed] if analysed is not None else []), *rest]

    def _may_be(self, family: AnswerFamily, name: str) -> bool:
        """Whether a family that is marked has the feature, and the template points to it."""
        if name == "thinking":
            return family.reasoning is not None and family.reasoning.begin.strip() in self._text
        has = family.tools is not None or name in family.fields
        return has and (self._trials.shows_tools or self._trials.renders_calls)

    def _nothing(self, what: str) -> str:
        if self._given is not None:
            return f"{CONFIG}'s response_template has no field for it"
        if not self._has_template:
            return "the model has no chat template"
        if what == "tool calls" and not self._trials.shows_tools:
            return "the chat template does not show tools to the model"
        return f"the chat template shows no {what}, and no known family is recognised"

    def _spec(self, format: AnswerFormat, fields: Mapping[str, Any], always_reasons: bool | None = None) -> dict[str, Any]:
        """The `response_template` of a format, with fields that are said otherwise."""
        always = self._always_reasons if always_reasons is None else always_reasons
        made = spec_of(format, self._analysis.anchors, always_reasons=always)
        if self._given is None:
            return {**made, "fields": {**made["fields"], **fields}}
        own = dict(self._given["fields"])
        for name in (*(["thinking"] if self._reasoning else []), *(["tool_calls"] if self._tools else [])):
            field = fields.get(name, made["fields"].get(name))
            own = {each: value for each, value in own.items() if ROLES[each] != ROLES[name]}
            own |= {name: field} if field is not None else {}
        return {**self._given, "fields": own}


def usable(spec: Any) -> tuple[Mapping[str, Any] | None, str]:
    """A `response_template` of a file, and what is wrong with it; then it is None."""
    if spec is None:
        return None, ""
    try:
        ResponseTemplate.load(spec)
    except UserError as error:
        return None, f"{CONFIG}: {error}"
    return dict(spec), ""


def choice_of(family: AnswerFamily, name: str, source: str, analysed: Choice | None, *, is_forced: bool = False) -> Choice:
    """A family's way; the template's own where it differs in white space only."""
    field = family.fields.get(name)
    if name == "thinking":
        found = analysed.reasoning if analysed is not None else None
        reasoning = found if found is not None and alike(found, family.reasoning) else family.reasoning
        return Choice(source, reasoning, None, field, family.always_reasons, is_forced)
    if analysed is not None and analysed.tools is not None and alike(analysed.tools, family.tools):
        return structs.replace(analysed, source=source, field=field)
    return Choice(source, None, family.tools, field, is_forced=is_forced, after_content=family.after_content)


def alike(one: Struct, other: Struct | None) -> bool:
    """Whether two formats differ in white space and `several` only."""
    return other is not None and flat(one) == flat(other)


def flat(format: Struct) -> str:
    """All texts of a format without white space."""
    values = [value for name, value in structs.asdict(format).items() if name != "several"]
    return "".join("".join((flat(value) if isinstance(value, Struct) else str(value)).split()) for value in values)


def ends_of(config: Mapping[str, Any]) -> Sequence[str]:
    """The token that ends an answer."""
    token = config.get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    return (text,) if isinstance(text, str) and text else ()


def special_tokens(config: Mapping[str, Any]) -> list[str]:
    """The texts of the tokens that tokenizer_config.json lists, in its older form or in a newer one."""
    entries: list[Any] = []
    for key in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        tokens = config.get(key)
        entries += tokens.values() if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else ()
    texts = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
    return [text for text in texts if isinstance(text, str)]
