"""What makes the bytes of an answer out of the outputs of its sequences: JSON of the whole answer, or the events of a stream.

`AnswerEncoder` is what each API brings; `ChunkEncoder` is that of completions and chat completions. Pure: never touches sockets.
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from tpserve.engine_client.requests import RequestState
from tpserve.errors import UserError
from tpserve.frontend.openai.errors import Json, error_object
from tpserve.frontend.openai.prompts import Prompt
from tpserve.frontend.openai.response_builder import ResponseBuilder, ResponseMeta, TextDelta, UsageCounter
from tpserve.frontend.openai.schema import StreamOptions
from tpserve.frontend.openai.sse import END, event
from tpserve.text.assembler import OutputDelta

Output = tuple[RequestState, OutputDelta]
TIMES = ("time_to_first_token_ms", "generation_time_ms", "queue_time_ms", "mean_itl_ms", "tokens_per_second")
"""The members of `metrics`."""
MARK = "\0text\0"
"""Stands for the text where the bytes around it are found out; no other field can have it."""
encode = msgspec.json.Encoder().encode
ENCODED_MARK = encode(MARK)


class AnswerEncoder(Protocol):
    """One answer: `whole`, or the events `opening`, `deltas` of each output, and `closing` or `failed`."""

    @property
    def output_tokens(self) -> int:
        """The number of output tokens, of all choices, in the deltas so far."""

    def opening(self) -> list[bytes]:
        """The events before any token."""

    def deltas(self, sequence: RequestState, delta: OutputDelta) -> list[bytes]:
        """The events of one delta, perhaps none."""

    def closing(self) -> list[bytes]:
        """The events after the end of all choices."""

    def failed(self, error: UserError, num_events: int | None = None) -> list[bytes]:
        """The events that end a stream with an error. `num_events`: those that readers have; None for all."""

    def whole(self, outputs: Sequence[Output]) -> bytes:
        """The JSON of the whole answer, from one final delta or all deltas of each choice."""

    def body(self) -> bytes:
        """The JSON of the answer as far as it is, where an API shows it beside the events; else empty."""


class ChunkEncoder:
    """An answer of completions or chat completions. A stream is chunks, and ends with [DONE]."""

    def __init__(
        self,
        builder: ResponseBuilder,
        meta: ResponseMeta,
        prompts: Sequence[Prompt],
        options: StreamOptions | None,
        *,
        shows_times: bool = False,
    ) -> None:
        """`shows_times`: of the one choice that there is."""
        self._meta, self._builder = meta, builder
        self._options = options or StreamOptions()
        self._counts = self._options.include_usage and self._options.continuous_usage_stats
        """Whether every chunk has the counts so far."""
        self._warnings = list(meta.warnings)
        self._frames: dict[tuple[int, str], list[bytes]] = {}
        """The bytes around the text of an event, by choice and field."""
        self._counter = UsageCounter(prompts, builder)
        self._shows_times = shows_times
        self._sequence: RequestState | None = None

    @property
    def output_tokens(self) -> int:
        return self._counter.output_tokens

    def opening(self) -> list[bytes]:
        return [self._event(chunk) for chunk in self._builder.opening()]

    def deltas(self, sequence: RequestState, delta: OutputDelta) -> list[bytes]:
        self._counter.add(sequence, delta)
        self._sequence = sequence
        chunks = self._builder.deltas(sequence.index, delta)
        return [self._text_event(chunk) if isinstance(chunk, TextDelta) else self._event(chunk) for chunk in chunks]

    def closing(self) -> list[bytes]:
        if self._options.include_usage:
            return [event(self._meta.chunk() | {"usage": self._counter.usage()} | self._times()), END]
        return [END]

    def failed(self, error: UserError, num_events: int | None = None) -> list[bytes]:
        return [event(error_object(error)), END]

    def whole(self, outputs: Sequence[Output]) -> bytes:
        for sequence, delta in outputs:
            self._counter.add(sequence, delta)
            self._sequence = sequence
        answer = self._builder.answer([(sequence.index, delta) for sequence, delta in outputs])
        answer |= {"usage": self._counter.usage()} | self._times()
        if self._meta.warnings:
            answer["warnings"] = self._meta.warnings
        return msgspec.json.encode(answer)

    def body(self) -> bytes:
        return b""

    def _times(self) -> Json:
        return {"metrics": times_of(self._sequence)} if self._shows_times and self._sequence is not None else {}

    def _text_event(self, delta: TextDelta) -> bytes:
        """The event of a chunk whose bytes do not change but for its text, as most do: ten times as fast as a value's."""
        choice, kind, text = delta
        if self._warnings or self._counts:
            return self._event(self._builder.text_chunk(delta))
        if (frame := self._frames.get((choice, kind))) is None:
            marked = self._event(self._builder.text_chunk(delta._replace(text=MARK)))
            frame = self._frames[choice, kind] = marked.split(ENCODED_MARK)
        return encode(text).join(frame)

    def _event(self, chunk: Json) -> bytes:
        if self._warnings:
            chunk["warnings"] = self._warnings
            self._warnings = []
        if not self._options.include_usage:
            return event(chunk)
        return event(chunk | {"usage": self._counter.usage() if self._counts else None})


def times_of(sequence: RequestState) -> Json:
    """The times of a sequence in milliseconds, named as vLLM does; null without the tokens that they are of."""
    times_s, num_tokens = sequence.token_s, sequence.assembler.num_tokens
    if not times_s:
        return dict.fromkeys(TIMES)
    prefill_s, decode_s = times_s[0] - sequence.arrived_s - sequence.queue_s, times_s[-1] - times_s[0]
    itl_s = decode_s / (num_tokens - 1) if num_tokens > 1 else None
    rate = num_tokens / (prefill_s + decode_s) if prefill_s + decode_s > 0 else None
    values = (1000 * prefill_s, 1000 * decode_s, 1000 * sequence.queue_s, None if itl_s is None else 1000 * itl_s, rate)
    return dict(zip(TIMES, values, strict=True))
