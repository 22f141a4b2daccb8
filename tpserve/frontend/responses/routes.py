"""The HTTP handlers of the Responses API. A response that is stored is an answer of `frontend/streams.py`. Owns no state."""

from typing import cast

from aiohttp import web

from tpserve.errors import UserError
from tpserve.frontend.openai.admission import admit, arrival_of, checked_call, keep, send
from tpserve.frontend.openai.body import parse, read_object
from tpserve.frontend.openai.errors import Json, json_response, shown
from tpserve.frontend.openai.resumable import (
    LAST_EVENT_ID,
    STREAM_ID,
    asked_position,
    outlives,
    repeated_answer,
    send_events,
)
from tpserve.frontend.openai.routes import MAX_COUNTED_TOKENS
from tpserve.frontend.openai.service import SERVICE
from tpserve.frontend.responses.encoder import CANCELLED
from tpserve.frontend.responses.history import decoded, find_response, history_of, no_response
from tpserve.frontend.responses.preparation import (
    RESPONSES,
    ResponseContext,
    counted_prompt,
    keeps,
    response_id,
)
from tpserve.frontend.responses.schema import RULES, InputFields, ResponseRequest
from tpserve.frontend.streams import Position, ResumableAnswer, new_stream_id

ROUTE = "/v1/responses/{id:(?!input_tokens$)[^/]+}"  # that one is a route of its own
MAX_LISTED = 100


async def create(request: web.Request) -> web.StreamResponse:
    """POST /v1/responses: the answer, its events, or with background at once how far it is."""
    checked, warnings = await checked_call(request, RESPONSES)
    call = cast(ResponseRequest, checked)
    if STREAM_ID in request.headers:
        earlier = await repeated_answer(request, await request.read())
        return await send_events(request, earlier, asked_position(request)) if call.stream else show(earlier)
    lives_on, is_kept = outlives(request, call, warnings), stored(request, call)
    arrival = arrival_of(request, new_stream_id(), await history_of(request, call))
    prepared, handle = await admit(request, RESPONSES, call, warnings, arrival, stepwise=is_kept or lives_on)
    if not (is_kept or lives_on):
        return await send(request, prepared, handle)
    answer = await keep(request, RESPONSES, prepared, handle, arrival)
    try:
        begun = show(answer)  # before the answer goes on while the journal writes
        await answer.recorded()
        if call.background and not call.stream:
            return begun
        if call.stream:
            return await send_events(request, answer, None)
        await until_ended(answer)
        if answer.error is not None:
            raise answer.error
        return show(answer)
    finally:
        if not lives_on and not answer.ended:  # the client has left
            request.app[SERVICE].streams.remove(answer)


async def retrieve(request: web.Request) -> web.StreamResponse:
    """GET /v1/responses/{id}: the response as far as it is; with stream its events, behind `starting_after`."""
    answer, _ = await asked_response(request)
    value = request.query.get("stream", "false").lower()
    if value not in ("true", "false", "1", "0"):
        raise UserError(f"stream is true or false, got {shown(value)}", param="stream", code="invalid_value")
    position = starting_after(request)
    if value in ("false", "0"):
        if "starting_after" in request.query:
            raise UserError("starting_after needs stream true", param="starting_after", code="invalid_value")
        return show(answer)
    if not answer.streamed:
        raise UserError(
            "this response has no events: it was created without stream and without background",
            param="stream",
            code="invalid_value",
        )
    return await send_events(request, answer, position)


async def delete(request: web.Request) -> web.Response:
    """DELETE /v1/responses/{id}: end a response and forget it."""
    answer, _ = await asked_response(request)
    request.app[SERVICE].streams.remove(answer)
    return json_response({"id": response_id(answer.id), "object": "response", "deleted": True})


async def cancel(request: web.Request) -> web.Response:
    """POST /v1/responses/{id}/cancel: end a response in the background. One that has ended stays as it is."""
    answer, context = await asked_response(request)
    if context is not None and not context.background:
        raise UserError(
            "Cannot cancel a synchronous response. Close its connection, or create it with background",
            param="id",
            code="invalid_value",
        )
    if not answer.ended:
        answer.stop(UserError("the response was cancelled", code=CANCELLED, status=409))
        await answer.recorded()
    return show(answer)


async def list_input(request: web.Request) -> web.Response:
    """GET /v1/responses/{id}/input_items: what the response answers, with the conversation before it, a page at a time."""
    answer, context = await asked_response(request)
    if context is None:
        raise answer.error or no_response(request.match_info["id"])
    limit, order, after = request.query.get("limit", "20"), request.query.get("order", "desc"), request.query.get("after")
    if not limit.isdecimal() or not 1 <= int(limit[:4]) <= MAX_LISTED:
        raise UserError(f"limit is 1 to {MAX_LISTED}, got {shown(limit)}", param="limit", code="invalid_value")
    if order not in ("asc", "desc"):
        raise UserError(f"order is asc or desc, got {shown(order)}", param="order", code="invalid_value")
    items = await decoded(request, b'{"items":' + context.items + b"}")
    if order == "desc":
        items.reverse()
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise UserError(f"after: the response has no input item {shown(after)}", param="after", code="invalid_value")
    begin = ids.index(after) + 1 if after is not None else 0
    page = items[begin : begin + int(limit)]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return json_response({"object": "list", "data": page, **ends, "has_more": begin + len(page) < len(items)})


async def count_input(request: web.Request) -> web.Response:
    """POST /v1/responses/input_tokens: how many tokens the prompt of such a request has."""
    service = request.app[SERVICE]
    call, warnings = parse(
        await read_object(request, service.large_bodies), InputFields, service.logged_fields, service.sampling(), RULES
    )
    service.served_name(call.model)
    max_tokens = max(MAX_COUNTED_TOKENS, service.limits().max_model_len)
    prompt = await counted_prompt(service, call, await history_of(request, call), max_tokens)
    answer: Json = {"object": "response.input_tokens", "input_tokens": len(prompt.ids)}
    return json_response(answer | ({"warnings": warnings} if warnings else {}))


def stored(request: web.Request, call: ResponseRequest) -> bool:
    """Whether the response is kept. UserError for what a server that keeps nothing cannot do."""
    service = request.app[SERVICE]
    if call.store and not service.streams.window_s:
        raise UserError(
            "store is not supported by this server: it keeps no answers (--resume-window 0); set it to false",
            param="store",
            code="unsupported_parameter",
        )
    if call.background and call.store is False:
        raise UserError(
            "background can only be used when `store` is true; leave store out", param="background", code="invalid_value"
        )
    return keeps(service, call)


async def asked_response(request: web.Request) -> tuple[ResumableAnswer, ResponseContext | None]:
    """The response of the URL; no context when nothing but an error is kept. UserError 404 when the client has none."""
    return await find_response(request, request.match_info["id"])


async def until_ended(answer: ResumableAnswer) -> None:
    """Read an answer until its end."""
    with answer.reader() as news:
        while not answer.ended and answer.gone is None:
            await news.wait()
            news.clear()


def show(answer: ResumableAnswer) -> web.Response:
    """The response object as far as it is. Raises the error of an answer of which nothing else is kept."""
    if answer.gone is not None:
        raise answer.gone
    answer.touch()
    body = answer.body if answer.form is None else answer.form.body()
    return web.Response(body=body, content_type="application/json", headers={STREAM_ID: answer.id})


def starting_after(request: web.Request) -> Position | None:
    """The number behind which the events are asked for, in the URL or as Last-Event-ID."""
    text = request.query.get("starting_after")
    if text is None or LAST_EVENT_ID in request.headers:
        return asked_position(request)
    if not text.isdecimal() or len(text) > 12:
        raise UserError(
            f"starting_after is the sequence_number of an event, got {shown(text)}", param="starting_after", code="invalid_value"
        )
    return int(text), 0


def add_routes(app: web.Application) -> None:
    """Add the routes of this module."""
    app.router.add_post(RESPONSES.path, create)
    app.router.add_post("/v1/responses/input_tokens", count_input)
    app.router.add_get(ROUTE, retrieve, allow_head=False)
    app.router.add_delete(ROUTE, delete)
    app.router.add_post(ROUTE + "/cancel", cancel)
    app.router.add_get(ROUTE + "/input_items", list_input, allow_head=False)
