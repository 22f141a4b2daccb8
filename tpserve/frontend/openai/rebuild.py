"""Answers that a killed frontend has left in the journal: the same path as the first time, fed with what the engine has sent.

Owns no state. What is running goes on at once, what has ended is rebuilt when somebody asks for it.
"""

import asyncio
import logging
import time
from collections.abc import Sequence

from msgspec.structs import replace

from tpserve.engine_client.requests import RequestHandle, RequestTable
from tpserve.errors import UserError
from tpserve.frontend.endpoints import ENDPOINTS
from tpserve.frontend.openai.body import decode_object, parse
from tpserve.frontend.openai.errors import internal_error
from tpserve.frontend.openai.preparation import Arrival, PreparedRequest
from tpserve.frontend.openai.production import call_ids_of, digest_of, digest_of_requests, start, track
from tpserve.frontend.openai.prompts import in_thread
from tpserve.frontend.openai.sender import num_values
from tpserve.frontend.openai.sequences import requests_of
from tpserve.frontend.openai.service import ModelLimits, OpenAIServing
from tpserve.frontend.streams import ResumableAnswer
from tpserve.journal.journal import EarlierAnswer, StoredRequest
from tpserve.text.assembler import Assembler
from tpserve.types.messages import RequestOutput
from tpserve.types.request import Request

log = logging.getLogger(__name__)

MAX_TRIES = 3
REFUSED = "stream_refused"
FRAMES_AT_ONCE = 32


async def rebuild_running(service: OpenAIServing) -> None:
    """Rebuild every answer that an earlier process has begun and not ended, in the order in which they came."""
    assert service.journal is not None
    running = [answer for answer in service.journal.earlier.values() if not answer.ended]
    for answer in running:
        await rebuilt(service, answer)
    if running:
        log.info("%d answers of the server before this one go on", len(running))


async def rebuilt(service: OpenAIServing, earlier: EarlierAnswer) -> None:
    """Until an answer is in the table of streams; several may wait for it."""
    if earlier.rebuilding is None:
        earlier.rebuilding = asyncio.get_running_loop().create_task(rebuild(service, earlier))
    await asyncio.shield(earlier.rebuilding)


async def rebuild(service: OpenAIServing, earlier: EarlierAnswer) -> None:
    """Make an answer what it was, and go on with it. One that cannot be rebuilt ends with an error."""
    journal = service.journal
    assert journal is not None
    try:
        stored, frames = await journal.read(earlier)
        record = await journal.resume(earlier)
        prepared, handle, arrival, past = None, None, None, RequestTable(lambda _: None)
        error = None if earlier.error is None else earlier.error.as_error()
        if error is None and earlier.tries >= MAX_TRIES:
            error = UserError("the server failed each time that it went on with this answer", code=REFUSED, status=500)
        if error is None or (ENDPOINTS[stored.path].shows_failures and error.code != REFUSED):
            try:
                arrival = earlier_arrival(earlier.id, stored)
                prepared, handle = await replay(service, arrival, stored, frames, past)
            except UserError as refused:
                error = error or refused
            except Exception:  # a defect of the server
                log.exception("the answer to request %s cannot be rebuilt", stored.request_id)
                error = error or internal_error(stored.request_id)
    except UserError as lost:  # the journal is off, and knows no answers any more
        log.debug("%s", lost)
        return
    journal.rebuilt(earlier)
    streamed = prepared is not None and prepared.call.stream
    numbered = ENDPOINTS[stored.path].numbered
    answer = service.streams.open(earlier.id, earlier.owner, digest_of(stored.body), streamed, numbered)
    answer.record = record
    answer.count(len(stored.body) + len(stored.history))
    if prepared is None or handle is None or arrival is None:
        answer.reduce_to(error or internal_error(stored.request_id))
    elif error is not None:
        await show_end(answer, handle, prepared, error)
    else:
        handle.keep = record.append
        service.request_table.adopt(past)
        track(service, arrival, prepared, handle, 0)
        start(service, answer, handle, prepared)
        if handle.ended:
            await answer.produced()


async def show_end(answer: ResumableAnswer, handle: RequestHandle, prepared: PreparedRequest, error: UserError) -> None:
    """What an answer that has ended with an error was until then, in an API that shows that."""
    encoder, handle.failure = prepared.encoder, None
    answer.describe(encoder, prepared.context)
    outputs = handle.take()

    def encode() -> list[tuple[int, bytes]]:
        return [(encoder.output_tokens, data) for output in outputs for data in encoder.deltas(*output)]

    events = [(0, data) for data in encoder.opening()] + await in_thread(encode, num_values(outputs))
    for num_tokens, data in events if answer.streamed else ():
        answer.append(num_tokens, data)
    answer.fail(error)


def earlier_arrival(stream_id: str, stored: StoredRequest) -> Arrival:
    """The arrival of a request of an earlier process."""
    limits, seeds = ModelLimits(stored.max_model_len, stored.vocab_size), iter(stored.seeds)
    return Arrival(
        stored.request_id,
        stored.created_s,
        lambda: limits,
        call_ids_of(stream_id),
        lambda: next(seeds),
        answer_id=stream_id,
        history=stored.history,
        deadline_s=None if stored.deadline_s is None else time.monotonic() + stored.deadline_s - time.time(),
        key_name=stored.key_name,
    )


async def replay(
    service: OpenAIServing, arrival: Arrival, stored: StoredRequest, frames: Sequence[list[RequestOutput]], past: RequestTable
) -> tuple[PreparedRequest, RequestHandle]:
    """Prepare a request again and give it in the table `past` what has come of it. UserError when it is another one now."""
    endpoint = ENDPOINTS[stored.path]
    body = await decode_object(stored.body, service.large_bodies)
    call, warnings = parse(body, endpoint.schema, service.logged_fields, service.sampling(), endpoint.rules)
    prepared = await endpoint.prepare(service, call, warnings, arrival)
    requests = requests_of(service, prepared.call, prepared.prompts, prepared.params, prepared.shown, arrival.draw_seed)
    if digest_of_requests([request for request, _ in requests]) != stored.digest:
        raise UserError("the answer was begun by a server that made another request of the same body", code=REFUSED, status=410)
    return prepared, await replayed(requests, prepared.call.stream, frames, past)


async def replayed(
    requests: Sequence[tuple[Request, Assembler]], streaming: bool, frames: Sequence[list[RequestOutput]], past: RequestTable
) -> RequestHandle:
    """The handle of requests that have got `frames`."""
    handle = past.open(requests, streaming=streaming, stepwise=streaming)
    for number, frame in enumerate(frames, 1):
        past.receive([replace(message, id=requests[message.id][0].id) for message in frame])
        if number % FRAMES_AT_ONCE == 0:
            await asyncio.sleep(0)  # let other tasks run
    return handle
