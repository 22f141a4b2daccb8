"""Sending an admitted request's answer: whole, or as server-sent events.

Owns the reading of a ticket and the order on the wire. Whatever happens to the client, the ticket is closed on the way out:
a connection that breaks, a handler that is cancelled and an answer that ends all pass through `finally`.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence

import msgspec
from aiohttp import web

from tpserve.errors import UserError
from tpserve.frontend.journal import Journal, Ticket
from tpserve.frontend.openai.errors import error_object, internal_error, json_response
from tpserve.frontend.openai.prompts import Prompt
from tpserve.frontend.openai.schema import StreamOptions
from tpserve.frontend.openai.shapes import Head, Json, Shape, usage

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 10.0
KEEP_ALIVE = b": keep-alive\n\n"
END = b"data: [DONE]\n\n"
SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # proxies hold streams back otherwise
}


async def send_whole(journal: Journal, ticket: Ticket, shape: Shape, head: Head, prompts: Sequence[Prompt]) -> web.Response:
    """Wait for the end of all choices; one JSON answer."""
    try:
        while not ticket.ended:
            await ticket.wait()
        body = shape.answer([(sequence.index, piece) for sequence, piece in ticket.take()])
    finally:
        journal.abort(ticket)
    body["usage"] = usage(prompts, ticket.sequences)
    if head.warnings:
        body["warnings"] = head.warnings
    return json_response(body)


async def send_stream(
    request: web.Request,
    journal: Journal,
    ticket: Ticket,
    shape: Shape,
    head: Head,
    prompts: Sequence[Prompt],
    options: StreamOptions,
) -> web.StreamResponse:
    """Write the events as they come. After the first byte a failure can only be an event, followed by the end."""
    response = web.StreamResponse(headers=SSE_HEADERS)
    try:
        await response.prepare(request)
        try:
            async for data in events(ticket, shape, head, prompts, options):
                await response.write(data)
        except UserError as error:
            await response.write(event(error_object(error)) + END)
        except ConnectionError:
            raise
        except Exception:  # the edge: the status line is sent, the stream must still end in words
            log.exception("the stream of request %s failed", head.id)
            await response.write(event(error_object(internal_error(head.id))) + END)
        await response.write_eof()
    except ConnectionError:
        log.debug("the client of request %s left", head.id)
    finally:
        journal.abort(ticket)
    return response


async def events(
    ticket: Ticket, shape: Shape, head: Head, prompts: Sequence[Prompt], options: StreamOptions
) -> AsyncIterator[bytes]:
    """Everything a stream says, in order; a keep-alive comment for each time without news. Raises the ticket's failure."""

    def stamped(chunks: Sequence[Json]) -> bytes:
        if chunks and warnings:
            chunks[0]["warnings"] = warnings.copy()
            warnings.clear()
        if options.continuous_usage_stats:
            now = usage(prompts, ticket.sequences)
            return b"".join(event(chunk | {"usage": now}) for chunk in chunks)
        if options.include_usage:
            return b"".join(event(chunk | {"usage": None}) for chunk in chunks)
        return b"".join(event(chunk) for chunk in chunks)

    warnings, ended = list(head.warnings), False
    if opening := shape.opening():
        yield stamped(opening)
    while not ended:
        try:
            async with asyncio.timeout(KEEP_ALIVE_S):
                await ticket.wait()
        except TimeoutError:
            yield KEEP_ALIVE
            continue
        ended = ticket.ended
        chunks = [chunk for sequence, piece in ticket.take() for chunk in shape.deltas(sequence.index, piece)]
        if chunks:
            yield stamped(chunks)
    if options.include_usage:
        yield event(head.chunk() | {"usage": usage(prompts, ticket.sequences)})
    yield END


def event(value: Json) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
