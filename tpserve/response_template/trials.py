"""Tries whether an answer comes back: what a template renders, or a format writes, is parsed and compared."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from tpserve.response_template.analysis import ENDS, Analysis, result, without_reasoning
from tpserve.response_template.call_reader import CallArguments, CallBegin
from tpserve.response_template.format import AnswerFormat, Call, ReasoningFormat, written
from tpserve.response_template.parser import ResponseParser
from tpserve.response_template.probe import NAMES, USER, Probe, after, user
from tpserve.response_template.regions import Content, Reasoning
from tpserve.response_template.template import ResponseTemplate
from tpserve.text.chat import ChatTemplate

THOUGHT = "Rjyfqel, if 1 < 2.\n\n- Or {not}?"
SAID = "Cwaxhuv é 日本 🙂.\n\nAnd so on."
ARGUMENTS: Mapping[str, Any] = {
    "text": 'say "no"\nor don\'t \\ é 日本 🙂 {x}, <b>',
    "count": -7,
    "ratio": 2.5,
    "yes": True,
    "nested": {"list": [1, {"key": "välue", "flag": False}], "empty": {}},
}
CALLS: tuple[Call, ...] = ((NAMES[0], ARGUMENTS), (NAMES[1], {"text": "Paris"}))
SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "description": "Yutbim"},
        "count": {"type": "integer", "description": "Yutbim"},
        "ratio": {"type": "number", "description": "Yutbim"},
        "yes": {"type": "boolean", "description": "Yutbim"},
        "nested": {"type": "object", "description": "Yutbim", "additionalProperties": True},
    },
}
PLAIN_CALLS: tuple[Call, ...] = ((NAMES[0], {"text": "Oslo", "count": -7}), CALLS[1])
BARE_CALLS: tuple[Call, ...] = tuple((name, {}) for name in NAMES)
"""These two are for templates that render values otherwise than models write them: nested ones, or as Python all."""
TOOLS = [{"type": "function", "function": {"name": name, "description": "Zenqub", "parameters": SCHEMA}} for name in NAMES]


class Answer(Struct):
    """A parsed answer, or one that is expected. White space around texts does not count."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = []

    def difference(self, other: "Answer") -> str:
        """What `other` has instead; empty when they are alike."""
        pairs = (("reasoning", self.reasoning, other.reasoning), ("content", self.content, other.content))
        for name, one, two in pairs:
            if one.strip() != two.strip():
                return f"{name} comes back as {short(two)}"
        if len(self.calls) != len(other.calls):
            return f"{len(self.calls)} calls come back as {len(other.calls)}"
        wrong = [two for one, two in zip(self.calls, other.calls, strict=True) if one != two]
        return f"a call comes back as {short(wrong[0])}" if wrong else ""


def short(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 120 else text[:119] + "…"


class Trials:
    """The trials of a chat template. `ends`: tokens that end an answer.

    Attribute `assumed`: reasoning that every answer begins with, whether or not something opens it.
    """

    def __init__(self, template: ChatTemplate, analysis: Analysis, ends: Sequence[str]) -> None:
        self._probe, self._analysis, self._ends = Probe(template), analysis, ends
        self.assumed: ReasoningFormat | None = None
        self.shows_tools = self._prompt() != self._probe.render([user()], prompt=True, tools=())
        self.renders_calls = self._rendered(self._analysis.messages.calls.message(CALLS[:1]), NAMES[0]) is not None

    def content(self, spec: Mapping[str, Any], format: AnswerFormat) -> str:
        """Why content does not come back; empty when it does."""
        template = ResponseTemplate.load(spec)
        rendered = self._rendered({"role": "assistant", "content": SAID}, SAID.split()[0])
        answer = parsed(template, *rendered) if rendered is not None else Answer(content=SAID)
        if SAID not in answer.content:  # a template may write a label before it
            return f"as the chat template renders it, {Answer(content=SAID).difference(answer)}"
        return self._first_difference(template, Answer(content=SAID), (), format)

    def reasoning(self, spec: Mapping[str, Any], format: AnswerFormat, field: str) -> str:
        """Why reasoning does not come back; empty when it does. `field`: of the messages that the template shows it of."""
        template, expected = ResponseTemplate.load(spec), Answer(THOUGHT, SAID)
        message = {"role": "assistant", "content": SAID, field: THOUGHT}
        rendered = self._rendered(message, THOUGHT.split(",")[0]) if field else None
        return self._first_difference(template, expected, [rendered] if rendered is not None else [], format)

    def calls(self, spec: Mapping[str, Any], format: AnswerFormat, count: int, *, rendered: bool) -> str:
        """Why `count` calls do not come back; empty when they do. `rendered`: try those that the template renders, too."""
        template, difference = ResponseTemplate.load(spec), ""
        bare = (BARE_CALLS,) if format.tools is not None and format.tools.arguments == "python" else ()
        for calls in (CALLS, PLAIN_CALLS, *bare) if rendered else ():
            shown = self._rendered(self._analysis.messages.calls.message(calls[:count]), calls[count - 1][0])
            failure = Answer(calls=list(calls[:count])).difference(parsed(template, *shown)) if shown is not None else ""
            if not failure:
                break
            difference = difference or f"as the chat template renders it, {failure}"
        else:
            if difference:
                return difference
        if difference and self.writes(spec, format):
            return difference
        return self._after_results(template, format)

    def writes(self, spec: Mapping[str, Any], format: AnswerFormat) -> str:
        """Why calls do not come back as the format writes them, also after content and reasoning; empty when they do."""
        if format.tools is None:
            return "it has no format to write"
        count = 2 if format.tools.several else 1
        tags = format.tools.tags
        calls = PLAIN_CALLS if tags is not None and tags.item else CALLS  # in tags within tags only a schema tells {} from ""
        answers = [Answer(calls=list(calls[:count]))]
        answers += [Answer("", SAID, list(calls[:1]))] if format.tools_after_content is not None else []
        answers += [Answer(THOUGHT, "", list(calls[:1]))] if format.reasoning is not None else []
        template = ResponseTemplate.load(spec)
        return next((text for each in answers if (text := self._first_difference(template, each, (), format))), "")

    def _prompt(self, variables: Mapping[str, Any] | None = None) -> str | None:
        return self._probe.render([user()], prompt=True, tools=TOOLS, variables=variables or {})

    def _prompts(self) -> Iterator[str]:
        switch = self._analysis.messages.switch
        choices: list[Mapping[str, Any]] = [{}, *([{switch: True}, {switch: False}] if switch else [])]
        prompts = [self._prompt(variables) or self._probe.render([user()], prompt=True, tools=()) for variables in choices]
        yield from dict.fromkeys(prompt for prompt in prompts if prompt is not None)

    def _rendered(self, message: Mapping[str, Any], word: str) -> tuple[str, str] | None:
        """A prompt and the answer that the template renders after it; None when the answer does not show `word`."""
        text = self._probe.render([user(), message], tools=TOOLS)
        answer = self._analysis.answer_of(after(text, USER))
        if text is None or answer is None or word not in answer:
            return None
        prompt = text[: len(text) - len(answer)]
        answer = answer.removesuffix(self._analysis.turn_end)
        for end in self._ends:
            answer = answer.split(end, 1)[0]
        while (stop := next((end for end in ENDS if answer.rstrip().endswith(end)), None)) is not None:
            answer = answer.rstrip().removesuffix(stop)
        reasoning = self._analysis.format.reasoning
        if reasoning is not None and reasoning.end.strip() not in answer:
            answer = answer.removeprefix(reasoning.begin)
        answer = without_reasoning(answer, reasoning)
        return prompt, self.assumed.end + answer if self.assumed is not None else answer

    def _first_difference(
        self, template: ResponseTemplate, expected: Answer, texts: Sequence[tuple[str, str]], format: AnswerFormat
    ) -> str:
        """The first difference in given answers and in what a format writes after each of the template's prompts."""
        for prompt, text in texts:
            if difference := expected.difference(parsed(template, prompt, text)):
                return f"as the chat template renders it, {difference}"
        if (expected.calls and format.tools is None) or (expected.reasoning and format.reasoning is None):
            return ""
        for prompt in self._prompts():
            place, wanted = ResponseParser(template, prompt).place, expected
            text = written(format, expected.reasoning, expected.content, expected.calls)
            if (place == "reasoning" or (self.assumed and place == "start")) and format.reasoning is not None:
                wanted = Answer(THOUGHT, expected.content, expected.calls)
                text = written(format, THOUGHT, expected.content, expected.calls)[len(format.reasoning.begin) :]
            elif place == "content" or (template.fields.get("reasoning") is None and expected.reasoning):
                wanted = Answer("", expected.content, expected.calls)
                text = written(format, "", expected.content, expected.calls)
            if difference := wanted.difference(parsed(template, prompt, text)):
                return f"after a prompt, {difference}"
        return ""

    def _after_results(self, template: ResponseTemplate, format: AnswerFormat) -> str:
        """Why content after a tool's result does not come back alone."""
        form = self._analysis.messages.calls
        name = NAMES[0] if self._analysis.messages.tool_name else ""
        prompt = self._probe.render([user(), form.message(CALLS[:1]), result(form, name=name)], prompt=True, tools=TOOLS)
        if prompt is None:
            return ""
        expected, text = Answer(content=SAID), written(format, "", SAID)
        place = ResponseParser(template, prompt).place
        if (place == "reasoning" or (self.assumed and place == "start")) and format.reasoning is not None:
            expected.reasoning, text = THOUGHT, written(format, THOUGHT, SAID)[len(format.reasoning.begin) :]
        difference = expected.difference(parsed(template, prompt, text))
        return f"after a tool's result, {difference}" if difference else ""


def parsed(template: ResponseTemplate, prompt: str, text: str) -> Answer:
    """The answer that a text after a prompt holds."""
    parser, answer = ResponseParser(template, prompt, dict.fromkeys(NAMES, SCHEMA)), Answer()
    calls: list[list[str]] = []
    for event in [*parser.feed(text), *parser.finish()]:
        match event:
            case Reasoning():
                answer.reasoning += event.text
            case Content():
                answer.content += event.text
            case CallBegin():
                calls.append([event.name, ""])
            case CallArguments():
                calls[-1][1] += event.text
    answer.calls = [(name, loaded(arguments)) for name, arguments in calls]
    return answer


def loaded(text: str) -> Any:
    """The value of a JSON text; the text when it is none."""
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
