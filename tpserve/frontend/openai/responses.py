"""Sends the response of an admitted request: whole, or as server-sent events.

Owns the reading of a handle and the order of a stream. Invariant: every exit aborts what is left of the handle, by `finally`: the
end of the response, a broken connection and a cancelled handler.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial

import msgspec
from aiohttp import web

from tpserve.engine_client.requests import RequestHandle, RequestTable
from tpserve.errors import UserError
from tpserve.frontend.openai.errors import Json, error_object, internal_error
from tpserve.frontend.openai.prompts import Prompt, in_thread
from tpserve.frontend.openai.response_builder import ResponseBuilder, ResponseMeta, usage
from tpserve.frontend.openai.schema import StreamOptions
from tpserve.text.assembler import OutputDelta

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 10.0
KEEP_ALIVE_COMMENT = b": keep-alive\n\n"
END = b"data: [DONE]\n\n"
SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # otherwise proxies buffer streams
}


async def send_whole(
    request_table: RequestTable, handle: RequestHandle, builder: ResponseBuilder, meta: ResponseMeta, prompts: Sequence[Prompt]
) -> web.Response:
    """Wait for the end of all choices and send one JSON response. UserError when the request fails."""
    try:
        while not handle.ended:
            await handle.wait()
        deltas = [(sequence.index, delta) for sequence, delta in handle.take()]
    finally:
        request_table.abort(handle)

    def encode() -> bytes:
        answer = builder.answer(deltas)
        answer["usage"] = usage(prompts, handle.sequences, builder.reasoning_tokens)
        if meta.warnings:
            answer["warnings"] = meta.warnings
        return msgspec.json.encode(answer)

    body = await in_thread(encode, num_values(deltas))
    return web.Response(body=body, content_type="application/json")


async def send_stream(
    request: web.Request,
    request_table: RequestTable,
    handle: RequestHandle,
    builder: ResponseBuilder,
    meta: ResponseMeta,
    prompts: Sequence[Prompt],
    options: StreamOptions,
) -> web.StreamResponse:
    """Send events as output arrives. A failure after the first byte becomes an event, followed by the end of the stream."""
    response = web.StreamResponse(headers=SSE_HEADERS)
    try:
        await response.prepare(request)
        try:
            async with aclosing(events(handle, builder, meta, prompts, options)) as stream:
                async for data in stream:
                    await response.write(data)
        except UserError as error:
            await response.write(event(error_object(error)) + END)
        except ConnectionError:
            raise
        except Exception:  # a defect of the server: the status line is sent, so the error is an event
            log.exception("the stream of request %s failed", meta.id)
            await response.write(event(error_object(internal_error(meta.id))) + END)
        await response.write_eof()
    except ConnectionError:
        log.debug("the client of request %s left", meta.id)
    finally:
        request_table.abort(handle)
    return response


async def events(
    handle: RequestHandle, builder: ResponseBuilder, meta: ResponseMeta, prompts: Sequence[Prompt], options: StreamOptions
) -> AsyncGenerator[bytes, None]:
    """The bytes of a stream, with a keep-alive comment after every `KEEP_ALIVE_S` without output. Raises the handle's failure."""

    def to_events(chunks: Sequence[Json]) -> bytes:
        if chunks and warnings:
            chunks[0]["warnings"] = warnings.copy()
            warnings.clear()
        if options.continuous_usage_stats:
            now = usage(prompts, handle.sequences, builder.reasoning_tokens)
            return b"".join(event(chunk | {"usage": now}) for chunk in chunks)
        if options.include_usage:
            return b"".join(event(chunk | {"usage": None}) for chunk in chunks)
        return b"".join(event(chunk) for chunk in chunks)

    def encode(deltas: Sequence[tuple[int, OutputDelta]]) -> bytes:
        return to_events([chunk for index, delta in deltas for chunk in builder.deltas(index, delta)])

    warnings, ended = list(meta.warnings), False
    if opening := builder.opening():
        yield to_events(opening)
    with IdleTimer(KEEP_ALIVE_S, handle.wake) as idle:
        while not ended:
            await handle.wait()
            ended = handle.ended
            deltas = [(sequence.index, delta) for sequence, delta in handle.take()]
            if data := await in_thread(partial(encode, deltas), num_values(deltas)):
                idle.restart()
                yield data
            elif idle.due():
                yield KEEP_ALIVE_COMMENT
    if options.include_usage:
        yield event(meta.chunk() | {"usage": usage(prompts, handle.sequences, builder.reasoning_tokens)})
    yield END


class IdleTimer:
    """Calls `wake` whenever `seconds` have passed since the last `restart`, which costs no more than a look at the clock: a token
    restarts it, and the event loop's timer moves only when it fires."""

    def __init__(self, seconds: float, wake: Callable[[], None]) -> None:
        self._seconds, self._wake = seconds, wake
        self._loop = asyncio.get_running_loop()
        self._since_s, self._due = self._loop.time(), False

    def __enter__(self) -> "IdleTimer":
        self._timer = self._loop.call_at(self._since_s + self._seconds, self._fire)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def restart(self) -> None:
        """The time runs from now on."""
        self._since_s, self._due = self._loop.time(), False

    def due(self) -> bool:
        """Whether the time has passed since the last restart or the last call that said so."""
        due, self._due = self._due, False
        return due

    def _fire(self) -> None:
        if self._loop.time() >= self._since_s + self._seconds:
            self._since_s, self._due = self._loop.time(), True
            self._wake()
        self._timer = self._loop.call_at(self._since_s + self._seconds, self._fire)


def num_values(deltas: Sequence[tuple[int, OutputDelta]]) -> int:
    """A measure of the time to make JSON of deltas: the number of log probabilities, and of text that a parser reads."""
    outputs = sum(len(entry.logprobs.top) + 1 for _, delta in deltas for entry in delta.entries if entry.logprobs)
    outputs += sum(len(delta.text) for _, delta in deltas) // 4
    return outputs + sum(delta.scores.num_values for _, delta in deltas if delta.scores is not None)


def event(value: Json) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
