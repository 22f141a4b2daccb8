"""Earlier responses that a request names: found by their ids and the client's key, and read as a conversation. Owns no state."""

import asyncio
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import msgspec
from aiohttp import web

from tpserve.errors import UserError
from tpserve.frontend.openai.body import MAX_BODY_BYTES, decode_object
from tpserve.frontend.openai.errors import Json, shown
from tpserve.frontend.openai.resumable import asked_answer
from tpserve.frontend.openai.service import SERVICE
from tpserve.frontend.responses.items import answer_of_item, references
from tpserve.frontend.responses.preparation import PREFIX, History, ResponseContext
from tpserve.frontend.responses.schema import InputFields
from tpserve.frontend.streams import ResumableAnswer

MAX_REFERENCED = 256
ENDED = ("completed", "incomplete")
"""The states of a response that another one may continue."""


async def find_response(request: web.Request, id: str) -> tuple[ResumableAnswer, ResponseContext | None]:
    """The response `id`; no context when nothing but an error is kept. UserError 404 when the client has none."""
    if not id.startswith(PREFIX):
        raise no_response(id)
    try:
        answer = await asked_answer(request, id.removeprefix(PREFIX))
    except UserError as error:
        raise no_response(id) if error.status == 404 else error from error
    context = answer.context
    if answer.gone is None and not isinstance(context, ResponseContext):  # an answer of another API
        raise no_response(id)
    return answer, context if isinstance(context, ResponseContext) else None


async def history_of(request: web.Request, call: InputFields) -> bytes:
    """JSON of the `History` that a request names. UserError when it is not to be had."""
    items: list[Json] = []
    if call.previous_response_id is not None:
        items = await continued(request, call.previous_response_id)
    referenced = await items_named(request, set(references(call.input)))
    if not items and not referenced:
        return b""
    data = msgspec.json.encode(History(items, referenced))
    if len(data) > MAX_BODY_BYTES:
        raise UserError(
            f"the conversation before this request has {len(data)} bytes, this server takes {MAX_BODY_BYTES}",
            param="previous_response_id",
            code="context_length_exceeded",
        )
    return data


async def items_named(request: web.Request, ids: Collection[str]) -> dict[str, Json]:
    """Those of the items that the client has in earlier responses. UserError for those of too many."""
    found: dict[str, Json] = {}
    answers = {answer_id for id in ids if (answer_id := answer_of_item(id)) is not None}
    if len(answers) > MAX_REFERENCED:
        raise UserError(
            f"input: items of {len(answers)} responses are named, this server takes {MAX_REFERENCED}; send the items themselves",
            param="input",
            code="invalid_value",
        )
    for answer_id in answers:
        await asyncio.sleep(0)  # let other tasks run
        with suppress(UserError):  # the item is missing then, which says more
            found |= {item["id"]: item for item in await conversation_of(request, PREFIX + answer_id) if item["id"] in ids}
    return found


async def continued(request: web.Request, id: str) -> list[Json]:
    """The conversation that ends with the response `id`."""
    try:
        return await conversation_of(request, id)
    except UserError as error:
        if error.status != 404:
            raise
        raise UserError(
            f"Previous response with id {shown(id)!r} not found: it is unknown, belongs to another key, was not stored, or has "
            "been forgotten (--resume-window)",
            param="previous_response_id",
            code="previous_response_not_found",
        ) from error


async def conversation_of(request: web.Request, id: str) -> list[Json]:
    """The items of a response: its input and its output. UserError unless it has come to its end."""
    answer, context = await find_response(request, id)
    if context is None:
        raise no_response(id)
    response = await decode_object(answer.body, request.app[SERVICE].large_bodies) if answer.ended else {"status": "in_progress"}
    if response["status"] not in ENDED:
        raise UserError(
            f"the response {shown(id)} is {response['status']}: only one that has come to its end can be continued",
            param="previous_response_id",
            code="invalid_value",
        )
    return [*await decoded(request, b'{"items":' + context.items + b"}"), *response["output"]]


async def decoded(request: web.Request, data: bytes) -> list[Json]:
    """The items of a JSON text, which no other request waits for."""
    body: dict[str, Any] = await decode_object(data, request.app[SERVICE].large_bodies)
    items: list[Json] = body["items"]
    return items


def no_response(id: str) -> UserError:
    """The error 404 of a response that the client has not."""
    return UserError(
        f"Response with id {shown(id)!r} not found: it is unknown, belongs to another key, was not stored, or has been forgotten "
        "(--resume-window)",
        param="id",
        code="response_not_found",
        status=404,
    )
