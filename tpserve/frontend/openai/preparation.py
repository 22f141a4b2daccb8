"""From a parsed body to all that an answer needs: prompts, sampling parameters, the form of the response.

Pure but for the tokenizer and the compiler of grammars: a request that is prepared again with an equal `Arrival` becomes the same
answer from the same tokens. Admits nothing.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from tpserve.errors import UserError
from tpserve.frontend.openai.chat_answer import AnswerReader
from tpserve.frontend.openai.encoder import AnswerEncoder, ChunkEncoder
from tpserve.frontend.openai.grammar import describes_output, grammar_of
from tpserve.frontend.openai.params import refuse_contradictions
from tpserve.frontend.openai.prompts import Prompt, chat_prompt, completion_prompts, max_new_tokens
from tpserve.frontend.openai.response_builder import (
    ChatResponseBuilder,
    CompletionResponseBuilder,
    ResponseBuilder,
    ResponseMeta,
)
from tpserve.frontend.openai.schema import (
    OPENAI_RULES,
    ChatCompletionRequest,
    CompletionRequest,
    FieldRules,
    GenerationFields,
    SamplingFields,
    StreamOptions,
)
from tpserve.frontend.openai.sequences import params_of, random_seed
from tpserve.frontend.openai.service import ModelLimits, OpenAIServing
from tpserve.frontend.openai.tools import ToolUse, tool_use
from tpserve.frontend.streams import AnswerContext
from tpserve.observe.trace_context import TraceContext
from tpserve.response_template.parser import Place
from tpserve.types.sampling import EngineSamplingParams

DEFAULT_COMPLETION_TOKENS = 16
"""`max_tokens` of a completion without one, as in OpenAI's API."""

GenerationRequest = CompletionRequest | ChatCompletionRequest


@dataclass(frozen=True)
class Arrival:
    """What belongs to a request beside its body. `limits`: UserError 503 unless the engine runs. `call_ids`: the id of a tool
    call by the index of its choice and its number there. `draw_seed`: the seed of a sequence whose request has none.
    `answer_id`: by which the answer may be asked for. `history`: JSON of the conversation before it, for APIs that keep one.
    `deadline_s`: when it must have ended, by `time.monotonic`; None for no deadline. `key_name`: of its client's key.
    `trace`: its place in its client's trace."""

    request_id: str
    created_s: int
    limits: Callable[[], ModelLimits]
    call_ids: Callable[[int, int], str]
    draw_seed: Callable[[], int] = random_seed
    answer_id: str = ""
    history: bytes = b""
    deadline_s: float | None = None
    key_name: str = ""
    trace: TraceContext | None = None


@dataclass(frozen=True)
class PreparedRequest:
    """`params`: of each prompt. `shown`: special tokens that outputs show. `context`: what the API keeps beside the answer."""

    call: GenerationRequest
    meta: ResponseMeta
    prompts: Sequence[Prompt]
    params: Sequence[EngineSamplingParams]
    encoder: AnswerEncoder
    shown: frozenset[int] = frozenset()
    context: AnswerContext | None = None

    @property
    def prompt_tokens(self) -> int:
        """The tokens of all prompts, each counted once."""
        return sum(len(prompt.ids) for prompt in self.prompts)


async def prepare_completion(
    service: OpenAIServing, call: CompletionRequest, warnings: list[str], arrival: Arrival
) -> PreparedRequest:
    """A completions request. UserError for what is wrong with it."""
    meta = response_meta(service, call, warnings, arrival, "cmpl", "text_completion", "text_completion")
    limits = arrival.limits()
    prompts = await completion_prompts(service, call, limits)
    sizes = [max_new_tokens(prompt, call.max_tokens, DEFAULT_COMPLETION_TOKENS, limits, "prompt") for prompt in prompts]
    grammar = await asyncio.to_thread(grammar_of, call) if describes_output(call) else ""
    params = await params_of(service, call, prompts, sizes, limits, grammar)
    builder = CompletionResponseBuilder(meta, call, prompts, service.tokenizer)
    return PreparedRequest(call, meta, prompts, params, chunk_encoder(service, call, builder, meta, prompts))


def chunk_encoder(
    service: OpenAIServing, call: SamplingFields, builder: ResponseBuilder, meta: ResponseMeta, prompts: Sequence[Prompt]
) -> ChunkEncoder:
    """What encodes the answer of a completion or a chat completion, with what the server adds to it."""
    options = StreamOptions(include_usage=True, continuous_usage_stats=True) if service.forces_usage else call.stream_options
    return ChunkEncoder(builder, meta, prompts, options, shows_times=service.shows_times and call.n * len(prompts) == 1)


async def prepare_chat(
    service: OpenAIServing, call: ChatCompletionRequest, warnings: list[str], arrival: Arrival
) -> PreparedRequest:
    """A chat completions request. UserError for what is wrong with it."""

    def encoder(builder: ChatResponseBuilder) -> AnswerEncoder:
        return chunk_encoder(service, call, builder, builder.meta, [builder.prompt])

    return await prepare_conversation(service, call, warnings, arrival, encoder)


async def prepare_conversation(
    service: OpenAIServing,
    call: ChatCompletionRequest,
    warnings: list[str],
    arrival: Arrival,
    encoder: Callable[[ChatResponseBuilder], AnswerEncoder],
    *,
    prefix: str = "chatcmpl",
    cuts_length: bool = False,
) -> PreparedRequest:
    """A chat completions request whose answer has the form of `encoder`. `prefix`: of its id. `cuts_length`: a length beyond the
    context is cut, not refused. UserError for what is wrong."""
    warnings = warnings + service.answers.unheeded(call, service.chat_template.source or "")
    meta = response_meta(service, call, warnings, arrival, prefix, "chat.completion", "chat.completion.chunk")
    limits = arrival.limits()
    use = tool_use(call)
    service.answers.refuse_tools(use)
    prompt = await chat_prompt(service, call, limits, arrived_s=arrival.created_s)
    tail, place = service.answers.tail(prompt.text)
    requested = call.max_completion_tokens if call.max_completion_tokens is not None else call.max_tokens
    default = requested if cuts_length else service.defaults.max_tokens
    size = max_new_tokens(prompt, None if cuts_length else requested, default, limits, "messages")
    grammar = await chat_grammar(service, call, use, place)
    params = await params_of(service, call, [prompt], [size], limits, grammar)
    readers = [
        AnswerReader(service.answers, call, use, tail, partial(arrival.call_ids, index), constrained=bool(grammar))
        for index in range(call.n)
    ]
    builder = ChatResponseBuilder(meta, call, prompt, service.tokenizer, readers)
    return PreparedRequest(call, meta, [prompt], params, encoder(builder), service.answers.shown(use))


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


def response_meta(
    service: OpenAIServing,
    call: GenerationRequest,
    warnings: list[str],
    arrival: Arrival,
    prefix: str,
    kind: str,
    chunk_kind: str,
) -> ResponseMeta:
    """Check the fields that both request types share, and return the fields that all chunks of the response share."""
    model = service.served_name(call.model)
    refuse_contradictions(call)
    return ResponseMeta(f"{prefix}-{arrival.request_id}", kind, chunk_kind, model, arrival.created_s, warnings)


@dataclass(frozen=True)
class Endpoint:
    """A route that generates: the schema of its body, and what prepares a request of that schema. `numbered`: whether the ids of
    a stream's events are their numbers, not positions in tokens. `shows_failures`: whether a failed answer has a JSON form."""

    path: str
    schema: type[GenerationFields]
    prepare: Callable[[OpenAIServing, Any, list[str], Arrival], Coroutine[Any, Any, PreparedRequest]]
    rules: FieldRules = OPENAI_RULES
    numbered: bool = False
    shows_failures: bool = False


COMPLETIONS = Endpoint("/v1/completions", CompletionRequest, prepare_completion)
CHAT_COMPLETIONS = Endpoint("/v1/chat/completions", ChatCompletionRequest, prepare_chat)
