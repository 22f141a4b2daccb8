"""Sends the response of an admitted request: whole, or as server-sent events.

Owns the reading of a handle and the order of a stream. Invariant: every exit aborts what is left of the handle, by `finally`: the
end of the response, a broken connection and a cancelled handler. `resumable` sends the answers that outlive a connection.
"""

import logging
from collections.abc import Sequence
from functools import partial

from aiohttp import web

from tpserve.engine_client.requests import RequestHandle, RequestTable
from tpserve.errors import UserError
from tpserve.frontend.openai.encoder import AnswerEncoder, Output
from tpserve.frontend.openai.errors import internal_error
from tpserve.frontend.openai.preparation import PreparedRequest
from tpserve.frontend.openai.prompts import in_thread
from tpserve.frontend.openai.sse import KEEP_ALIVE_COMMENT, SSE_HEADERS, IdleTimer

log = logging.getLogger(__name__)

MAX_UNSENT_BYTES = 64 << 10
"""Above it a client is slow: its task waits for the socket, as aiohttp does from the same number on."""


async def whole_answer(handle: RequestHandle, prepared: PreparedRequest) -> bytes:
    """Wait for the end of all choices; returns the JSON of the answer. UserError when the request fails."""
    while not handle.ended:
        await handle.wait()
    outputs = handle.take()

    return await in_thread(partial(prepared.encoder.whole, outputs), num_values(outputs))


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
            await _send_events(request, response, handle, prepared)
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
        handle.sink = None
        request_table.abort(handle)
    return response


async def _send_events(
    request: web.Request, response: web.StreamResponse, handle: RequestHandle, prepared: PreparedRequest
) -> None:
    """Send all events, with a keep-alive comment after every `KEEP_ALIVE_S` without output. Raises the handle's failure.

    While this task sleeps, a `DirectWriter` sends what comes. It wakes for the rest: the end, what is large, a slow client.
    """
    encoder, ended = prepared.encoder, False
    if opening := b"".join(encoder.opening()):
        await response.write(opening)
    with IdleTimer(handle.wake) as idle:
        direct = DirectWriter(request, response, handle, encoder, idle) if prepared.call.num_scored is None else None
        while not ended:
            handle.sink = direct
            await handle.wait()
            handle.sink = None
            if direct is not None and direct.failure is not None:
                raise direct.failure
            ended = handle.ended
            outputs = handle.take()
            if data := await in_thread(partial(encoded, encoder, outputs), num_values(outputs)):
                idle.restart()
                await response.write(data)
            elif idle.due():
                await response.write(KEEP_ALIVE_COMMENT)
    await response.write(b"".join(encoder.closing()))


class DirectWriter:
    """The sink of a stream's handle: encodes the output of a frame and gives it to the socket, without a task.

    `take` leaves all to the stream's task when the client does not read as fast as output comes.
    """

    def __init__(
        self,
        request: web.Request,
        response: web.StreamResponse,
        handle: RequestHandle,
        encoder: AnswerEncoder,
        idle: IdleTimer,
    ) -> None:
        """`response` is prepared: its headers are sent."""
        self._transport, self._handle, self._encoder, self._idle = request.transport, handle, encoder, idle
        self._chunked = response.headers.get("Transfer-Encoding") == "chunked"
        self._data = b""
        self.failure: Exception | None = None
        """An error of the encoder, for the task."""

    def take(self) -> bool:
        transport = self._transport
        if transport is None or transport.is_closing() or transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            return False
        try:
            self._data = encoded(self._encoder, self._handle.take())
        except Exception as error:
            self.failure = error
            return False
        return True

    def flush(self) -> None:
        if (data := self._data) and self._transport is not None:
            self._idle.restart()
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)


def encoded(encoder: AnswerEncoder, outputs: Sequence[Output]) -> bytes:
    """The events of all deltas."""
    return b"".join([data for sequence, delta in outputs for data in encoder.deltas(sequence, delta)])


def num_values(outputs: Sequence[Output]) -> int:
    """A measure of the time to make JSON of deltas: the number of log probabilities, and of text that a parser reads."""
    values = sum(len(entry.logprobs.top) + 1 for _, delta in outputs for entry in delta.entries if entry.logprobs)
    values += sum(len(delta.text) for _, delta in outputs) // 4
    return values + sum(delta.scores.num_values for _, delta in outputs if delta.scores is not None)
