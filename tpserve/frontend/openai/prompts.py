"""Token ids of a request's prompt or messages.

Owns the forms of `prompt`, the messages for the chat template, and the arithmetic of the context length. Admits nothing. Long
texts are tokenized in a thread, so that streams continue; a text that is too long for any tokens is not tokenized at all.
"""

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tpserve.errors import UserError
from tpserve.frontend.openai.messages import num_chars, template_messages
from tpserve.frontend.openai.schema import ChatCompletionRequest, CompletionRequest, TokenizeChatRequest
from tpserve.frontend.openai.service import ModelLimits, OpenAIServing
from tpserve.frontend.openai.token_ids import check_ids, refuse_unknown
from tpserve.frontend.openai.tools import tool_use
from tpserve.text.fill_in import fill_in_ids
from tpserve.text.tokenizer import Tokenizer, TooManyTokens

T = TypeVar("T")

THREAD_SIZE = 4096
"""Work of at least this size runs in a thread; smaller work takes about as long as the switch to one."""
MESSAGE_SIZE = 64
"""The cost of checking and rendering a message apart from its text, in characters to tokenize."""


@dataclass(frozen=True)
class Prompt:
    """`text` is the client's text, or the text of the client's ids without the last `num_open`, which the output may change."""

    ids: list[int]
    text: str
    num_open: int = 0


async def completion_prompts(
    service: OpenAIServing, call: CompletionRequest, limits: ModelLimits, max_prompt_tokens: int | None = None
) -> list[Prompt]:
    """The prompts of a completions request, in order.

    UserError for a prompt of more than `max_prompt_tokens` tokens (default: the maximum length of a sequence).
    """
    cut = cut_length(call, limits)
    items = checked_items(service, call, limits, cut)
    if cut is not None:
        max_prompt_tokens = sys.maxsize
    tokenizer = service.tokenizer

    def build(item: str | list[int]) -> Prompt:
        if call.suffix:
            prompt = fill_in_prompt(service, call, item, limits)
        elif isinstance(item, str):
            ids = encode(tokenizer, item, call.add_special_tokens, limits, max_prompt_tokens, "prompt")
            prompt = Prompt(ids, item)
            if cut is not None and len(ids) > cut:
                prompt = echo_prompt(tokenizer, truncated(ids, cut, call.truncation_side), call.skip_special_tokens)
        else:
            check_ids(item, limits.vocab_size, "prompt")
            item = item if cut is None else truncated(item, cut, call.truncation_side)
            prompt = echo_prompt(tokenizer, item, call.skip_special_tokens) if call.echo else Prompt(item, "")
        if not prompt.ids:
            raise UserError("prompt is empty: the model needs at least one token to continue", param="prompt")
        refuse_unknown(prompt.ids, tokenizer, limits, "prompt")
        return prompt

    return await in_thread(lambda: [build(item) for item in items], sum(len(item) + len(call.suffix) for item in items))


def checked_items(service: OpenAIServing, call: CompletionRequest, limits: ModelLimits, cut: int | None) -> list[str | list[int]]:
    """The prompts as they came. UserError for too many, and for one that is too long by its number of characters or ids."""
    items = split_prompt(call.prompt)
    if len(items) > service.max_open:
        raise UserError(
            f"prompt: {len(items)} prompts, this server holds {service.max_open} at once; split the request", param="prompt"
        )
    refuse_too_long(call.suffix, service.tokenizer, limits, "suffix")
    for item in items:
        if isinstance(item, str):
            refuse_too_long(item, service.tokenizer, limits, "prompt")
        elif len(item) > limits.max_model_len and cut is None:
            raise too_long(limits.max_model_len, f"your prompt has {len(item)} tokens", "prompt")
    return items


def cut_length(call: CompletionRequest | ChatCompletionRequest, limits: ModelLimits) -> int | None:
    """The number of tokens to which `truncate_prompt_tokens` cuts a prompt; -1 leaves room for one new token. None: no cut."""
    wanted = call.truncate_prompt_tokens
    return None if wanted is None else limits.max_model_len - 1 if wanted < 0 else wanted


def truncated(ids: list[int], length: int, side: str) -> list[int]:
    """At most `length` ids; `side`: where they are cut off."""
    return ids[max(0, len(ids) - length) :] if side == "left" else ids[:length]


def fill_in_prompt(service: OpenAIServing, call: CompletionRequest, prefix: str | list[int], limits: ModelLimits) -> Prompt:
    """The prompt for what stands between `prefix` and the request's suffix."""
    if not isinstance(prefix, str):
        raise UserError("suffix goes with texts, not with token ids", param="suffix", code="invalid_value")
    ids = fill_in_ids(service.tokenizer, prefix, call.suffix, call.add_special_tokens)
    if len(ids) > limits.max_model_len:
        raise too_long(limits.max_model_len, f"your prompt has {len(ids)} tokens", "suffix")
    return Prompt(ids, "")


def echo_prompt(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool) -> Prompt:
    """A prompt of token ids with the part of its text that no output can change."""
    num_open = tokenizer.num_open(ids, skip_special_tokens)
    return Prompt(ids, tokenizer.decode_many(ids[: len(ids) - num_open], skip_special_tokens), num_open)


async def chat_prompt(
    service: OpenAIServing,
    call: ChatCompletionRequest | TokenizeChatRequest,
    limits: ModelLimits,
    max_prompt_tokens: int | None = None,
    arrived_s: float | None = None,
) -> Prompt:
    """The prompt that the chat template makes of the messages. `arrived_s`: the time that it sees; None is now.

    UserError when it has more than `max_prompt_tokens` tokens (default: the maximum length of a sequence).
    """
    tokenizer, cut, side, documents = service.tokenizer, None, "", list[dict[str, Any]]()
    declared: Sequence[Mapping[str, Any]] = call.tools
    variables = call.chat_template_kwargs
    if isinstance(call, ChatCompletionRequest):
        cut, side, documents = cut_length(call, limits), call.truncation_side, call.documents
        declared = tool_use(call).declared
        variables = {**service.answers.variables(call.reasoning_effort, call.enable_thinking), **variables}
    if cut is not None:
        max_prompt_tokens = sys.maxsize

    def build() -> Prompt:
        messages = template_messages(call.messages, service.answers.messages)
        content_chars = sum(map(num_chars, messages))
        if content_chars > limits.max_model_len * tokenizer.longest_token_chars:
            raise too_long(limits.max_model_len, f"the messages have {content_chars} characters", "messages")
        text = service.chat_template.render(
            messages,
            add_generation_prompt=call.add_generation_prompt,
            continue_final_message=call.continue_final_message,
            variables=variables,
            documents=documents,
            tools=declared,
            now_s=arrived_s,
        )
        ids = encode(tokenizer, text, call.add_special_tokens, limits, max_prompt_tokens, "messages")
        if cut is not None and len(ids) > cut:
            ids = truncated(ids, cut, side)
            text = tokenizer.decode_many(ids, skip_special_tokens=False)
        if not ids:
            raise UserError("the chat template made an empty prompt of the messages", param="messages")
        refuse_unknown(ids, tokenizer, limits, "messages")
        return Prompt(ids, text)

    size = sum(map(message_cost, call.messages)) + MESSAGE_SIZE * len(call.chat_template_kwargs)
    return await in_thread(build, THREAD_SIZE if call.tools else size)


def message_cost(message: dict[str, Any]) -> int:
    """The cost of checking, rendering and tokenizing a message, in characters to tokenize."""
    return MESSAGE_SIZE + sum(len(value) for value in message.values() if isinstance(value, str | list | dict))


def encode(
    tokenizer: Tokenizer, text: str, add_special_tokens: bool, limits: ModelLimits, max_prompt_tokens: int | None, param: str
) -> list[int]:
    """The ids of a text. UserError for more than `max_prompt_tokens` (default: the maximum length of a sequence)."""
    try:
        return tokenizer.encode(
            text, add_special_tokens, limits.max_model_len if max_prompt_tokens is None else max_prompt_tokens
        )
    except TooManyTokens as error:
        raise too_long(limits.max_model_len, f"your prompt has {error.count} tokens", param) from None


def max_new_tokens(prompt: Prompt, requested: int | None, default: int | None, limits: ModelLimits, param: str) -> int:
    """The number of tokens that a sequence may generate.

    `requested` must fit into the context (UserError); without it `default` is cut to fit, and None means all that is left.
    """
    length = len(prompt.ids)
    left = limits.max_model_len - length
    if left < min(1, requested if requested is not None else 1):
        raise too_long(limits.max_model_len, f"your prompt has {length} tokens", param)
    if requested is not None and requested > left:
        detail = f"you requested {length + requested} tokens ({length} in the prompt, {requested} in the completion)"
        raise too_long(limits.max_model_len, detail, param)
    return min(default or left, left) if requested is None else requested


def too_long(max_model_len: int, detail: str, param: str) -> UserError:
    """The error for a request beyond the context length, in OpenAI's words."""
    limit = f"This model's maximum context length is {max_model_len} tokens."
    text = f"{limit} However, {detail}; shorten the prompt or lower max_tokens."
    return UserError(text, param=param, code="context_length_exceeded")


def split_prompt(prompt: str | list[Any]) -> list[str | list[int]]:
    """A list with one item per prompt, each a text or token ids. UserError for an empty list."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise UserError("prompt is empty; send a text, texts, token ids, or lists of token ids", param="prompt")
    if all(isinstance(item, str) for item in prompt) or all(isinstance(item, list) for item in prompt):
        return list(prompt)
    return [prompt]


def refuse_too_long(text: str, tokenizer: Tokenizer, limits: ModelLimits, param: str) -> None:
    """UserError for a text that is too long even if each of its tokens is the longest of the vocabulary."""
    if len(text) > limits.max_model_len * tokenizer.longest_token_chars:
        raise too_long(limits.max_model_len, f"your prompt has {len(text)} characters", param)


async def in_thread(work: Callable[[], T], size: int) -> T:
    """The result of `work`, run in a thread if it is large. `size`: characters to tokenize or numbers to encode, 1 us each."""
    return work() if size < THREAD_SIZE else await asyncio.to_thread(work)
