"""The HTTP handlers of completions, chat completions, models, tokens and load. Owns no state."""

from aiohttp import web

from tpserve.errors import UserError
from tpserve.frontend.openai.admission import generate
from tpserve.frontend.openai.body import parse, read_object
from tpserve.frontend.openai.errors import Json, json_response
from tpserve.frontend.openai.preparation import CHAT_COMPLETIONS, COMPLETIONS
from tpserve.frontend.openai.prompts import chat_prompt, completion_prompts, in_thread, refuse_too_long
from tpserve.frontend.openai.schema import CompletionRequest, DetokenizeRequest, TokenizeChatRequest, TokenizeRequest
from tpserve.frontend.openai.service import SERVICE, OpenAIServing
from tpserve.frontend.openai.token_ids import check_ids

MAX_COUNTED_TOKENS = 1 << 18
"""The most tokens that /tokenize counts and /detokenize takes, unless a sequence may have more."""


async def completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions: one or several prompts, whole or as a stream."""
    return await generate(request, COMPLETIONS)


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions: a conversation through the chat template, whole or as a stream."""
    return await generate(request, CHAT_COMPLETIONS)


async def models(request: web.Request) -> web.Response:
    """GET /v1/models: all served names of the model."""
    service = request.app[SERVICE]
    return json_response({"object": "list", "data": [model_card(service, name) for name in service.names]})


async def model(request: web.Request) -> web.Response:
    """GET /v1/models/{id}: one served name; 404 for any other."""
    service = request.app[SERVICE]
    return json_response(model_card(service, service.served_name(request.match_info["id"])))


def model_card(service: OpenAIServing, name: str) -> Json:
    """A served name as a model object of OpenAI's API."""
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
    """POST /tokenize: the token ids of a text, or of messages through the chat template."""
    service = request.app[SERVICE]
    body = await read_object(request, service.large_bodies)
    if body.get("messages") is not None:
        chat, warnings = parse(body, TokenizeChatRequest, service.logged_fields)
        service.served_name(chat.model)
        limits = service.limits()
        ids = (await chat_prompt(service, chat, limits, max(MAX_COUNTED_TOKENS, limits.max_model_len))).ids
        strings = chat.return_token_strs
    else:
        call, warnings = parse(body, TokenizeRequest, service.logged_fields)
        service.served_name(call.model)
        limits = service.limits()
        refuse_too_long(call.prompt, service.tokenizer, limits, "prompt")
        plain = CompletionRequest(prompt=call.prompt, add_special_tokens=call.add_special_tokens)
        max_prompt_tokens = max(MAX_COUNTED_TOKENS, limits.max_model_len)
        ids = (await completion_prompts(service, plain, limits, max_prompt_tokens))[0].ids if call.prompt else []
        strings = call.return_token_strs

    def encode() -> web.Response:
        pieces = [service.tokenizer.piece(token) for token in ids] if strings else None
        answer: Json = {"count": len(ids), "max_model_len": limits.max_model_len, "tokens": ids, "token_strs": pieces}
        if warnings:
            answer["warnings"] = warnings
        return json_response(answer)

    return await in_thread(encode, len(ids))


async def detokenize(request: web.Request) -> web.Response:
    """POST /detokenize: the text of token ids."""
    service = request.app[SERVICE]
    call, warnings = parse(await read_object(request, service.large_bodies), DetokenizeRequest, service.logged_fields)
    service.served_name(call.model)
    limits = service.limits()
    if len(call.tokens) > (max_tokens := max(MAX_COUNTED_TOKENS, limits.max_model_len)):
        raise UserError(f"tokens: {len(call.tokens)} ids, this server takes {max_tokens} at once; split them", param="tokens")

    def decode() -> str:
        check_ids(call.tokens, limits.vocab_size, "tokens")
        return service.tokenizer.decode_many(call.tokens, skip_special_tokens=False)

    text = await in_thread(decode, len(call.tokens))
    return json_response({"prompt": text} | ({"warnings": warnings} if warnings else {}))


async def tokenizer_info(request: web.Request) -> web.Response:
    """GET /tokenizer_info: tokenizer_config.json as the server reads it, in vLLM's form."""
    service = request.app[SERVICE]
    tokenizer = service.tokenizer
    facts = {"vocab_size": tokenizer.vocab_size, "chat_template": service.chat_template.source}
    return json_response({**tokenizer.config, **tokenizer.special_tokens, **facts})


async def load(request: web.Request) -> web.Response:
    """GET /load: the number of open sequences, running or waiting, in vLLM's form."""
    return json_response({"server_load": request.app[SERVICE].request_table.num_open})


def add_routes(app: web.Application) -> None:
    """Add the routes of this module."""
    app.router.add_post("/v1/completions", completions)
    app.router.add_post("/v1/chat/completions", chat_completions)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/v1/models/{id:.+}", model)  # names may contain slashes
    app.router.add_post("/tokenize", tokenize)
    app.router.add_post("/detokenize", detokenize)
    app.router.add_get("/tokenizer_info", tokenizer_info)
    app.router.add_get("/load", load)
