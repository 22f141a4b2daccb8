"""From a client's body to its answer, the same for every API: check, admit, and send the answer or keep it. Owns no state."""

import time
from dataclasses import dataclass

from aiohttp import web

from tpserve.engine_client.requests import RequestHandle
from tpserve.frontend.access import KEY_OWNER, client_key
from tpserve.frontend.api_keys import NOBODY
from tpserve.frontend.deadline import deadline_of
from tpserve.frontend.openai.body import parse, read_object
from tpserve.frontend.openai.chat_answer import random_call_id
from tpserve.frontend.openai.preparation import Arrival, Endpoint, PreparedRequest
from tpserve.frontend.openai.production import call_ids_of, digest_of, record, start, track
from tpserve.frontend.openai.resumable import STREAM_ID, asked_position, outlives, repeated_answer, send_answer
from tpserve.frontend.openai.schema import GenerationFields
from tpserve.frontend.openai.sender import send_stream, send_whole
from tpserve.frontend.openai.sequences import requests_of
from tpserve.frontend.openai.service import SERVICE
from tpserve.frontend.streams import ResumableAnswer, key_digest, new_stream_id
from tpserve.frontend.tracing import TRACE

REQUEST_ID = web.RequestKey("request_id", str)
"""The id of a request: the client's, or a random one."""


@dataclass(frozen=True)
class Admitted:
    """An admitted request, for its log line."""

    id: str
    model: str
    handle: RequestHandle


ADMITTED = web.RequestKey("admitted", Admitted)


async def generate(request: web.Request, endpoint: Endpoint) -> web.StreamResponse:
    """Check the request, admit it and send its response."""
    if STREAM_ID in request.headers:
        return await read_again(request)
    call, warnings = await checked_call(request, endpoint)
    stream_id = new_stream_id() if outlives(request, call, warnings) else ""
    arrival = arrival_of(request, stream_id)
    prepared, handle = await admit(request, endpoint, call, warnings, arrival, stepwise=bool(stream_id))
    if stream_id:
        answer = await keep(request, endpoint, prepared, handle, arrival)
        await answer.recorded()
        return await send_answer(request, answer, None)
    return await send(request, prepared, handle)


async def read_again(request: web.Request) -> web.StreamResponse:
    """The response to a repeated request that names its answer."""
    await read_object(request, request.app[SERVICE].large_bodies)
    return await send_answer(request, await repeated_answer(request, await request.read()), asked_position(request))


async def checked_call(request: web.Request, endpoint: Endpoint) -> tuple[GenerationFields, list[str]]:
    """The body of a request and its warnings. UserError for what its schema refuses."""
    service = request.app[SERVICE]
    body = await read_object(request, service.large_bodies)
    call, warnings = parse(body, endpoint.schema, service.logged_fields, service.sampling(), endpoint.rules)
    if call.request_id is not None:
        request[REQUEST_ID] = call.request_id
    return call, warnings


def arrival_of(request: web.Request, answer_id: str, history: bytes = b"") -> Arrival:
    """What belongs to a request that has come now. `answer_id`: empty for an answer that nobody may ask for."""
    call_ids = call_ids_of(answer_id) if answer_id else lambda _choice, _number: random_call_id()
    service = request.app[SERVICE]
    return Arrival(
        request[REQUEST_ID],
        int(time.time()),
        service.limits,
        call_ids,
        answer_id=answer_id,
        history=history,
        deadline_s=deadline_of(request, service.request_timeout_s),
        key_name=request.get(KEY_OWNER, NOBODY).name,
        trace=request.get(TRACE),
    )


async def admit(
    request: web.Request,
    endpoint: Endpoint,
    call: GenerationFields,
    warnings: list[str],
    arrival: Arrival,
    *,
    stepwise: bool = False,
) -> tuple[PreparedRequest, RequestHandle]:
    """Do all other checks and admit the request. `stepwise`: with deltas that are the same whenever they are read.

    UserError names what is wrong, or says that a limit of the key is reached, the queue is full or the engine does not run.
    """
    service = request.app[SERVICE]
    prepared = await endpoint.prepare(service, call, warnings, arrival)
    admitted = prepared.call
    requests = requests_of(service, admitted, prepared.prompts, prepared.params, prepared.shown, arrival.draw_seed)
    service.open_requests.key_usage.refuse(request.get(KEY_OWNER, NOBODY), prepared.prompt_tokens)
    handle = service.open(requests, streaming=admitted.stream, stepwise=stepwise and admitted.stream)
    track(service, arrival, prepared, handle, prepared.prompt_tokens)
    request[ADMITTED] = Admitted(prepared.meta.id, prepared.meta.model, handle)
    return prepared, handle


async def keep(
    request: web.Request, endpoint: Endpoint, prepared: PreparedRequest, handle: RequestHandle, arrival: Arrival
) -> ResumableAnswer:
    """The answer as one that outlives its connection. It is under way; its client may know of it once it is `recorded`."""
    service, id = request.app[SERVICE], arrival.answer_id
    text = await request.read()  # it has been read
    owner = key_digest(id, client_key(request))
    answer = service.streams.open(id, owner, digest_of(text), prepared.call.stream, endpoint.numbered)
    record(service, answer, endpoint.path, text, arrival, handle)
    start(service, answer, handle, prepared)
    return answer


async def send(request: web.Request, prepared: PreparedRequest, handle: RequestHandle) -> web.StreamResponse:
    """Send an answer that ends with its connection."""
    request_table = request.app[SERVICE].request_table
    if prepared.call.stream:
        return await send_stream(request, request_table, handle, prepared)
    return await send_whole(request_table, handle, prepared)
