"""The HTTP side of answers that outlive a connection: how they are asked for, read, asked for again and ended.

Every client, also the first one, is a reader of a `ResumableAnswer`, into which `production` writes. Owns no state.
"""

import logging

from aiohttp import web

from tpserve.errors import UserError
from tpserve.frontend.access import client_key
from tpserve.frontend.openai.errors import error_object, json_response, shown
from tpserve.frontend.openai.production import digest_of
from tpserve.frontend.openai.rebuild import rebuilt
from tpserve.frontend.openai.schema import GenerationFields
from tpserve.frontend.openai.service import SERVICE
from tpserve.frontend.openai.sse import END, KEEP_ALIVE_COMMENT, SSE_HEADERS, IdleTimer, event
from tpserve.frontend.streams import Position, ResumableAnswer, key_digest, parsed_position

log = logging.getLogger(__name__)

RESUMABLE, STREAM_ID, LAST_EVENT_ID = "X-Resumable", "X-Stream-Id", "Last-Event-ID"
ON, OFF = frozenset({"1", "true"}), frozenset({"", "0", "false"})
STREAM_ROUTE = "/v1/streams/{id}"
NO_EFFECT = "X-Resumable has no effect without stream: the answer's id would come with the answer; use background"


def outlives(request: web.Request, call: GenerationFields, warnings: list[str]) -> bool:
    """Whether the client asks for an answer that outlives its connection. UserError when this server keeps none."""
    value, window_s = request.headers.get(RESUMABLE, "").strip().lower(), request.app[SERVICE].streams.window_s
    if value not in ON | OFF:
        raise UserError(f"the header {RESUMABLE} is 1 or 0, got {shown(value)}", param=RESUMABLE, code="invalid_value")
    if call.background and not window_s:
        raise UserError(
            "background is not supported by this server: it keeps no answers (--resume-window 0)",
            param="background",
            code="unsupported_parameter",
        )
    if value in ON and not call.stream and not call.background:
        warnings.append(NO_EFFECT)
    return call.background or (value in ON and call.stream and window_s > 0)


async def send_answer(request: web.Request, answer: ResumableAnswer, position: Position | None) -> web.StreamResponse:
    """What a client gets that attaches behind `position` (None: at the beginning): events, an answer, or how far it is."""
    headers = {STREAM_ID: answer.id}
    if answer.gone is not None:
        raise answer.gone
    if answer.streamed:
        if answer.ended and answer.after(position) == answer.num_events:
            return web.Response(status=204, headers=headers)  # which also tells an EventSource not to come again
        return await send_events(request, answer, position)
    if position is not None:
        raise UserError("this answer has no events: leave out from and Last-Event-ID", param="from", code="invalid_value")
    if answer.error is not None:
        raise answer.error
    if answer.ended:
        return web.Response(body=answer.body, content_type="application/json", headers=headers)
    answer.touch()
    place = STREAM_ROUTE.format(id=answer.id)
    status = {"id": answer.id, "object": "stream.status", "status": "in_progress" if answer.begun else "queued"}
    return json_response(status, 202, headers | {"Location": place, "Retry-After": "1"})


async def send_events(request: web.Request, answer: ResumableAnswer, position: Position | None) -> web.StreamResponse:
    """Send the events behind `position` as they come, until the last."""
    response, index = web.StreamResponse(headers=SSE_HEADERS | {STREAM_ID: answer.id}), 0
    try:
        with answer.reader() as news, IdleTimer(news.set) as idle:
            await response.prepare(request)
            while answer.gone is None:
                data, index = answer.read(max(index, answer.after(position)))
                if data:
                    idle.restart()
                    await response.write(data)
                elif answer.ended:
                    break
                else:
                    if idle.due():
                        await response.write(KEEP_ALIVE_COMMENT)
                    await news.wait()
                    news.clear()
            if answer.gone is not None:
                await response.write(event(error_object(answer.gone)) + END)
            await response.write_eof()
    except ConnectionError:
        log.debug("a reader of the answer %s left", answer.name)
    return response


def asked_position(request: web.Request) -> Position | None:
    """The position behind which a client goes on; None when it says none. UserError when it is none.

    Last-Event-ID wins over `from`: a browser that connects again repeats the URL.
    """
    header, query = request.headers.get(LAST_EVENT_ID), request.query.get("from")
    text, name = (query, "from") if header is None else (header, LAST_EVENT_ID)
    if text is None:
        return None
    if (position := parsed_position(text)) is None:
        raise UserError(
            f"{name} must be the id of an event of this stream, such as 17 or 17.1, got {shown(text)}",
            param=name,
            code="invalid_value",
        )
    return position


async def asked_answer(request: web.Request, id: str) -> ResumableAnswer:
    """The answer `id`. UserError 404 when the client has none of it."""
    service, key = request.app[SERVICE], client_key(request)
    if service.journal is not None and (earlier := service.journal.find(id, key_digest(id, key))) is not None:
        await rebuilt(service, earlier)
    return service.streams.find(id, key)


async def repeated_answer(request: web.Request, body: bytes) -> ResumableAnswer:
    """The earlier answer that a POST names. UserError unless the request is the same."""
    answer = await asked_answer(request, request.headers[STREAM_ID])
    if answer.request_digest != digest_of(body):
        raise UserError(
            f"the body is not that of the request whose {STREAM_ID} this is; leave the header out for a new request",
            param=STREAM_ID,
            code="invalid_value",
        )
    return answer


async def get_stream(request: web.Request) -> web.StreamResponse:
    """GET /v1/streams/{id}: the rest of an answer."""
    return await send_answer(request, await asked_answer(request, request.match_info["id"]), asked_position(request))


async def delete_stream(request: web.Request) -> web.Response:
    """DELETE /v1/streams/{id}: end an answer and forget it."""
    answer = await asked_answer(request, request.match_info["id"])
    request.app[SERVICE].streams.remove(answer)
    return json_response({"id": answer.id, "object": "stream.deleted", "deleted": True})


def add_routes(app: web.Application) -> None:
    """Add the routes of this module."""
    app.router.add_get(STREAM_ROUTE, get_stream, allow_head=False)
    app.router.add_delete(STREAM_ROUTE, delete_stream)
