"""The HTTP handlers of the Messages API. Owns no state."""

from aiohttp import web

from tpserve.frontend.anthropic.preparation import MESSAGES, counted_message
from tpserve.frontend.anthropic.schema import RULES, MessageInput
from tpserve.frontend.openai.admission import generate
from tpserve.frontend.openai.body import parse, read_object
from tpserve.frontend.openai.errors import json_response
from tpserve.frontend.openai.routes import MAX_COUNTED_TOKENS
from tpserve.frontend.openai.service import SERVICE


async def create_message(request: web.Request) -> web.StreamResponse:
    """POST /v1/messages: the next message of a conversation, whole or as a stream."""
    return await generate(request, MESSAGES)


async def count_tokens(request: web.Request) -> web.Response:
    """POST /v1/messages/count_tokens: how many tokens the prompt of such a request has."""
    service = request.app[SERVICE]
    body = await read_object(request, service.large_bodies)
    call, _ = parse(body, MessageInput, service.logged_fields, service.sampling(), RULES)
    service.served_name(call.model)
    max_tokens = max(MAX_COUNTED_TOKENS, service.limits().max_model_len)
    return json_response({"input_tokens": len((await counted_message(service, call, max_tokens)).ids)})


def add_routes(app: web.Application) -> None:
    """Add the routes of this module."""
    app.router.add_post(MESSAGES.path, create_message)
    app.router.add_post(MESSAGES.path + "/count_tokens", count_tokens)
