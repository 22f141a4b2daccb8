"""The JSON forms of responses and stream chunks, for completions and for chat completions.

Pure: output deltas in, JSON values out; never touches sockets or the request table. Together with `responses.events` this defines
the order of a stream: the opening chunks, then deltas, the last of each choice with its finish. Every chunk has one choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import msgspec

from tpserve.engine_client.requests import RequestState
from tpserve.frontend.openai.chat_answer import TEXT_FIELDS, AnswerReader
from tpserve.frontend.openai.errors import Json
from tpserve.frontend.openai.prompts import Prompt
from tpserve.frontend.openai.schema import ChatCompletionRequest, CompletionRequest
from tpserve.text.assembler import OutputDelta
from tpserve.text.logprob_entries import PromptScores, TokenEntry
from tpserve.text.logprobs import as_id, chat_logprobs, completion_logprobs, likeliest, prompt_logprobs, spelled
from tpserve.text.tokenizer import Tokenizer
from tpserve.version import __version__

FINGERPRINT = f"tpserve-{__version__}"
TOKENS_AT_ONCE = 128
"""Tokens of a scored prompt in one event of a stream, or encoded at a time. With 20 top log probabilities each, an event has
about 90 KB; aiohttp's client reads lines up to 128 KB."""


@dataclass(frozen=True)
class ResponseMeta:
    """The fields that all chunks of a response repeat. `warnings` are in the response, or in a stream's first chunk."""

    id: str
    kind: str
    chunk_kind: str
    model: str
    created: int
    warnings: list[str]

    def answer(self, choices: list[Json]) -> Json:
        """A whole response."""
        return self._wrap(self.kind, choices)

    def chunk(self, *choices: Json) -> Json:
        """A chunk of a stream."""
        return self._wrap(self.chunk_kind, list(choices))

    def _wrap(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        }


class TextDelta(NamedTuple):
    """A chunk that adds text to a choice and shows nothing else. `kind`: the field of the text."""

    choice: int
    kind: str
    text: str


class ResponseBuilder(Protocol):
    """The form of a response: completion or chat completion."""

    def opening(self) -> list[Json]:
        """The chunks before any token."""

    def deltas(self, index: int, delta: OutputDelta) -> list[Json | TextDelta]:
        """The chunks of one delta of one choice."""

    def text_chunk(self, delta: TextDelta) -> Json:
        """The chunk of a `TextDelta`."""

    def answer(self, outputs: Sequence[tuple[int, OutputDelta]]) -> Json:
        """The whole response, from one final delta per choice."""

    @property
    def reasoning_tokens(self) -> int:
        """The number of output tokens so far that are reasoning."""


class UsageCounter:
    """Token counts of the deltas so far. A prompt counts once for all its choices."""

    def __init__(self, prompts: Sequence[Prompt], builder: ResponseBuilder) -> None:
        self._prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        self._builder = builder
        self._tokens: dict[int, int] = {}
        self._cached: dict[int, int] = {}
        self.output_tokens = 0

    def add(self, sequence: RequestState, delta: OutputDelta) -> None:
        """Count a delta."""
        self.output_tokens += delta.num_tokens - self._tokens.get(sequence.index, 0)
        self._tokens[sequence.index] = delta.num_tokens
        if sequence.request.choice == 0:
            self._cached[sequence.index] = sequence.cached_tokens

    def usage(self) -> Json:
        """The counts as the API shows them."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self._prompt_tokens + self.output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
            "completion_tokens_details": {"reasoning_tokens": self._builder.reasoning_tokens},
        }


def finish_fields(delta: OutputDelta) -> Json:
    """The fields of a choice that has ended."""
    return {"finish_reason": delta.finish, "stop_reason": delta.stop_reason}


def encoded_prompt_logprobs(scores: PromptScores, num_top: int, tokenizer: Tokenizer) -> msgspec.Raw:
    """`prompt_logprobs` in vLLM's form. Encoded in parts, since Python objects need ten times the memory."""
    begins = range(0, len(scores.ids), TOKENS_AT_ONCE)
    runs = (range(begin, min(begin + TOKENS_AT_ONCE, len(scores.ids))) for begin in begins)
    parts = (msgspec.json.encode(prompt_logprobs(scores, run, num_top, tokenizer))[1:-1] for run in runs)
    return msgspec.Raw(b"[" + b",".join(parts) + b"]")


NOT_ENDED: Json = {"finish_reason": None, "stop_reason": None}
NO_IDS: Json = {"token_ids": None, "prompt_token_ids": None}
"""Of a choice whose ids nobody has asked for; clients written for vLLM read them."""


@dataclass(frozen=True)
class CompletionResponseBuilder:
    """`text_completion`, streamed or not. Choice `index` belongs to prompt `index // n`; of `best_of` the likeliest n stay."""

    meta: ResponseMeta
    call: CompletionRequest
    prompts: Sequence[Prompt]
    tokenizer: Tokenizer
    reasoning_tokens: int = 0
    _prompt_ids_sent: set[int] = field(default_factory=set)

    def opening(self) -> list[Json]:
        if not self.call.echo or self.call.logprobs is not None:  # an echo with logprobs waits for them
            return []
        return [
            self.meta.chunk(self._choice(index, prompt.text, [], None) | NOT_ENDED)
            for index in range(len(self.prompts) * self.call.n)
            if (prompt := self._prompt(index)).text
        ]

    def deltas(self, index: int, delta: OutputDelta) -> list[Json | TextDelta]:
        chunks: list[Json | TextDelta] = [] if delta.scores is None else [*self._echo(index, delta.scores)]
        tokens, logprobs = delta.tokens, self._logprobs(index, delta)
        if delta.text and delta.finish is None and logprobs is None and not self.call.return_token_ids:
            chunks.append(TextDelta(index, "text", delta.text))
        elif delta.text or delta.finish is not None:
            ending = NOT_ENDED if delta.finish is None else finish_fields(delta)
            chunks.append(self.meta.chunk(self._choice(index, delta.text, tokens, logprobs) | ending))
        return chunks

    def text_chunk(self, delta: TextDelta) -> Json:
        return self.meta.chunk(self._choice(delta.choice, delta.text, [], None) | NOT_ENDED)

    def answer(self, outputs: Sequence[tuple[int, OutputDelta]]) -> Json:
        call, choices = self.call, list[Json]()
        for number, prompt in enumerate(self.prompts):
            drawn = [delta for _, delta in outputs[number * call.num_drawn : (number + 1) * call.num_drawn]]
            echoed, scores, extra = None, drawn[0].scores, Json(prompt_logprobs=None)
            if scores is not None and call.num_echoed is not None:
                entries = scores.entries(self.tokenizer, prompt.text, call.num_echoed, prompt.num_open)
                echoed = completion_logprobs(entries, self._spell)
            if scores is not None and call.prompt_logprobs is not None:
                extra = {"prompt_logprobs": encoded_prompt_logprobs(scores, call.prompt_logprobs, self.tokenizer)}
            for delta in drawn if call.n == call.num_drawn else likeliest(drawn, call.n):
                index, text = len(choices), prompt.text + delta.text if call.echo else delta.text
                logprobs = self._logprobs(index, delta)
                if echoed is not None:
                    logprobs = {name: values + logprobs[name] for name, values in echoed.items()} if logprobs else echoed
                choices.append(NO_IDS | self._choice(index, text, delta.tokens, logprobs) | finish_fields(delta) | extra)
        return self.meta.answer(choices)

    def _spell(self, token: int) -> str:
        return as_id(token) if self.call.return_tokens_as_token_ids else spelled(token, self.tokenizer)

    def _prompt(self, index: int) -> Prompt:
        return self.prompts[index // self.call.n]

    def _logprobs(self, index: int, delta: OutputDelta) -> Json | None:
        if self.call.logprobs is None:  # the engine sends them for `best_of` too
            return None
        entries, prompt = delta.entries, self._prompt(index)
        if delta.scores is not None and self.call.num_echoed is not None:
            entries = delta.scores.open_entries(delta.open_offsets, self.call.num_echoed) + entries
        if not entries:
            return None
        return completion_logprobs(entries, self._spell, len(prompt.text) if self.call.echo else 0)

    def _echo(self, index: int, scores: PromptScores) -> list[Json]:
        """The chunks of an echoed prompt with its log probabilities, each short enough for a line."""
        text, chunks = self._prompt(index).text, list[Json]()
        entries = scores.entries(self.tokenizer, text, self.call.num_echoed or 0, self._prompt(index).num_open)
        for begin in range(0, len(entries), TOKENS_AT_ONCE):
            end = begin + TOKENS_AT_ONCE
            part = entries[begin:end]
            shown = text[part[0].offset : entries[end].offset if end < len(entries) else len(text)]
            chunks.append(self.meta.chunk(self._choice(index, shown, [], completion_logprobs(part, self._spell)) | NOT_ENDED))
        return chunks

    def _choice(self, index: int, text: str, tokens: list[int], logprobs: Json | None) -> Json:
        choice: Json = {"index": index, "text": text, "logprobs": logprobs}
        if self.call.return_token_ids:
            choice["token_ids"] = tokens
            if index not in self._prompt_ids_sent:
                self._prompt_ids_sent.add(index)
                choice["prompt_token_ids"] = self._prompt(index).ids
        return choice


@dataclass(frozen=True)
class ChatResponseBuilder:
    """`chat.completion` and its chunks. `readers`: of each choice."""

    meta: ResponseMeta
    call: ChatCompletionRequest
    prompt: Prompt
    tokenizer: Tokenizer
    readers: Sequence[AnswerReader]

    def opening(self) -> list[Json]:
        chunks = [
            self.meta.chunk(
                {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            )
            for index in range(self.call.n)
        ]
        if self.call.return_token_ids:
            chunks[0]["prompt_token_ids"] = self.prompt.ids
        return chunks

    def deltas(self, index: int, delta: OutputDelta) -> list[Json | TextDelta]:
        chunks, reader = list[Json | TextDelta](), self.readers[index]
        tokens, entries = [*reader.tokens, *delta.tokens], [*reader.entries, *delta.entries]
        parts = list(reader.deltas(delta)) or ([] if delta.finish is None else [Json()])
        for number, part in enumerate(parts, 1):
            kind, ends = next(iter(part), ""), delta.finish is not None and number == len(parts)
            if kind in TEXT_FIELDS and not entries and not self.call.return_token_ids and not ends:
                chunks.append(TextDelta(index, kind, part[kind]))
            else:
                ending = finish_fields(delta) | {"finish_reason": reader.finish_reason(delta)} if ends else NOT_ENDED
                chunks.append(self.meta.chunk(self._choice(index, "delta", part, tokens, entries) | ending))
            tokens, entries = [], []
        reader.tokens, reader.entries = tokens, entries
        return chunks

    def text_chunk(self, delta: TextDelta) -> Json:
        part = dict.fromkeys(TEXT_FIELDS[delta.kind], delta.text)
        return self.meta.chunk(self._choice(delta.choice, "delta", part, [], []) | NOT_ENDED)

    def answer(self, outputs: Sequence[tuple[int, OutputDelta]]) -> Json:
        choices = []
        for index, delta in outputs:
            message = self.readers[index].message(delta)
            ending = finish_fields(delta) | {"finish_reason": self.readers[index].finish_reason(delta)}
            choices.append({"token_ids": None} | self._choice(index, "message", message, delta.tokens, delta.entries) | ending)
        answer, scores = self.meta.answer(choices), outputs[0][1].scores
        answer |= {"prompt_token_ids": self.prompt.ids if self.call.return_token_ids else None, "prompt_logprobs": None}
        if scores is not None and self.call.prompt_logprobs is not None:
            answer["prompt_logprobs"] = encoded_prompt_logprobs(scores, self.call.prompt_logprobs, self.tokenizer)
        return answer

    @property
    def reasoning_tokens(self) -> int:
        return sum(reader.reasoning_tokens for reader in self.readers)

    def _choice(self, index: int, name: str, message: Json, tokens: list[int], entries: Sequence[TokenEntry]) -> Json:
        spell = as_id if self.call.return_tokens_as_token_ids else None
        shape = chat_logprobs(entries, self.tokenizer, spell) if entries else None
        choice: Json = {"index": index, name: message, "logprobs": shape}
        if self.call.return_token_ids:
            choice["token_ids"] = tokens
        return choice
