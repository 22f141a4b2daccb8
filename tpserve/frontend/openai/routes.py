"""The HTTP handlers of the OpenAI API, of /tokenize and of /detokenize. Owns no state."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from aiohttp import web

from tpserve.engine_client.requests import RequestHandle
from tpserve.errors import UserError
from tpserve.frontend.openai.body import parse, read_object
from tpserve.frontend.openai.chat_answer import AnswerReader
from tpserve.frontend.openai.errors import Json, json_response
from tpserve.frontend.openai.grammar import describes_output, grammar_of
from tpserve.frontend.openai.params import refuse_contradictions
from tpserve.frontend.openai.prompts import Prompt, chat_prompt, completion_prompts, in_thread, max_new_tokens, refuse_too_long
from tpserve.frontend.openai.response_builder import (
    ChatResponseBuilder,
    CompletionResponseBuilder,
    ResponseBuilder,
    ResponseMeta,
)
from tpserve.frontend.openai.responses import send_stream, send_whole
from tpserve.frontend.openai.schema import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    StreamOptions,
    TokenizeChatRequest,
    TokenizeRequest,
)
from tpserve.frontend.openai.sequences import params_of, requests_of
from tpserve.frontend.openai.service import SERVICE, OpenAIServing
from tpserve.frontend.openai.token_ids import check_ids
from tpserve.frontend.openai.tools import ToolUse, tool_use
from tpserve.response_template.parser import Place
from tpserve.types.sampling import EngineSamplingParams

REQUEST_ID = web.RequestKey("request_id", str)
"""The id of a request: the client's, or a random one."""


@dataclass(frozen=True)
class Admitted:
    """An admitted request, for its log line."""

    id: str
    model: str
    handle: RequestHandle


ADMITTED = web.RequestKey("admitted", Admitted)
DEFAULT_COMPLETION_TOKENS = 16
"""`max_tokens` of a completion without one, as in OpenAI's API."""
MAX_COUNTED_TOKENS = 1 << 18
"""The most tokens that /tokenize counts and /detokenize takes, unless a sequence may have more."""


async def completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions: one or several prompts, whole or as a stream."""
    service = request.app[SERVICE]
    call, warnings = parse(
        await read_object(request, service.large_bodies), CompletionRequest, service.logged_fields, service.sampling()
    )
    meta = response_meta(request, service, call, warnings, "cmpl", "text_completion", "text_completion")
    limits = service.limits()
    prompts = await completion_prompts(service, call, limits)
    sizes = [max_new_tokens(prompt, call.max_tokens, DEFAULT_COMPLETION_TOKENS, limits, "prompt") for prompt in prompts]
    grammar = await asyncio.to_thread(grammar_of, call) if describes_output(call) else ""
    params = await params_of(service, call, prompts, sizes, limits, grammar)
    builder = CompletionResponseBuilder(meta, call, prompts, service.tokenizer)
    return await answer(request, service, call, params, builder, meta, prompts)


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions: a conversation through the chat template, whole or as a stream."""
    service = request.app[SERVICE]
    call, warnings = parse(
        await read_object(request, service.large_bodies), ChatCompletionRequest, service.logged_fields, service.sampling()
    )
    warnings += service.answers.unheeded(call, service.chat_template.source or "")
    meta = response_meta(request, service, call, warnings, "chatcmpl", "chat.completion", "chat.completion.chunk")
    limits = service.limits()
    use = tool_use(call)
    service.answers.refuse_tools(use)
    prompt = await chat_prompt(service, call, limits)
    tail, place = service.answers.tail(prompt.text)
    requested = call.max_completion_tokens if call.max_completion_tokens is not None else call.max_tokens
    size = max_new_tokens(prompt, requested, service.defaults.max_tokens, limits, "messages")
    params = await params_of(service, call, [prompt], [size], limits, await chat_grammar(service, call, use, place))
    readers = [AnswerReader(service.answers, call, use, tail) for _ in range(call.n)]
    builder = ChatResponseBuilder(meta, call, prompt, service.tokenizer, readers)
    return await answer(request, service, call, params, builder, meta, [prompt], service.answers.shown(use))


async def chat_grammar(service: OpenAIServing, call: ChatCompletionRequest, use: ToolUse, place: Place) -> str:
    """The grammar of a chat's answer, the first that compiles. UserError of the last."""
    grammars = partial(service.answers.grammars, call, use, place)
    constrained = describes_output(call) or use.choice != "none"
    *better, last = await asyncio.to_thread(grammars) if constrained else grammars()
    for grammar in better:
        with suppress(UserError):
            await service.grammars.check(grammar)
            return grammar
    return last


async def answer(
    request: web.Request,
    service: OpenAIServing,
    call: CompletionRequest | ChatCompletionRequest,
    params: Sequence[EngineSamplingParams],
    builder: ResponseBuilder,
    meta: ResponseMeta,
    prompts: Sequence[Prompt],
    shown: frozenset[int] = frozenset(),
) -> web.StreamResponse:
    """Admit the request and send its response. `shown`: special tokens that outputs show."""
    handle = service.open(requests_of(service, call, prompts, params, shown), streaming=call.stream)
    request[ADMITTED] = Admitted(meta.id, meta.model, handle)
    if call.stream:
        options = call.stream_options or StreamOptions()
        return await send_stream(request, service.request_table, handle, builder, meta, prompts, options)
    return await send_whole(service.request_table, handle, builder, meta, prompts)


def response_meta(
    request: web.Request,
    service: OpenAIServing,
    call: CompletionRequest | ChatCompletionRequest,
    warnings: list[str],
    prefix: str,
    kind: str,
    chunk_kind: str,
) -> ResponseMeta:
    """Check the fields that both request types share, and return the fields that all chunks of the response share."""
    if call.request_id is not None:
        request[REQUEST_ID] = call.request_id
    model = service.served_name(call.model)
    refuse_contradictions(call)
    return ResponseMeta(f"{prefix}-{request[REQUEST_ID]}", kind, chunk_kind, model, int(time.time()), warnings)


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
        answer: Json = {"count": len(ids), "max_model_len": limits.max_model_len, "tokens": ids}
        if strings:
            answer["token_strs"] = [service.tokenizer.piece(token) for token in ids]
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


def add_routes(app: web.Application) -> None:
    """Add the routes of this module."""
    app.router.add_post("/v1/completions", completions)
    app.router.add_post("/v1/chat/completions", chat_completions)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/v1/models/{id:.+}", model)  # names may contain slashes
    app.router.add_post("/tokenize", tokenize)
    app.router.add_post("/detokenize", detokenize)
