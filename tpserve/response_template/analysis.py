"""Finds how a chat template writes an assistant's answer, by rendering conversations that differ in one thing.

The template is untrusted: each rendering may be refused, and then the feature that it would have shown is None.
"""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from msgspec import Struct

from tpserve.response_template.calls import CallForm, MeasuredCalls, measure_calls
from tpserve.response_template.format import AnswerFormat, ReasoningFormat
from tpserve.response_template.probe import (
    CONTENT,
    KEYS,
    NAMES,
    REASONING,
    RESULT,
    VALUES,
    Probe,
    after,
    common_prefix,
    common_suffix,
    user,
)
from tpserve.text.chat import ChatTemplate

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
SWITCHES = ("enable_thinking", "thinking")
"""The names of the variables that turn reasoning on and off."""
MARK = re.compile(r"<(?!/)[^<>\s]*(?:think|reason|THINK)[^<>\s]*>|\[THINK\]")
"""Matches the opening tag of reasoning, as it is called in most templates."""
ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "</s>", "<|end|>", "<|endoftext|>", "<end_of_turn>", "<|end_of_text|>", "<｜end▁of▁sentence｜>")
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
    """What the renderings show. `anchors`: the texts after which an answer may begin; empty when nothing marks it."""

    format: AnswerFormat
    messages: MessageForm
    anchors: tuple[str, ...] = ()


def analyse(template: ChatTemplate, ends: Sequence[str] = ()) -> Analysis:
    """Measure a template. `ends`: further tokens that end a turn, as the model's EOS."""
    probe = Probe(template)
    plain = probe.turn({"content": CONTENT})
    header = header_of(probe, plain)
    ends = (*ends, *ENDS)
    calls = None
    if after(plain, CONTENT) or plain.endswith(CONTENT):
        calls = measure_calls(probe, header, ends, after(plain, CONTENT), CONTENT)
    reasoning, field = reasoning_of(probe, header)
    content = content_of(plain, header, reasoning, ends, calls, probe)
    format = AnswerFormat(
        reasoning=reasoning,
        content_begin=content[0],
        content_end=content[1],
        tools_after_content=calls.after_content if calls else "",
        tools=calls.tools if calls else None,
    )
    form = calls.form if calls else CallForm()
    messages = MessageForm(
        calls=form,
        reasoning=field,
        tool_name=names_results(probe, form),
        developer="developer" in (template.source or "") and takes_developer(probe),
        switch=next((name for name in SWITCHES if openings(probe, name)[0] != openings(probe, name)[1]), ""),
    )
    return Analysis(format, messages, anchors_of(probe, header, form))


def openings(probe: Probe, switch: str) -> tuple[str, str]:
    """The text after the user's words with reasoning on and off."""
    return probe.opening(variables={switch: True}), probe.opening(variables={switch: False})


def header_of(probe: Probe, plain: str) -> str:
    """The text between the user's words and an answer that every generation prompt and every answer has."""
    header = probe.opening()
    for other in (*(text for name in SWITCHES for text in openings(probe, name)), plain):
        if other:
            header = common_prefix(header, other)
    if mark := MARK.search(header):
        header = header[: mark.start()]
    return header


def anchors_of(probe: Probe, header: str, form: CallForm) -> tuple[str, ...]:
    """The texts that stand before an answer: after a user's message, and after a tool's when that differs."""
    silent = probe.opening(prompt=False)
    anchor = header[len(silent) :] if header.startswith(silent) and len(header) > len(silent) else header
    if not anchor.strip():
        return ()
    call = form.message([(NAMES[0], {KEYS[0]: VALUES[0]})])
    rest = after(probe.render([user(), call, result(form)], prompt=True), RESULT)
    if mark := MARK.search(rest):
        rest = rest[: mark.start()]
    return (anchor,) if anchor in rest or not rest.strip() else (anchor, rest)


def result(form: CallForm, **further: str) -> dict[str, Any]:
    """A tool's message for the probe's first call."""
    return {"role": "tool", "tool_call_id": form.id_of(NAMES[0], 0), "content": RESULT, **further}


def reasoning_of(probe: Probe, header: str) -> tuple[ReasoningFormat | None, str]:
    """The text around reasoning, and the field of a message that the template takes it from; empty for none."""
    choices: list[Mapping[str, Any]] = [MappingProxyType({}), *({name: True} for name in SWITCHES)]
    for variables in choices:
        for field in REASONING_FIELDS:
            text = probe.turn({"content": CONTENT, field: REASONING}, variables)
            at, end = text.find(REASONING), text.find(CONTENT)
            if text.startswith(header) and 0 <= at < end:
                begin, close = text[len(header) : at], text[at + len(REASONING) : end]
                if begin.strip() and close.strip():
                    return ReasoningFormat(begin, close), field
    return prompted_reasoning(probe, header), ""


def prompted_reasoning(probe: Probe, header: str) -> ReasoningFormat | None:
    """Reasoning as a generation prompt opens it, or opens and closes it at once when reasoning is off."""
    opened = [probe.opening(), *(text for name in SWITCHES for text in openings(probe, name))]
    for text in opened:
        if match := re.fullmatch(r"\s*([<\[][^<>\s]+[>\]])(\s*)([<\[]/?[^<>\s]+[>\]])(\s*)", text[len(header) :]):
            lines = match[2][: (len(match[2]) + 1) // 2]
            return ReasoningFormat(match[1] + lines, match[2][len(lines) :] + match[3] + match[4])
    for text in opened:
        if match := re.fullmatch(r"\s*([<\[])([^<>\s/]+)([>\]])(\s*)", text[len(header) :]):
            return ReasoningFormat(match[0].lstrip(), f"{match[4]}{match[1]}/{match[2]}{match[3]}{match[4] * 2}")
    return None


def content_of(
    plain: str,
    header: str,
    reasoning: ReasoningFormat | None,
    ends: Sequence[str],
    calls: MeasuredCalls | None,
    probe: Probe,
) -> tuple[str, str]:
    """The text around content."""
    at = plain.find(CONTENT)
    begin = plain[len(header) : at] if at >= len(header) else ""
    if reasoning is not None and (not reasoning.end.endswith(begin) or MARK.search(begin) or len(begin) >= len(reasoning.end.strip())):
        begin = ""
    end = after(plain, CONTENT)
    for token in ends:
        if (stop := end.find(token)) >= 0:
            end = end[:stop]
    if calls is not None:
        call = probe.turn(calls.form.message([(NAMES[0], {KEYS[0]: VALUES[0]})]))
        common = common_suffix(end, call)
        end = end[: len(end) - len(common)]
    return begin, end if begin else ""


def names_results(probe: Probe, form: CallForm) -> bool:
    """Whether a tool's message shows the name of its function, or is refused without it."""
    call = form.message([(NAMES[0], {KEYS[0]: VALUES[0]})])
    without, named = (probe.render([user(), call, result(form, **more)]) for more in ({}, {"name": NAMES[0]}))
    return named is not None and named != without


def takes_developer(probe: Probe) -> bool:
    """Whether the text of a message of the role developer is shown."""
    text = probe.render([{"role": "developer", "content": CONTENT}, user()])
    return text is not None and CONTENT in text
