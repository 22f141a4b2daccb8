"""The language of a whole answer - reasoning, then content or calls - as one grammar in llguidance's form.

    auto       text, in which the beginning of a call starts calls; with an answer's grammar: what it describes, or calls
    required   calls, at least one
    none       what the answer's grammar describes, or text

Before any of them come reasoning or, where the prompt has opened it, the rest of reasoning. Calls inside reasoning are reasoning.
The envelope of a call and its name are to the letter; its arguments follow the schema of a strict tool.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from msgspec import Struct

from tpserve.errors import UserError
from tpserve.response_template.arguments import Tool, arguments
from tpserve.response_template.format import NAME, AnswerFormat, ToolFormat
from tpserve.response_template.lark import Lark, SpecialTokens, is_token, quoted, without
from tpserve.response_template.lark import Literal as Atoms

_TAG = re.compile(r"\s*(<[^<>\s]+>|\[[^\[\]\s{}\"']+\])")
"""Text at the beginning of a call that hardly ever stands in prose."""
LINES = "\r\n\t"
"""White space that does not count around a text; blanks do."""
_PROSE = ("", "{", "[")
"""What begins a call, but is common in prose."""


class AnswerRules(Struct, frozen=True, kw_only=True):
    """What an answer has to obey.

    `choice`: a named function is "required" with that one tool and `parallel` false. `state`: what the prompt has written of the
    answer - nothing, the beginning of reasoning, or all of it (or reasoning is off). `thinking_budget`: tokens of reasoning,
    before its end is forced. `answer`: the grammar of response_format in llguidance's form; empty for any text.
    """

    format: AnswerFormat
    tokens: SpecialTokens
    tools: Sequence[Tool] = ()
    choice: Literal["none", "auto", "required"] = "auto"
    parallel: bool = True
    state: Literal["start", "reasoning", "content"] = "start"
    thinking_budget: int | None = None
    answer: str = ""


def answer_grammar(rules: AnswerRules) -> str:
    """The grammar; empty when an answer may be any text. UserError for what this model's form of answers cannot do.

    What is wrong in a schema or in the answer's grammar is said when the result is compiled.
    """
    calls = rules.choice != "none" and bool(rules.tools) and rules.format.tools is not None
    if rules.choice == "required" and not calls:
        raise UserError(
            "tool_choice asks for a call, but there is no tool, or the model has no form for calls", param="tool_choice"
        )
    budget = rules.thinking_budget is not None and rules.format.reasoning is not None and rules.state != "content"
    if not calls and not rules.answer and not budget:
        return ""
    answer = _Answer(rules, calls)
    answer.start()
    return _with_answer(str(answer.lark), rules.answer) if rules.answer and rules.choice != "required" else str(answer.lark)


class _Answer:
    """The rules from the start of an answer to its end."""

    def __init__(self, rules: AnswerRules, calls: bool) -> None:
        self.lark = Lark(rules.tokens)
        self._rules, self._format = rules, rules.format
        self._calls = _Calls(self.lark, rules, rules.format.tools) if calls and rules.format.tools is not None else None

    def start(self) -> None:
        """Add the rule `start` and all that it needs."""
        reasoning, state = self._format.reasoning, self._rules.state
        body, is_free = self._body()
        self.lark.rule("body", body)
        if reasoning is None or state == "content" or not self.lark.literal(reasoning.end.strip() or reasoning.end).atoms:
            self.lark.rule("start", "body")
            return
        gap = reasoning.end[len(reasoning.end.rstrip()) :] if reasoning.end.strip() else ""
        self.lark.rule("reasoning", f"{self._rest_of_reasoning(reasoning.end.strip() or reasoning.end)}")
        after = "reasoning body" if is_free else f"reasoning {self.lark.literal(gap)} body"
        if state == "reasoning" or not reasoning.begin.strip():
            self.lark.rule("start", after)
        else:
            self.lark.rule("start", f"{self.lark.opening('think', self._literal_of_begin())} {after} | body")

    def _literal_of_begin(self) -> Atoms:
        return self.lark.literal(self._format.reasoning.begin.strip(LINES) if self._format.reasoning else "")

    def _rest_of_reasoning(self, end_text: str) -> str:
        """Any text up to the end of reasoning, at most as many tokens as the budget has."""
        end, budget = self.lark.literal(end_text), self._rules.thinking_budget
        first, *rest = end.atoms
        around = [*self._literal_of_begin().atoms, *end.atoms]
        if is_token(first):
            any_token = self.lark.any_token(*around)
            return f"{any_token}* {end}" if budget is None else f"{any_token}{{0,{budget}}} {end}" if budget else str(end)
        if budget is None:
            special = self.lark.others(*around)
            return (f"(TEXT? {special})* " if special else "") + self.lark.until("think_end", end)
        if budget <= 0:
            return str(end)
        # A lexeme past its max_tokens is dropped; the last one of a state is taken as ended. So the text that may still find its
        # own end is dropped a token before the text that must not contain it, and behind the latter the end is forced.
        cut = self.lark.rule(
            "think_cut",
            self.lark.rule("NOT_ENDED", without(json.loads(first) if first[0] == '"' else end_text)),
            f"max_tokens={budget}",
        )
        if budget == 1:
            return f"({first} | {cut} {first}) {' '.join(rest)}"
        whole = self.lark.rule("think_end", f"TEXT? {first}", f"lazy, max_tokens={budget - 1}")
        return f"({whole} | {cut} {first}) {' '.join(rest)}"

    def _body(self) -> tuple[str, bool]:
        """What comes after reasoning, and whether it may begin with any text."""
        if self._rules.choice == "required" and self._calls is not None:
            return self._calls_alone(self._calls), False
        if not self._rules.answer:
            return self._text(), True
        if self._calls is not None and self._calls.in_prose:
            text = "response_format and tools exclude each other in this model's form of calls"
            raise UserError(f"{text}; set tool_choice to none or required", param="response_format", code="invalid_value")
        begin, end = self.lark.literal(self._format.content_begin), self.lark.literal(self._format.content_end)
        content = f"{begin} @response_format {end}"
        return (f"{self._calls_alone(self._calls)} | {content}" if self._calls is not None else content), False

    def _calls_alone(self, calls: "_Calls") -> str:
        """Calls without content."""
        return f"{self.lark.literal(self._format.content_end)} {calls.all()}" if self._format.ends_content else calls.all()

    def _text(self) -> str:
        """Any text; where a call begins in it, calls."""
        format, calls = self._format, self._calls
        begin, end = self.lark.literal(format.content_begin.strip(LINES)), self.lark.literal(format.content_end.strip(LINES))
        openings = calls.openings() if calls is not None else []
        firsts = [*(opening.atoms[0] for opening, _ in openings), *self._literal_of_begin().atoms[:1], *end.atoms[:1]]
        special = self.lark.others(*firsts)
        before = self.lark.rule("before", f"(TEXT? {special})*" if special else "")
        has_instead = calls is not None and (begin.atoms or end.atoms) and not format.ends_content
        instead = f" | {calls.all()}" if calls is not None and has_instead else ""
        if end.atoms:
            after = ""
            if calls is not None and format.tools_after_content is not None:
                after = f"({self.lark.literal(format.tools_after_content)} {calls.all()})?"
            return f"{begin} {before} {self.lark.until('content_end', end)} {after}{instead}"
        texts = [f"{before} TEXT?"]
        for at, (opening, rest) in enumerate(openings):
            if calls is not None and calls.in_prose:
                texts.append(f"{self.lark.until(f'opening_{at}', opening, 'BLANKS?')} {rest}")
            else:
                texts.append(f"{before} {self.lark.until(f'opening_{at}', opening)} {rest}")
        return f"{begin} ({' | '.join(texts)}){instead}"


class _Calls:
    """The rules of calls."""

    def __init__(self, lark: Lark, rules: AnswerRules, format: ToolFormat) -> None:
        self._lark, self._rules, self._format = lark, rules, format
        self._text = (format.begin + format.call_begin).lstrip()
        first = next(iter(lark.literal(self._text).atoms), "")
        self._is_channel = bool(rules.format.content_begin.strip()) and not is_token(first) and not _TAG.match(self._text)
        """Whether a call has a channel of its own, which only its name tells from others."""
        self.in_prose = not self._is_channel and self._text[:1] in _PROSE and not _TAG.match(self._text)
        """Whether what begins a call is common in prose: it is a call at the beginning only, and with a tool's name."""
        self._in_string = format.call_begin.endswith('"') and format.name_end.startswith('"')
        tail = format.call_end.rstrip() or format.call_end
        blank = format.call_end[len(tail) :]
        self._tail = lark.literal(tail)
        gap = lark.literal(blank + format.between + format.call_begin)
        close = lark.literal((blank + format.end).rstrip())
        several = rules.parallel and format.several and not self._tail.ended and not gap.ended
        names = [self._tool(at, tool) for at, tool in enumerate(rules.tools)]
        self._names = [name for name, _ in names]
        self._bodies = [body for _, body in names]
        lark.rule("call", " | ".join(f"{name} {body}" for name, body in names))
        lark.rule("more_calls", (f"({gap} call)* " if several else "") + ("" if self._tail.ended else str(close)))

    def _tool(self, at: int, tool: Tool) -> tuple[str, str]:
        """The name with the text behind it as atoms, and the rule of the rest of the call."""
        name = json.dumps(tool.name, ensure_ascii=False)[1:-1] if self._in_string else tool.name
        called, *behind = self._lark.named(name, self._format.name_end.replace(NAME, name))
        body = f"{' '.join(behind)} {arguments(self._lark, tool, f't{at}', self._format)} {self._tail}"
        return called, self._lark.rule(f"t{at}", body)

    def all(self) -> str:
        """One call or several, with what is around them."""
        if self._is_channel:
            *before, last = self._lark.literal(self._format.begin + self._format.call_begin).atoms
            heads = [" ".join([*before, quoted(json.loads(last) + json.loads(name))]) for name in self._names]
            return f"({' | '.join(f'{head} {body}' for head, body in zip(heads, self._bodies, strict=True))}) more_calls"
        opening = self._lark.opening("calls", self._lark.literal(self._format.begin + self._format.call_begin))
        return f"{opening} call more_calls"

    def openings(self) -> list[tuple[Atoms, str]]:
        """What begins calls, and the rules for what then follows."""
        if self.in_prose:
            names = [self._lark.literal(self._text + json.loads(name)) for name in self._names]
            return [(name, f"{body} more_calls") for name, body in zip(names, self._bodies, strict=True)]
        if self._is_channel:
            after = self._rules.format.tools_after_content
            return [] if after is None else [self._opening(after + self._format.begin + self._format.call_begin)]
        alone = self._format.call_begin.lstrip()  # readers forgive calls without what begins all of them
        several = [self._text] if not self._format.begin.strip() or alone[:1] in _PROSE else [self._text, alone]
        return [self._opening(text) for text in several if self._lark.literal(text).atoms]

    def _opening(self, text: str) -> tuple[Atoms, str]:
        first, *rest = self._lark.literal(text).atoms
        if is_token(first) or (tag := _TAG.match(text)) is None:
            return Atoms((first,), False), " ".join([*rest, "call more_calls"])
        return self._lark.literal(tag[0]), f"{self._lark.literal(text[tag.end() :])} call more_calls"


def _with_answer(grammar: str, answer: str) -> str:
    """Both grammars as one; the answer's is called `response_format`."""
    found: Any = json.loads(answer) if answer.lstrip().startswith("{") else {"grammars": [{"lark_grammar": answer}]}
    first, *others = found["grammars"]
    return json.dumps({"grammars": [{"lark_grammar": grammar}, {**first, "name": "response_format"}, *others]})
