"""Finds how a chat template writes an assistant's answer, by rendering conversations that differ in one thing.

The template is untrusted: each rendering may be refused, and then the feature that it would have shown is None.
"""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from msgspec import Struct, structs

from tpserve.response_template.calls import ONE_CALL, CallForm, MeasuredCalls, masked, measure_calls
from tpserve.response_template.format import INDEX, AnswerFormat, ReasoningFormat, ToolFormat
from tpserve.response_template.probe import (
    CONTENT,
    NAMES,
    REASONING,
    RESULT,
    Probe,
    after,
    answer_in,
    common_prefix,
    common_suffix,
    user,
)
from tpserve.text.chat import ChatTemplate

NOTHING: Mapping[str, Any] = MappingProxyType({})
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
SWITCHES = ("enable_thinking", "thinking")
"""The names of the variables that turn reasoning on and off."""
MARK = re.compile(r"<(?!/)[^<>\s]*(?:think|reason|THINK)[^<>\s]*>|\[THINK\]")
"""Matches the opening tag of reasoning, as it is called in most templates."""
ANY_MARK = re.compile(MARK.pattern.replace("<(?!/)", "<").replace(r"\[THINK", r"\[/?THINK"))
"""Matches the closing tag as well."""
TAG = re.compile(r"\s*(?:<[^<>\s]+>|\[/?[A-Z_]+\])\s*")
ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "</s>", "<|end|>", "<|endoftext|>", "<end_of_turn>", "<|end_of_text|>"),
    *("<｜end▁of▁sentence｜>", "<|return|>", "<|call|>", "<|tool_response>", "<|end_of_msg|>"),
)
"""Tokens that end a turn in many models."""


class MessageForm(Struct, frozen=True):
    """How messages have to be handed to a template.

    `calls`: the form of calls. `reasoning`: the field that the template shows as reasoning of the last answer; empty when none.
    `tool_name`: whether a tool message shows the name of its function. `developer`: whether the template knows that role.
    `switch`: the variable that turns reasoning on and off; empty when there is none.
    """

    calls: CallForm = CallForm()
    reasoning: str = ""
    tool_name: bool = False
    developer: bool = False
    switch: str = ""


class Analysis(Struct, frozen=True):
    """What the renderings show.

    `anchors`: the texts after which an answer may begin; empty when nothing marks it. `header`: the text between a user's words
    and an answer. `turn_end`: the text after an answer.
    """

    format: AnswerFormat
    messages: MessageForm
    anchors: tuple[str, ...] = ()
    header: str = ""
    turn_end: str = ""

    def answer_of(self, turn: str) -> str | None:
        """The answer in a turn, with what ends it; None when it is not there."""
        return answer_in(turn, self.header, self.anchors[0] if self.anchors else "")


def analyse(template: ChatTemplate, ends: Sequence[str] = ()) -> Analysis:
    """Measure a template. `ends`: further tokens that end a turn, as the model's EOS."""
    probe, ends = Probe(template), (*ends, *ENDS)
    plain = probe.turn({"content": CONTENT})
    header = header_of(probe, plain)
    anchor = anchor_of(probe, header)
    calls = measure_calls(probe, (header, anchor), ends) if CONTENT in plain else None
    form = calls.form if calls else CallForm()
    reasoning, field = reasoning_of(probe, header, calls)
    begin = without_reasoning(plain[len(header) : plain.find(CONTENT)], reasoning) if plain.startswith(header) else ""
    if not re.search(r"[<\[|>\]]", begin) or MARK.search(begin) or (reasoning is not None and reasoning.begin.strip() in begin):
        begin = ""
    if reasoning is not None and begin and reasoning.end.endswith(begin) and begin != reasoning.end:
        reasoning = ReasoningFormat(reasoning.begin, reasoning.end[: -len(begin)])
    tools = tidy(calls.tools, reasoning) if calls else None
    format = AnswerFormat(
        reasoning=reasoning,
        content_begin=begin,
        content_end=content_end(probe, plain, ends, form) if begin or any(end in plain for end in ends[: -len(ENDS)]) else "",
        tools_after_content=between_content_and_calls(probe, form, tools, ends) if tools else None,
        tools=tools,
    )
    messages = MessageForm(
        calls=form,
        reasoning=field,
        tool_name=names_results(probe, form),
        developer="developer" in (template.source or "") and takes_developer(probe),
        switch=next((name for name in SWITCHES if switches(probe, name)), ""),
    )
    turn_end = after(plain, CONTENT).removeprefix(format.content_end)
    return Analysis(format, messages, anchors_of(probe, header, form, reasoning), header, turn_end)


def openings(probe: Probe, switch: str) -> tuple[str, str]:
    """The generation prompt with reasoning on and off."""
    return generation(probe, {switch: True}), generation(probe, {switch: False})


def generation(probe: Probe, variables: Mapping[str, Any] = NOTHING) -> str:
    """What opens the assistant's turn; empty when nothing does."""
    silent, prompt = (probe.opening(prompt=prompt, variables=variables) for prompt in (False, True))
    return prompt[len(common_prefix(silent, prompt)) :]


def header_of(probe: Probe, plain: str) -> str:
    """The text between the user's words and an answer that every generation prompt and every answer has."""
    base = common_prefix(probe.opening(prompt=False), probe.opening())
    header = generation(probe)
    if header:
        others = [text for name in SWITCHES for text in openings(probe, name) if text]
        others += [plain[len(base) :]] if plain.startswith(base) else []
    else:  # the template opens the turn in every case, or the user's turn ends with that
        base, header = "", base
        others = [text for name in SWITCHES for on in (True, False) if (text := probe.opening(variables={name: on}))]
        others += [plain] if plain else []
    for other in others:
        header = common_prefix(header, other)
    if mark := MARK.search(header):
        header = header[: mark.start()]
    header = base + header
    lead = plain[: max(0, plain.find(CONTENT))]
    if not ANY_MARK.search(lead) and len(lead) > len(header):  # a prompt may say more than a past turn does
        same = common_suffix(probe.opening(), lead)
        header = lead if same.strip() and same.endswith(lead[len(header) :]) else header
    return header


def anchor_of(probe: Probe, header: str) -> str:
    """The part of a header that opens the assistant's turn; all of it when the user's turn ends with it."""
    return header[len(common_prefix(probe.opening(prompt=False), header)) :] or header


def anchors_of(probe: Probe, header: str, form: CallForm, reasoning: ReasoningFormat | None) -> tuple[str, ...]:
    """The texts that stand before an answer: after a user's message, and after a tool's when that differs."""
    anchor = anchor_of(probe, header)
    if not anchor.strip():
        return ()
    rests = []
    for index in (0, 1):  # two ids, of which an anchor shows none
        call = form.message([ONE_CALL] * (index + 1))
        results = [result(form, each) for each in range(index + 1)]
        rests.append(after(probe.render([user(), call, *results], prompt=True), RESULT))
    rest = common_suffix(*rests)
    if mark := MARK.search(rest):
        rest = rest[: mark.start()]
    anchors = (anchor,) if anchor in rest or not rest.strip() else (anchor, rest)
    if reasoning is None:
        return anchors
    prompts = [probe.opening(), *(probe.opening(variables={name: False}) for name in SWITCHES)]
    tails = [text[len(header) :].rstrip() for text in prompts if text.startswith(header)]
    silent = dict.fromkeys(tail for tail in tails if tail and reasoning.begin.strip() not in tail)  # there is no reasoning
    return (*anchors, *(each + tail for tail in silent for each in anchors))


def result(form: CallForm, index: int = 0, name: str = "") -> dict[str, Any]:
    """A tool's message for one of the probe's calls."""
    named = {"name": name} if name else {}
    return {"role": "tool", "tool_call_id": form.id_of(NAMES[0], index), "content": RESULT, **named}


def reasoning_of(probe: Probe, header: str, calls: MeasuredCalls | None) -> tuple[ReasoningFormat | None, str]:
    """The text around reasoning, and the field of a message that the template takes it from; empty for none."""
    for variables in (NOTHING, *({name: True} for name in SWITCHES)):
        for field in REASONING_FIELDS:
            text = probe.turn({"content": CONTENT, field: REASONING}, variables)
            at, end = text.find(REASONING), text.find(CONTENT)
            if text.startswith(header) and 0 <= at < end:
                begin, close = text[len(header) : at], text[at + len(REASONING) : end]
                if begin.strip() and close.strip():
                    return ReasoningFormat(begin, close), field
    call = calls.form.message([ONE_CALL]) if calls is not None else {}
    for field in REASONING_FIELDS if calls is not None else ():  # some templates show it before calls only
        text = probe.turn({**call, field: REASONING})
        begin, tag = text[len(header) : max(0, text.find(REASONING))], TAG.match(after(text, REASONING))
        if text.startswith(header) and begin.strip() and tag is not None:
            return ReasoningFormat(begin, tag[0]), field
    return prompted_reasoning(probe, header), ""


def prompted_reasoning(probe: Probe, header: str) -> ReasoningFormat | None:
    """Reasoning as a generation prompt opens it, or opens and closes it at once when reasoning is off."""
    prompts = [probe.opening(), *(probe.opening(variables={name: on}) for name in SWITCHES for on in (True, False))]
    opened = [text[len(header) :] for text in prompts if text.startswith(header)]
    for text in opened:
        if match := re.fullmatch(rf"\s*({MARK.pattern})(\s*)([<\[][^<>\s]+[>\]])(\s*)", text):
            lines = match[2][: (len(match[2]) + 1) // 2]
            return ReasoningFormat(match[1] + lines, match[2][len(lines) :] + match[3] + match[4])
    for text in opened:
        if match := re.fullmatch(rf"\s*({MARK.pattern})(\s*)", text):
            return ReasoningFormat(match[1] + match[2], f"{match[2]}{match[1][0]}/{match[1][1:]}{match[2] * 2}")
    return None


def without_reasoning(text: str, reasoning: ReasoningFormat | None) -> str:
    """The text after reasoning that holds nothing, or after its end alone."""
    if reasoning is None:
        return text
    begin, end = re.escape(reasoning.begin.strip()), re.escape(reasoning.end.strip())
    match = re.match(rf"\s*(?:{begin}\s*)?{end}", text)
    return text[match.end() :] if match else text


def tidy(tools: ToolFormat, reasoning: ReasoningFormat | None) -> ToolFormat:
    """The format without the reasoning that a template writes before calls; line breaks go between calls, not before them."""
    begin = without_reasoning(tools.begin, reasoning)
    call_begin = without_reasoning(tools.call_begin, reasoning) if not tools.begin else tools.call_begin
    gone = len(begin) + len(call_begin) < len(tools.begin) + len(tools.call_begin)
    between = tools.between
    if tools.several and not begin.strip():
        lines = call_begin[: len(call_begin) - len(call_begin.lstrip())]
        begin, call_begin = begin + lines, call_begin[len(lines) :]
        between += lines
        written = reasoning.end[len(reasoning.end.rstrip()) :] if gone and reasoning is not None else begin
        begin = begin.removeprefix(written)
    return structs.replace(tools, begin=begin, call_begin=call_begin, between=between)


def between_content_and_calls(probe: Probe, form: CallForm, tools: ToolFormat, ends: Sequence[str]) -> str | None:
    """The text between content and calls; None when the template does not show both in one answer."""
    text = masked(probe.turn(form.message([ONE_CALL], CONTENT)), form)
    between = after(text[: max(0, text.find(NAMES[0]))], CONTENT)
    begin = (tools.begin + tools.call_begin).replace(INDEX, "0")
    if CONTENT not in text or not between.endswith(begin) or any(end in between for end in ends[: len(ends) - len(ENDS)]):
        return None
    return between[: len(between) - len(begin)]


def content_end(probe: Probe, plain: str, ends: Sequence[str], form: CallForm) -> str:
    """The text after content that does not end every answer."""
    end = after(plain, CONTENT)
    for token in ends:
        if (stop := end.find(token)) >= 0:
            end = end[:stop]
    call = probe.turn(form.message([ONE_CALL]))
    end = end[: len(end) - len(common_suffix(end, call))]
    return end if end.strip() else ""


def switches(probe: Probe, name: str) -> bool:
    """Whether a variable changes the prompt."""
    on, off = (probe.render([user()], prompt=True, variables={name: value}) for value in (True, False))
    return on != off


def names_results(probe: Probe, form: CallForm) -> bool:
    """Whether a tool's message shows the name of its function, or is refused without it."""
    call = form.message([ONE_CALL])
    without, named = (probe.render([user(), call, result(form, name=name)]) for name in ("", NAMES[0]))
    return named is not None and named != without


def takes_developer(probe: Probe) -> bool:
    """Whether the text of a message of the role developer is shown."""
    text = probe.render([{"role": "developer", "content": CONTENT}, user()])
    return text is not None and CONTENT in text
