"""The answer of a chat choice: reasoning, content and tool calls, in the shapes of the API.

`ChatAnswers` is what the server found out about its model at start, `AnswerReader` reads one choice.
"""

import dataclasses
import secrets
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from msgspec.structs import replace

from tpserve.errors import UserError
from tpserve.frontend.openai.errors import Json
from tpserve.frontend.openai.grammar import describes_output, grammar_of
from tpserve.frontend.openai.messages import call_id
from tpserve.frontend.openai.schema import ChatCompletionRequest
from tpserve.frontend.openai.tools import ToolUse
from tpserve.response_template.analysis import MessageForm
from tpserve.response_template.call_reader import CallArguments, CallBegin
from tpserve.response_template.detect import Answers
from tpserve.response_template.format import AnswerFormat
from tpserve.response_template.grammar import AnswerRules, answer_grammar
from tpserve.response_template.lark import SpecialTokens
from tpserve.response_template.parser import Place, ResponseParser
from tpserve.response_template.regions import Content, Event, Reasoning, merged
from tpserve.response_template.template import ResponseTemplate
from tpserve.text.assembler import OutputDelta
from tpserve.text.logprob_entries import TokenEntry
from tpserve.text.tokenizer import Tokenizer

TEXT_FIELDS = {"content": ("content",), "reasoning": ("reasoning", "reasoning_content")}
"""By the first of them, the fields of a message that have the same text."""
StrictLevel = Literal["auto", "function", "parameter"]


@dataclass(frozen=True)
class ChatAnswers:
    """How the model's answers are read (`template`; None: they are content) and written (`format`, for grammars).

    `off`: features that the model has not, each with the reason. `tokens`: the special tokens; `marks`: those around reasoning
    and content; `call_marks`: also those around calls.
    """

    template: ResponseTemplate | None = None
    format: AnswerFormat = field(default_factory=AnswerFormat)
    messages: MessageForm = field(default_factory=MessageForm)
    off: Mapping[str, str] = field(default_factory=dict)
    tokens: SpecialTokens | None = None
    marks: frozenset[int] = frozenset()
    call_marks: frozenset[int] = frozenset()
    strict_level: StrictLevel = "auto"

    @staticmethod
    def of(found: Answers, tokenizer: Tokenizer, tokens: SpecialTokens, strict_level: StrictLevel) -> "ChatAnswers":
        """What was found out about a model with this tokenizer."""
        template = ResponseTemplate.load(found.spec) if found.spec else None
        marks, call_marks = (tokenizer.special_within(found.delimiters(calls=calls)) for calls in (False, True))
        return ChatAnswers(template, found.format, found.messages, found.off, tokens, marks, call_marks, strict_level)

    def shown(self, use: ToolUse) -> frozenset[int]:
        """The special tokens that the text of an answer holds for its parser."""
        return self.marks if use.choice == "none" else self.call_marks

    def variables(self, effort: str | None, enable_thinking: bool | None) -> Json:
        """What a chat template is told about reasoning."""
        thinks = enable_thinking if enable_thinking is not None else None if effort is None else effort != "none"
        switches = {"enable_thinking", self.messages.switch or "thinking"} if thinks is not None else set()
        return dict.fromkeys(switches, thinks) | ({"reasoning_effort": effort} if effort not in (None, "none") else {})

    def unheeded(self, call: ChatCompletionRequest, template: str) -> list[str]:
        """A warning for each field of reasoning that the chat template, with the text `template`, does not read."""
        given = {"reasoning_effort": (call.reasoning_effort, None), "enable_thinking": (None, call.enable_thinking)}
        return [
            f"{name} has no effect: the model's chat template does not read it"
            for name, values in given.items()
            if (variables := self.variables(*values)) and not any(variable in template for variable in variables)
        ]

    def grammars(self, call: ChatCompletionRequest, use: ToolUse, place: Place) -> list[str]:
        """The grammar of the answer after a prompt that ends in `place`, then one that may serve when it is refused: a call that
        must come obeys its schema, if the client has not said `strict`, only where the schema can be enforced.

        UserError when the model cannot be held to what was asked for.
        """
        found = []
        if use.choice == "required" and any(not tool.strict and tool.name not in use.lax for tool in use.tools):
            with suppress(UserError):
                tools = [replace(tool, strict=tool.name not in use.lax) for tool in use.tools]
                found.append(self._grammar(call, dataclasses.replace(use, tools=tools), place))
        return [*found, self._grammar(call, use, place)]

    def _grammar(self, call: ChatCompletionRequest, use: ToolUse, place: Place) -> str:
        answer, budget = grammar_of(call), call.thinking_token_budget
        held = self.strict_level != "auto" or any(tool.strict for tool in use.tools) or not use.parallel or bool(answer)
        binds = use.choice == "required" or (use.choice == "auto" and held)
        if budget is not None and self.format.reasoning is None:
            raise _off("thinking_token_budget", self.off.get("reasoning", "the model does not reason"))
        if binds and self.format.tools is None:
            what = "tool_choice" if use.choice == "required" else "parallel_tool_calls" if not use.parallel else "tools"
            raise _off(what, self.off.get("call", "the form of the model's calls is not known to the letter"))
        if not binds and budget is None and (not answer or self.format.reasoning is None):
            return answer
        assert self.tokens is not None, "a model whose answers have a form has a tokenizer"
        rules = AnswerRules(
            format=self.format,
            tokens=self.tokens,
            tools=[replace(tool, strict=tool.strict or self.strict_level == "parameter") for tool in use.tools] if binds else (),
            choice=use.choice if binds else "none",
            parallel=use.parallel and not use.named,
            state=place,
            thinking_budget=budget,
            answer=answer,
        )
        return answer_grammar(rules)

    def tail(self, prompt: str) -> tuple[str, Place]:
        """The end of a prompt that belongs to the answer, and where it leaves the answer."""
        if self.template is None:
            return "", "start"
        tail = self.template.answer_begun(prompt)
        return tail, ResponseParser(self.template, tail).place

    def refuse_tools(self, use: ToolUse) -> None:
        """UserError when the model's calls cannot be read."""
        if use.choice != "none" and (self.template is None or "tool_calls" not in self.template.fields):
            raise _off("tools", self.off.get("call", "its answers have no known form"))


def _off(field: str, reason: str) -> UserError:
    return UserError(
        f"{field} is not supported with this model: {reason}; leave it out", param=field, code="unsupported_parameter"
    )


class AnswerReader:
    """Reads one choice. `tail`: the end of the prompt that belongs to the answer. `call_ids`: an id for the call of a number.
    `constrained`: the answer has a grammar.

    Attributes: `tokens` and `entries` of deltas that showed nothing yet, and `num_calls`.
    """

    def __init__(
        self,
        answers: ChatAnswers,
        call: ChatCompletionRequest,
        use: ToolUse,
        tail: str,
        call_ids: Callable[[int], str] = lambda _number: random_call_id(),
        *,
        constrained: bool = False,
    ) -> None:
        self._form, self._use, self._call, self._call_ids = answers.messages, use, call, call_ids
        self._parser: ResponseParser | None = None
        if answers.template is not None:
            reasoning = answers.format.reasoning
            gap = reasoning.end[len(reasoning.end.rstrip()) :] if reasoning is not None and describes_output(call) else None
            self._parser = ResponseParser(
                answers.template,
                tail,
                use.schemas,
                reads_calls=use.choice != "none",
                gap=gap,
                calls_end_reasoning=not constrained,
            )
        self._offsets: list[int] = []
        self._skips = False
        """Whether calls after the first are dropped."""
        self.num_calls = 0
        self.tokens: list[int] = []
        self.entries: list[TokenEntry] = []

    @property
    def reasoning_tokens(self) -> int:
        """The number of tokens so far that begin in reasoning."""
        ranges = self._parser.reasoning if self._parser is not None else []
        return sum(bisect_left(self._offsets, end) - bisect_left(self._offsets, begin) for begin, end in ranges)

    def is_reasoning(self, offset: int) -> bool:
        """Whether the character of this index in the output is reasoning, of what has been read."""
        return any(begin <= offset < end for begin, end in (self._parser.reasoning if self._parser is not None else ()))

    def deltas(self, delta: OutputDelta) -> Iterator[Json]:
        """The parts of a message that an output delta adds, none of them empty."""
        for event in self._events(delta):
            match event:
                case Reasoning(text):
                    yield dict.fromkeys(TEXT_FIELDS["reasoning"], text)
                case Content(text):
                    yield {"content": text}
                case CallBegin(name, id):
                    if self._use.parallel or not self.num_calls:
                        function = {"name": name, "arguments": ""}
                        yield {"tool_calls": [{"index": self.num_calls, **self._identity(name, id), "function": function}]}
                        self.num_calls += 1
                    else:
                        self._skips = True
                case CallArguments(text) if not self._skips:
                    yield {"tool_calls": [{"index": self.num_calls - 1, "function": {"arguments": text}}]}

    def message(self, delta: OutputDelta) -> Json:
        """The whole message of an output in one delta."""
        texts = {"reasoning": "", "content": ""}
        calls: list[Json] = []
        for part in self.deltas(delta):
            for name in texts.keys() & part.keys():
                texts[name] += part[name]
            for call in part.get("tool_calls", ()):
                if "id" in call:
                    calls.append({name: value for name, value in call.items() if name != "index"})
                else:
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        message: Json = {"role": "assistant", "content": texts["content"], "refusal": None}
        if texts["reasoning"]:
            message |= {"reasoning": texts["reasoning"], "reasoning_content": texts["reasoning"]}
        if calls:
            message |= {"content": texts["content"] or None, "tool_calls": calls}
        return message

    def finish_reason(self, delta: OutputDelta) -> str | None:
        """How the choice ended, in the API's words."""
        return "tool_calls" if delta.finish == "stop" and self.num_calls and not self._use.named else delta.finish

    def _events(self, delta: OutputDelta) -> Sequence[Event]:
        if self._parser is None:
            return [Content(delta.text)] if delta.text else []
        self._offsets += delta.offsets
        events = self._parser.feed(delta.text) if delta.text else []
        if delta.finish is not None:
            events += self._parser.finish()
        if not self._call.separate_reasoning:
            events = [Content(event.text) if isinstance(event, Reasoning) else event for event in events]
        elif not self._call.include_reasoning:
            events = [event for event in events if not isinstance(event, Reasoning)]
        return merged(events)

    def _identity(self, name: str, id: str | None) -> Json:
        return {"id": id or call_id(self._form, name, self.num_calls, self._call_ids(self.num_calls)), "type": "function"}


def random_call_id() -> str:
    """The id of a tool call."""
    return f"call_{secrets.token_hex(12)}"
