"""The handlers of the OpenAI API, each a straight line from body to answer."""

import time
from collections.abc import Sequence

from aiohttp import web

from tpserve.frontend.openai.answer import send_stream, send_whole
from tpserve.frontend.openai.body import parse, read_object
from tpserve.frontend.openai.errors import json_response
from tpserve.frontend.openai.params import refuse_contradictions
from tpserve.frontend.openai.prompts import Prompt, chat_prompt, check_ids, completion_prompts, max_new_tokens, refuse_too_long
from tpserve.frontend.openai.schema import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    StreamOptions,
    TokenizeChatRequest,
    TokenizeRequest,
)
from tpserve.frontend.openai.sequences import params_of, requests_of
from tpserve.frontend.openai.service import SERVICE, Service
from tpserve.frontend.openai.shapes import ChatShape, CompletionShape, Head, Json, Shape
from tpserve.types.sampling import SamplingParams

REQUEST_ID = web.RequestKey("request_id", str)
"""Where a request carries its id: the client's, or one of ours."""
DEFAULT_COMPLETION_TOKENS = 16


async def completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions"""
    service = request.app[SERVICE]
    call, warnings = parse(await read_object(request), CompletionRequest, service.logged_fields, service.sampling())
    head = head_of(request, service, call, warnings, "cmpl", "text_completion", "text_completion")
    limits = service.limits()
    prompts = await completion_prompts(service, call, limits)
    sizes = [max_new_tokens(prompt, call.max_tokens, DEFAULT_COMPLETION_TOKENS, limits, "prompt") for prompt in prompts]
    params = params_of(service, call, prompts, sizes, limits)
    shape = CompletionShape(head, call, prompts, service.tokenizer)
    return await answer(request, service, call, params, shape, head, prompts)


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions"""
    service = request.app[SERVICE]
    call, warnings = parse(await read_object(request), ChatCompletionRequest, service.logged_fields, service.sampling())
    head = head_of(request, service, call, warnings, "chatcmpl", "chat.completion", "chat.completion.chunk")
    limits = service.limits()
    prompt = await chat_prompt(service, call, limits)
    asked = call.max_completion_tokens if call.max_completion_tokens is not None else call.max_tokens
    size = max_new_tokens(prompt, asked, service.defaults.max_tokens, limits, "messages")
    params = params_of(service, call, [prompt], [size], limits)
    shape = ChatShape(head, call, prompt, service.tokenizer)
    return await answer(request, service, call, params, shape, head, [prompt])


async def answer(
    request: web.Request,
    service: Service,
    call: CompletionRequest | ChatCompletionRequest,
    params: Sequence[SamplingParams],
    shape: Shape,
    head: Head,
    prompts: Sequence[Prompt],
) -> web.StreamResponse:
    """Admit, and send what comes."""
    ticket = service.open(requests_of(service, call, prompts, params), streaming=call.stream)
    if call.stream:
        options = call.stream_options or StreamOptions()
        return await send_stream(request, service.journal, ticket, shape, head, prompts, options)
    return await send_whole(service.journal, ticket, shape, head, prompts)


def head_of(
    request: web.Request,
    service: Service,
    call: CompletionRequest | ChatCompletionRequest,
    warnings: list[str],
    prefix: str,
    kind: str,
    chunk_kind: str,
) -> Head:
    """Check what both calls share, and name the answer."""
    if call.request_id is not None:
        request[REQUEST_ID] = call.request_id
    model = service.served(call.model)
    refuse_contradictions(call)
    return Head(f"{prefix}-{request[REQUEST_ID]}", kind, chunk_kind, model, int(time.time()), warnings)


async def models(request: web.Request) -> web.Response:
    """GET /v1/models"""
    service = request.app[SERVICE]
    return json_response({"object": "list", "data": [model_card(service, name) for name in service.names]})


async def model(request: web.Request) -> web.Response:
    """GET /v1/models/{id}"""
    service = request.app[SERVICE]
    return json_response(model_card(service, service.served(request.match_info["id"])))


def model_card(service: Service, name: str) -> Json:
    return {
        "id": name,
        "object": "model",
        "created": service.created_s,
        "owned_by": "tpserve",
        "root": service.root,
        "parent": None,
        "max_model_len": service.status().max_model_len,
    }


async def tokenize(request: web.Request) -> web.Response:
    """POST /tokenize: of a text, or of messages through the chat template."""
    service = request.app[SERVICE]
    body = await read_object(request)
    if body.get("messages") is not None:
        chat, warnings = parse(body, TokenizeChatRequest, service.logged_fields)
        service.served(chat.model)
        ids = (await chat_prompt(service, chat, service.limits())).ids
        strings = chat.return_token_strs
    else:
        call, warnings = parse(body, TokenizeRequest, service.logged_fields)
        service.served(call.model)
        limits = service.limits()
        refuse_too_long(call.prompt, service.tokenizer, limits, "prompt")
        plain = CompletionRequest(prompt=call.prompt, add_special_tokens=call.add_special_tokens)
        ids = (await completion_prompts(service, plain, limits))[0].ids if call.prompt else []
        strings = call.return_token_strs
    answer: Json = {"count": len(ids), "max_model_len": service.status().max_model_len, "tokens": ids}
    if strings:
        answer["token_strs"] = [service.tokenizer.piece(token) for token in ids]
    if warnings:
        answer["warnings"] = warnings
    return json_response(answer)


async def detokenize(request: web.Request) -> web.Response:
    """POST /detokenize"""
    service = request.app[SERVICE]
    call, warnings = parse(await read_object(request), DetokenizeRequest, service.logged_fields)
    service.served(call.model)
    check_ids(call.tokens, service.limits().vocab_size, "tokens")
    text = service.tokenizer.decode(call.tokens, skip_special_tokens=False)
    return json_response({"prompt": text} | ({"warnings": warnings} if warnings else {}))


def add_routes(app: web.Application) -> None:
    app.router.add_post("/v1/completions", completions)
    app.router.add_post("/v1/chat/completions", chat_completions)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/v1/models/{id:.+}", model)  # names may hold slashes
    app.router.add_post("/tokenize", tokenize)
    app.router.add_post("/detokenize", detokenize)
