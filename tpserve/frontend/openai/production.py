"""How an answer that outlives its connection is made: a task of its own reads the handle of the request and writes events, or one
JSON text, into a `ResumableAnswer`. With a journal it writes only what is settled there. Owns no state.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence

import msgspec
from msgspec.structs import replace

from tpserve.engine_client.requests import RequestHandle, RequestTable
from tpserve.errors import UserError
from tpserve.frontend.openai.errors import internal_error
from tpserve.frontend.openai.preparation import Arrival, PreparedRequest
from tpserve.frontend.openai.prompts import in_thread
from tpserve.frontend.openai.sender import num_values, whole_answer
from tpserve.frontend.openai.service import OpenAIServing
from tpserve.frontend.streams import ResumableAnswer
from tpserve.frontend.tracing import span_reporter
from tpserve.journal.journal import StoredRequest
from tpserve.types.request import Request

log = logging.getLogger(__name__)


def call_ids_of(stream_id: str) -> Callable[[int, int], str]:
    """Ids of tool calls that are the same whenever the answer is written, and unlike those of any other answer."""
    key = stream_id.encode()

    def call_id(choice: int, number: int) -> str:
        return f"call_{hashlib.blake2b(f'{choice}.{number}'.encode(), key=key, digest_size=12).hexdigest()}"

    return call_id


def digest_of(body: bytes) -> bytes:
    """The digest by which a repeated request is recognized."""
    return hashlib.sha256(body).digest()


def digest_of_requests(requests: Sequence[Request]) -> bytes:
    """A digest of engine requests, without their ids."""
    digest = hashlib.blake2b(digest_size=16)
    for request in requests:
        digest.update(msgspec.msgpack.encode(replace(request, id=0)))
    return digest.digest()


def track(service: OpenAIServing, arrival: Arrival, prepared: PreparedRequest, handle: RequestHandle, prompt_tokens: int) -> None:
    """Let the server know whose an admitted request is, how it may be ended, and when it must have. `prompt_tokens`: to count."""
    ids = frozenset({arrival.request_id, prepared.meta.id, arrival.answer_id} - {""})
    operation = "text_completion" if prepared.meta.kind == "text_completion" else "chat"
    on_end = span_reporter(service.spans, prepared.meta.id, prepared.meta.model, operation, arrival.trace)
    service.open_requests.add(
        handle, ids, key_name=arrival.key_name, deadline_s=arrival.deadline_s, prompt_tokens=prompt_tokens, on_end=on_end
    )


def start(service: OpenAIServing, answer: ResumableAnswer, handle: RequestHandle, prepared: PreparedRequest) -> None:
    """Let a task write the output of `handle` into `answer`."""
    answer.describe(prepared.encoder, prepared.context)
    if answer.ended:  # it is larger than what is kept, before anything has come
        service.request_table.abort(handle)
    else:
        answer.run(produce(answer, service.request_table, handle, prepared))


def record(
    service: OpenAIServing, answer: ResumableAnswer, path: str, body: bytes, arrival: Arrival, handle: RequestHandle
) -> None:
    """Give the answer its place in the journal, if the server has one: the next frontend will go on with it."""
    journal = service.journal
    if journal is None or journal.reason:
        return
    requests, limits = [sequence.request for sequence in handle.sequences], service.limits()
    stored = StoredRequest(
        path=path,
        body=body,
        request_id=arrival.request_id,
        created_s=arrival.created_s,
        seeds=tuple(request.seed for request in requests),
        max_model_len=limits.max_model_len,
        vocab_size=limits.vocab_size,
        digest=digest_of_requests(requests),
        history=arrival.history,
        key_name=arrival.key_name,
        deadline_s=None if arrival.deadline_s is None else time.time() + arrival.deadline_s - time.monotonic(),
    )
    answer.record = journal.open(answer.id, answer.owner, stored)
    answer.count(len(body) + len(arrival.history))
    handle.keep = answer.record.append


async def produce(answer: ResumableAnswer, request_table: RequestTable, handle: RequestHandle, prepared: PreparedRequest) -> None:
    """Write the output of `handle` into `answer` until its end. Cancelled, it aborts what is left."""
    try:
        if answer.streamed:
            await produce_events(answer, handle, prepared)
            answer.finish(prepared.encoder.body())
        else:
            body = await whole_answer(handle, prepared)
            await answer.recorded()
            answer.finish(body)
    except UserError as error:
        if handle.cut_off:
            answer.suspend(error)
        else:
            answer.fail(error)
    except Exception:  # a defect of the server
        log.exception("the answer to request %s failed", prepared.meta.id)
        answer.fail(internal_error(prepared.meta.id))
    finally:
        request_table.abort(handle)


async def produce_events(answer: ResumableAnswer, handle: RequestHandle, prepared: PreparedRequest) -> None:
    """Write all events of a stream. Raises the handle's failure."""
    encoder, ended = prepared.encoder, False

    def encode() -> list[tuple[int, bytes]]:
        return [(encoder.output_tokens, data) for output in outputs for data in encoder.deltas(*output)]

    for data in encoder.opening():
        answer.append(0, data)
    while not ended:
        await handle.wait()
        ended = handle.ended
        outputs = handle.take()
        if answer.record is not None:
            await (answer.record.committed() if ended else answer.record.settled())
        for num_tokens, data in await in_thread(encode, num_values(outputs)):
            answer.append(num_tokens, data)
    for data in encoder.closing():
        answer.append(encoder.output_tokens, data)
