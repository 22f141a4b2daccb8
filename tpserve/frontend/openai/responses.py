"""Sends the response of an admitted request: whole, or as server-sent events.

Owns the reading of a handle and the order of a stream. Invariant: every exit aborts what is left of the handle, by `finally`: the
end of the response, a broken connection and a cancelled handler. `resumable` sends the answers that outlive a connection.
"""

import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from functools import partial

import msgspec
from aiohttp import web

from tpserve.engine_client.requests import RequestHandle, RequestState, RequestTable
from tpserve.errors import UserError
from tpserve.frontend.openai.errors import Json, error_object, internal_error
from tpserve.frontend.openai.preparation import PreparedRequest
from tpserve.frontend.openai.prompts import in_thread
from tpserve.frontend.openai.response_builder import UsageCounter
from tpserve.frontend.openai.schema import StreamOptions
from tpserve.frontend.openai.sse import END, KEEP_ALIVE_COMMENT, SSE_HEADERS, IdleTimer, event
from tpserve.text.assembler import OutputDelta

log = logging.getLogger(__name__)

Output = tuple[RequestState, OutputDelta]


async def whole_answer(handle: RequestHandle, prepared: PreparedRequest) -> bytes:
    """Wait for the end of all choices; returns the JSON of the answer. UserError when the request fails."""
    while not handle.ended:
        await handle.wait()
    outputs = handle.take()

    def encode() -> bytes:
        counter = UsageCounter(prepared.prompts, prepared.builder)
        for sequence, delta in outputs:
            counter.add(sequence, delta)
        answer = prepared.builder.answer([(sequence.index, delta) for sequence, delta in outputs])
        answer["usage"] = counter.usage()
        if prepared.meta.warnings:
            answer["warnings"] = prepared.meta.warnings
        return msgspec.json.encode(answer)

    return await in_thread(encode, num_values(outputs))


async def send_whole(request_table: RequestTable, handle: RequestHandle, prepared: PreparedRequest) -> web.Response:
    """Send one JSON response at the end of all choices. UserError when the request fails."""
    try:
        return web.Response(body=await whole_answer(handle, prepared), content_type="application/json")
    finally:
        request_table.abort(handle)


async def send_stream(
    request: web.Request, request_table: RequestTable, handle: RequestHandle, prepared: PreparedRequest
) -> web.StreamResponse:
    """Send events as output arrives. A failure after the first byte becomes an event, followed by the end of the stream."""
    response = web.StreamResponse(headers=SSE_HEADERS)
    try:
        await response.prepare(request)
        try:
            async with aclosing(events(handle, prepared)) as stream:
                async for data in stream:
                    await response.write(data)
        except UserError as error:
            await response.write(event(error_object(error)) + END)
        except ConnectionError:
            raise
        except Exception:  # a defect of the server: the status line is sent, so the error is an event
            log.exception("the stream of request %s failed", prepared.meta.id)
            await response.write(event(error_object(internal_error(prepared.meta.id))) + END)
        await response.write_eof()
    except ConnectionError:
        log.debug("the client of request %s left", prepared.meta.id)
    finally:
        request_table.abort(handle)
    return response


async def events(handle: RequestHandle, prepared: PreparedRequest) -> AsyncGenerator[bytes, None]:
    """The bytes of a stream, with a keep-alive comment after every `KEEP_ALIVE_S` without output. Raises the handle's failure."""
    encoder, ended = EventEncoder(prepared), False
    if opening := b"".join(encoder.opening()):
        yield opening
    with IdleTimer(handle.wake) as idle:
        while not ended:
            await handle.wait()
            ended = handle.ended
            outputs = handle.take()
            if data := await in_thread(partial(encoder.joined, outputs), num_values(outputs)):
                idle.restart()
                yield data
            elif idle.due():
                yield KEEP_ALIVE_COMMENT
    yield b"".join(encoder.closing())


class EventEncoder:
    """The events of a stream, in order: `opening`, those of the `deltas`, `closing`."""

    def __init__(self, prepared: PreparedRequest) -> None:
        self._meta, self._builder = prepared.meta, prepared.builder
        self._options = prepared.call.stream_options or StreamOptions()
        self._warnings = list(prepared.meta.warnings)
        self._counter = UsageCounter(prepared.prompts, prepared.builder)

    @property
    def output_tokens(self) -> int:
        """The number of output tokens, of all choices, in the deltas so far."""
        return self._counter.output_tokens

    def opening(self) -> list[bytes]:
        """The events before any token."""
        return list(self._events(self._builder.opening()))

    def deltas(self, sequence: RequestState, delta: OutputDelta) -> list[bytes]:
        """The events of one delta, perhaps none."""
        self._counter.add(sequence, delta)
        return list(self._events(self._builder.deltas(sequence.index, delta)))

    def joined(self, outputs: Sequence[Output]) -> bytes:
        """The events of several deltas as one text."""
        return b"".join(data for sequence, delta in outputs for data in self.deltas(sequence, delta))

    def closing(self) -> list[bytes]:
        """The events after the end of all choices."""
        if self._options.include_usage:
            return [event(self._meta.chunk() | {"usage": self._counter.usage()}), END]
        return [END]

    def _events(self, chunks: Sequence[Json]) -> Iterator[bytes]:
        if chunks and self._warnings:
            chunks[0]["warnings"] = self._warnings
            self._warnings = []
        for chunk in chunks:
            if self._options.continuous_usage_stats:
                yield event(chunk | {"usage": self._counter.usage()})
            else:
                yield event(chunk | {"usage": None} if self._options.include_usage else chunk)


def num_values(outputs: Sequence[Output]) -> int:
    """A measure of the time to make JSON of deltas: the number of log probabilities, and of text that a parser reads."""
    values = sum(len(entry.logprobs.top) + 1 for _, delta in outputs for entry in delta.entries if entry.logprobs)
    values += sum(len(delta.text) for _, delta in outputs) // 4
    return values + sum(delta.scores.num_values for _, delta in outputs if delta.scores is not None)
