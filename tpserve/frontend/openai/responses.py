"""Sending an admitted request's answer: whole, or as server-sent events.

Owns the reading of a handle and the order on the wire. Whatever happens to the client, the handle is closed on the way out:
a connection that breaks, a handler that is cancelled and an answer that ends all pass through `finally`.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from functools import partial

import msgspec
from aiohttp import web

from tpserve.engine_client.requests import RequestHandle, RequestTable
from tpserve.errors import UserError
from tpserve.frontend.openai.errors import error_object, internal_error
from tpserve.frontend.openai.prompts import Prompt, in_thread
from tpserve.frontend.openai.response_builder import Json, ResponseBuilder, ResponseMeta, usage
from tpserve.frontend.openai.schema import StreamOptions
from tpserve.text.assembler import OutputDelta

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 10.0
KEEP_ALIVE = b": keep-alive\n\n"
END = b"data: [DONE]\n\n"
SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # proxies hold streams back otherwise
}


async def send_whole(
    request_table: RequestTable, handle: RequestHandle, builder: ResponseBuilder, meta: ResponseMeta, prompts: Sequence[Prompt]
) -> web.Response:
    """Wait for the end of all choices; one JSON answer."""
    try:
        while not handle.ended:
            await handle.wait()
        pieces = [(sequence.index, delta) for sequence, delta in handle.take()]
    finally:
        request_table.abort(handle)
    facts: Json = {"usage": usage(prompts, handle.sequences)}
    if meta.warnings:
        facts["warnings"] = meta.warnings
    body = await in_thread(lambda: msgspec.json.encode(builder.answer(pieces) | facts), num_values(pieces))
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
    """Write the events as they come. After the first byte a failure can only be an event, followed by the end."""
    response = web.StreamResponse(headers=SSE_HEADERS)
    try:
        await response.prepare(request)
        try:
            async for data in events(handle, builder, meta, prompts, options):
                await response.write(data)
        except UserError as error:
            await response.write(event(error_object(error)) + END)
        except ConnectionError:
            raise
        except Exception:  # the edge: the status line is sent, the stream must still end in words
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
) -> AsyncIterator[bytes]:
    """Everything a stream says, in order; a keep-alive comment for each time without news. Raises the handle's failure."""

    def stamped(chunks: Sequence[Json]) -> bytes:
        if chunks and warnings:
            chunks[0]["warnings"] = warnings.copy()
            warnings.clear()
        if options.continuous_usage_stats:
            now = usage(prompts, handle.sequences)
            return b"".join(event(chunk | {"usage": now}) for chunk in chunks)
        if options.include_usage:
            return b"".join(event(chunk | {"usage": None}) for chunk in chunks)
        return b"".join(event(chunk) for chunk in chunks)

    def told(pieces: Sequence[tuple[int, OutputDelta]]) -> bytes:
        return stamped([chunk for index, delta in pieces for chunk in builder.deltas(index, delta)])

    warnings, ended = list(meta.warnings), False
    if opening := builder.opening():
        yield stamped(opening)
    while not ended:
        try:
            async with asyncio.timeout(KEEP_ALIVE_S):
                await handle.wait()
        except TimeoutError:
            yield KEEP_ALIVE
            continue
        ended = handle.ended
        pieces = [(sequence.index, delta) for sequence, delta in handle.take()]
        if data := await in_thread(partial(told, pieces), num_values(pieces)):
            yield data
    if options.include_usage:
        yield event(meta.chunk() | {"usage": usage(prompts, handle.sequences)})
    yield END


def num_values(pieces: Sequence[tuple[int, OutputDelta]]) -> int:
    """Log probabilities to show, by which one knows how long the JSON takes."""
    outputs = sum(len(entry.logprobs.top) + 1 for _, delta in pieces for entry in delta.entries if entry.logprobs)
    return outputs + sum(delta.scores.num_values for _, delta in pieces if delta.scores is not None)


def event(value: Json) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
