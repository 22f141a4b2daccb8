"""The JSON shapes of answers and stream chunks, for completions and for chat.

Pure: pieces in, plain JSON values out; never touches sockets or the journal. The streaming order lives here and in
`stream`: an opening chunk per choice where the shape has one, then deltas of which none is empty, then one finish chunk a
choice; every chunk has exactly one choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tpserve.frontend.journal import OpenSequence
from tpserve.frontend.openai.prompts import Prompt
from tpserve.frontend.openai.schema import ChatCall, CompletionCall
from tpserve.text.assembler import Piece, TokenEntry
from tpserve.text.logprobs import chat_logprobs, completion_logprobs
from tpserve.text.tokenizer import Tokenizer
from tpserve.version import __version__

Json = dict[str, Any]
FINGERPRINT = f"tpserve-{__version__}"


@dataclass(frozen=True)
class Head:
    """What all chunks of an answer repeat. `warnings` stand in the answer, or in a stream's first chunk."""

    id: str
    kind: str
    chunk_kind: str
    model: str
    created: int
    warnings: list[str]

    def answer(self, choices: list[Json]) -> Json:
        return self._wrap(self.kind, choices)

    def chunk(self, *choices: Json) -> Json:
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


class Shape(Protocol):
    """One of the two forms of answers."""

    def opening(self) -> list[Json]:
        """Chunks before any token."""

    def deltas(self, index: int, piece: Piece) -> list[Json]:
        """Chunks of one piece of one choice."""

    def answer(self, pieces: Sequence[tuple[int, Piece]]) -> Json:
        """The whole answer of one last piece a choice."""


def usage(prompts: Sequence[Prompt], sequences: Sequence[OpenSequence]) -> Json:
    """Token counts so far. A prompt counts once however many choices it has."""
    prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
    completion_tokens = sum(sequence.assembler.num_tokens for sequence in sequences)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(s.cached_tokens for s in sequences if s.request.choice == 0)},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def end_of(piece: Piece) -> Json:
    return {"finish_reason": piece.finish, "stop_reason": piece.stop_reason}


NOT_ENDED: Json = {"finish_reason": None, "stop_reason": None}


@dataclass(frozen=True)
class CompletionShape:
    """`text_completion`, streamed or not. Choice `index` continues prompt `index // n`."""

    head: Head
    call: CompletionCall
    prompts: Sequence[Prompt]
    tokenizer: Tokenizer
    _prompt_ids_sent: set[int] = field(default_factory=set)

    def opening(self) -> list[Json]:
        if not self.call.echo:
            return []
        return [
            self.head.chunk(self._choice(index, prompt.text, [], []) | NOT_ENDED)
            for index in range(len(self.prompts) * self.call.n)
            if (prompt := self.prompts[index // self.call.n]).text
        ]

    def deltas(self, index: int, piece: Piece) -> list[Json]:
        chunks, tokens, entries = [], piece.tokens, piece.entries
        if piece.text:
            chunks.append(self.head.chunk(self._choice(index, piece.text, tokens, entries) | NOT_ENDED))
            tokens, entries = [], []
        if piece.finish is not None:
            chunks.append(self.head.chunk(self._choice(index, "", tokens, entries) | end_of(piece)))
        return chunks

    def answer(self, pieces: Sequence[tuple[int, Piece]]) -> Json:
        choices = []
        for index, piece in pieces:
            echoed = self.prompts[index // self.call.n].text if self.call.echo else ""
            choices.append(self._choice(index, echoed + piece.text, piece.tokens, piece.entries) | end_of(piece))
        return self.head.answer(choices)

    def _choice(self, index: int, text: str, tokens: list[int], entries: Sequence[TokenEntry]) -> Json:
        shape = completion_logprobs(entries, self.tokenizer) if entries else None
        choice: Json = {"index": index, "text": text, "logprobs": shape}
        if self.call.return_token_ids:
            choice["token_ids"] = tokens
            if index not in self._prompt_ids_sent:
                self._prompt_ids_sent.add(index)
                choice["prompt_token_ids"] = self.prompts[index // self.call.n].ids
        return choice


@dataclass(frozen=True)
class ChatShape:
    """`chat.completion` and its chunks."""

    head: Head
    call: ChatCall
    prompt: Prompt
    tokenizer: Tokenizer

    def opening(self) -> list[Json]:
        chunks = [
            self.head.chunk(
                {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            )
            for index in range(self.call.n)
        ]
        if self.call.return_token_ids:
            chunks[0]["prompt_token_ids"] = self.prompt.ids
        return chunks

    def deltas(self, index: int, piece: Piece) -> list[Json]:
        chunks, tokens, entries = [], piece.tokens, piece.entries
        if piece.text:
            chunks.append(self.head.chunk(self._choice(index, "delta", {"content": piece.text}, tokens, entries) | NOT_ENDED))
            tokens, entries = [], []
        if piece.finish is not None:
            chunks.append(self.head.chunk(self._choice(index, "delta", {}, tokens, entries) | end_of(piece)))
        return chunks

    def answer(self, pieces: Sequence[tuple[int, Piece]]) -> Json:
        choices = []
        for index, piece in pieces:
            message = {"role": "assistant", "content": piece.text, "refusal": None}
            choices.append(self._choice(index, "message", message, piece.tokens, piece.entries) | end_of(piece))
        answer = self.head.answer(choices)
        if self.call.return_token_ids:
            answer["prompt_token_ids"] = self.prompt.ids
        return answer

    def _choice(self, index: int, name: str, message: Json, tokens: list[int], entries: Sequence[TokenEntry]) -> Json:
        shape = chat_logprobs(entries, self.tokenizer) if entries else None
        choice: Json = {"index": index, name: message, "logprobs": shape}
        if self.call.return_token_ids:
            choice["token_ids"] = tokens
        return choice
