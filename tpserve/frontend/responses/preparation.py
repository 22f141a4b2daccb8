"""From a Responses request to all that its answer needs, by way of the chat request that answers it.

Pure like the preparation of chat: the same body with the same arrival, history included, becomes the same answer.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from tpserve.errors import UserError
from tpserve.frontend.openai.errors import Json
from tpserve.frontend.openai.preparation import Arrival, Endpoint, PreparedRequest, prepare_conversation
from tpserve.frontend.openai.prompts import Prompt, chat_prompt, in_thread, message_cost
from tpserve.frontend.openai.renaming import renamed
from tpserve.frontend.openai.response_builder import ChatResponseBuilder
from tpserve.frontend.openai.service import OpenAIServing
from tpserve.frontend.responses.conversion import NAMES, chat_request
from tpserve.frontend.responses.encoder import ResponseEncoder
from tpserve.frontend.responses.items import input_items, without_beginning
from tpserve.frontend.responses.schema import RULES, InputFields, ResponseRequest

T = TypeVar("T")
PREFIX = "resp_"
TOO_LONG = "context_length_exceeded"


class History(Struct, frozen=True):
    """What a request names and its body has not. `items`: the conversation before it. `referenced`: single items by their ids."""

    items: list[dict[str, Any]] = []
    referenced: dict[str, dict[str, Any]] = {}


@dataclass(frozen=True)
class ResponseContext:
    """What stays beside a response. `items`: JSON of its input, with the conversation before it."""

    items: bytes
    background: bool

    @property
    def num_bytes(self) -> int:
        return len(self.items)


async def prepare_response(
    service: OpenAIServing, call: ResponseRequest, warnings: list[str], arrival: Arrival
) -> PreparedRequest:
    """A Responses request. UserError for what is wrong with it."""
    items = await conversation(call, arrival.history, arrival.answer_id)
    is_kept = keeps(service, call)
    size = sum(map(message_cost, items))

    async def attempt(kept: Sequence[Json]) -> PreparedRequest:
        def encoder(builder: ChatResponseBuilder) -> ResponseEncoder:
            fields = fixed_fields(call, arrival, builder, is_kept=is_kept)
            return ResponseEncoder(builder, fields, arrival.answer_id, background=call.background)

        chat = await in_thread(lambda: chat_request(call, kept), size)
        return await prepare_conversation(service, chat, warnings, arrival, encoder, prefix="resp")

    prepared = await fitting(call, items, attempt)
    context = ResponseContext(msgspec.json.encode(items), call.background) if is_kept else None
    return PreparedRequest(
        prepared.call, prepared.meta, prepared.prompts, prepared.params, prepared.encoder, prepared.shown, context
    )


async def counted_prompt(service: OpenAIServing, call: InputFields, history: bytes, max_tokens: int) -> Prompt:
    """The prompt of a request that is not answered. UserError for one of more than `max_tokens`."""
    items = await conversation(call, history, "")
    try:
        return await chat_prompt(service, chat_request(call, items), service.limits(), max_tokens)
    except UserError as error:
        raise renamed(error, NAMES) from error


def keeps(service: OpenAIServing, call: ResponseRequest) -> bool:
    """Whether the response is stored."""
    return service.streams.window_s > 0 and call.store is not False


async def conversation(call: InputFields, history: bytes, answer_id: str) -> list[Json]:
    """All items that a request is about. UserError names the wrong one."""

    def build() -> list[Json]:
        before = msgspec.json.decode(history, type=History) if history else History()
        return [*before.items, *input_items(call.input, answer_id, before.referenced)]

    return await in_thread(build, len(history) + (0 if isinstance(call.input, str) else sum(map(message_cost, call.input))))


async def fitting(call: InputFields, items: list[Json], attempt: Callable[[Sequence[Json]], Awaitable[T]]) -> T:
    """The result of `attempt` with all items; with truncation, of as many as fit, which then begin with a user's message."""
    try:
        return await attempt(items)
    except UserError as error:
        if call.truncation == "disabled" or error.code != TOO_LONG:
            raise renamed(error, NAMES) from error
        too_long = error
    starts = [number for number, item in enumerate(items) if number and item.get("role") == "user"]
    found: list[T] = []
    low, high = 0, len(starts) - 1
    while low <= high:
        middle = (low + high) // 2
        try:
            found = [await attempt(without_beginning(items, starts[middle]))]
            high = middle - 1
        except UserError as error:
            if error.code != TOO_LONG:
                raise renamed(error, NAMES) from error
            low = middle + 1
    if not found:
        raise renamed(too_long, NAMES) from too_long
    return found[0]


def fixed_fields(call: ResponseRequest, arrival: Arrival, builder: ChatResponseBuilder, *, is_kept: bool) -> Json:
    """The members of a response object that do not change while it is made."""
    fields = {
        "id": response_id(arrival.answer_id),
        "object": "response",
        "created_at": arrival.created_s,
        "model": builder.meta.model,
        "background": call.background,
        "instructions": call.instructions,
        "max_output_tokens": call.max_output_tokens,
        "max_tool_calls": call.max_tool_calls,
        "metadata": call.metadata,
        "parallel_tool_calls": call.parallel_tool_calls,
        "previous_response_id": call.previous_response_id,
        "prompt_cache_key": call.prompt_cache_key,
        "prompt_cache_retention": call.prompt_cache_retention,
        "reasoning": {"effort": call.reasoning.effort, "summary": None},
        "safety_identifier": call.safety_identifier,
        "service_tier": "default",
        "store": is_kept,
        "temperature": call.temperature,
        "text": {"format": call.text.format or {"type": "text"}, "verbosity": "medium"},
        "tool_choice": call.tool_choice or "auto",
        "tools": [{"description": None, "parameters": None, "strict": None, **tool} for tool in call.tools],
        "top_logprobs": call.top_logprobs or 0,
        "top_p": call.top_p,
        "truncation": call.truncation,
        "user": call.user,
    }
    return fields | ({"warnings": builder.meta.warnings} if builder.meta.warnings else {})


def response_id(answer_id: str) -> str:
    """The id of a response, whose answer has this id."""
    return PREFIX + answer_id


RESPONSES = Endpoint("/v1/responses", ResponseRequest, prepare_response, RULES, numbered=True, shows_failures=True)
