"""Sends the response of an admitted request: whole, or as server-sent events.

Owns the reading of a handle and the order of a stream. Invariant: every exit aborts what is left of the handle, by `finally`: the
end of the response, a broken connection and a cancelled handler. `resumable` sends the answers that outlive a connection.
"""

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial

from aiohttp import web

from tpserve.engine_client.recovery import SEAMLESS
from tpserve.engine_client.requests import RequestHandle, RequestTable
from tpserve.errors import UserError
from tpserve.frontend.openai.encoder import Output
from tpserve.frontend.openai.errors import internal_error
from tpserve.frontend.openai.preparation import PreparedRequest
from tpserve.frontend.openai.prompts import in_thread
from tpserve.frontend.openai.sse import KEEP_ALIVE_COMMENT, SSE_HEADERS, IdleTimer

log = logging.getLogger(__name__)

RESUMPTION = "X-Resumption"


async def whole_answer(handle: RequestHandle, prepared: PreparedRequest) -> bytes:
    """Wait for the end of all choices; returns the JSON of the answer. UserError when the request fails."""
    while not handle.ended:
        await handle.wait()
    outputs = handle.take()

    return await in_thread(partial(prepared.encoder.whole, outputs), num_values(outputs))


async def send_whole(request_table: RequestTable, handle: RequestHandle, prepared: PreparedRequest) -> web.Response:
    """Send one JSON response at the end of all choices. UserError when the request fails."""
    try:
        body = await whole_answer(handle, prepared)
        headers = {RESUMPTION: SEAMLESS} if handle.of_other_weights else None
        return web.Response(body=body, headers=headers, content_type="application/json")
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
            await response.write(b"".join(prepared.encoder.failed(error)))
        except ConnectionError:
            raise
        except Exception:  # a defect of the server: the status line is sent, so the error is an event
            log.exception("the stream of request %s failed", prepared.meta.id)
            await response.write(b"".join(prepared.encoder.failed(internal_error(prepared.meta.id))))
        await response.write_eof()
    except ConnectionError:
        log.debug("the client of request %s left", prepared.meta.id)
    finally:
        request_table.abort(handle)
    return response


async def events(handle: RequestHandle, prepared: PreparedRequest) -> AsyncGenerator[bytes, None]:
    """The bytes of a stream, with a keep-alive comment after every `KEEP_ALIVE_S` without output. Raises the handle's failure."""
    encoder, ended = prepared.encoder, False

    def encode() -> bytes:
        return b"".join(data for output in outputs for data in encoder.deltas(*output))

    if opening := b"".join(encoder.opening()):
        yield opening
    with IdleTimer(handle.wake) as idle:
        while not ended:
            await handle.wait()
            ended = handle.ended
            outputs = handle.take()
            if data := await in_thread(encode, num_values(outputs)):
                idle.restart()
                yield data
            elif idle.due():
                yield KEEP_ALIVE_COMMENT
    yield b"".join(encoder.closing())


def num_values(outputs: Sequence[Output]) -> int:
    """A measure of the time to make JSON of deltas: the number of log probabilities, and of text that a parser reads."""
    values = sum(len(entry.logprobs.top) + 1 for _, delta in outputs for entry in delta.entries if entry.logprobs)
    values += sum(len(delta.text) for _, delta in outputs) // 4
    return values + sum(delta.scores.num_values for _, delta in outputs if delta.scores is not None)
