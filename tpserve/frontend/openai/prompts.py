"""From a call's prompt or messages to token ids that fit the model.

Owns the shapes of `prompt`, the messages a chat template gets, and the context arithmetic. Never admits anything. Long texts
are tokenized in a thread, so that streams go on, and texts that cannot fit whatever their tokens are not tokenized at all.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from tpserve.errors import UserError
from tpserve.frontend.openai.errors import shown
from tpserve.frontend.openai.schema import ChatCompletionRequest, CompletionRequest, TokenizeChatRequest
from tpserve.frontend.openai.service import ModelLimits, OpenAIServing
from tpserve.frontend.openai.token_ids import check_ids, refuse_unknown
from tpserve.text.tokenizer import Tokenizer, TooManyTokens

T = TypeVar("T")

THREAD_SIZE = 4096
"""From this size on work goes to a thread; less than that takes about as long as the switch."""
MESSAGE_SIZE = 64
"""What a message costs to check and to render beside its text, in characters to tokenize."""


@dataclass(frozen=True)
class Prompt:
    """`text` is what the client sent, or the text of the ids it sent without the last `num_open`, which the output may change."""

    ids: list[int]
    text: str
    num_open: int = 0


async def completion_prompts(
    service: OpenAIServing, call: CompletionRequest, limits: ModelLimits, at_most: int | None = None
) -> list[Prompt]:
    """The prompts of a completions call, in order: a text, texts, ids, or lists of ids. UserError for one of more than `at_most`
    tokens, by default as many as a sequence may have."""
    items = split_prompt(call.prompt)
    if len(items) > service.max_open:
        raise UserError(
            f"prompt: {len(items)} prompts, this server holds {service.max_open} at once; split the request", param="prompt"
        )
    for item in items:
        if isinstance(item, str):
            refuse_too_long(item, service.tokenizer, limits, "prompt")
        elif len(item) > limits.max_model_len:
            raise too_long(limits.max_model_len, f"your prompt has {len(item)} tokens", "prompt")
    tokenizer = service.tokenizer

    def made(item: str | list[int]) -> Prompt:
        if isinstance(item, str):
            ids = encoded(tokenizer, item, call.add_special_tokens, limits, at_most, "prompt")
            prompt = Prompt(ids, item)
        else:
            check_ids(item, limits.vocab_size, "prompt")
            prompt = echoed(tokenizer, item, call.skip_special_tokens) if call.echo else Prompt(item, "")
        if not prompt.ids:
            raise UserError("prompt is empty: the model needs at least one token to continue", param="prompt")
        refuse_unknown(prompt.ids, tokenizer, limits, "prompt")
        return prompt

    return await in_thread(lambda: [made(item) for item in items], sum(len(item) for item in items))


def echoed(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool) -> Prompt:
    """A prompt of ids with its text, as far as no output changes it."""
    num_open = tokenizer.num_open(ids, skip_special_tokens)
    return Prompt(ids, tokenizer.decode_many(ids[: len(ids) - num_open], skip_special_tokens), num_open)


async def chat_prompt(
    service: OpenAIServing, call: ChatCompletionRequest | TokenizeChatRequest, limits: ModelLimits, at_most: int | None = None
) -> Prompt:
    """The prompt of a conversation through the model's template. UserError when it has more than `at_most` tokens, by default as
    many as a sequence may have."""
    tokenizer = service.tokenizer

    def made() -> Prompt:
        messages = [plain_message(message, index) for index, message in enumerate(call.messages)]
        content_chars = sum(map(num_chars, messages))
        if content_chars > limits.max_model_len * tokenizer.longest_token_chars:
            raise too_long(limits.max_model_len, f"the messages have {content_chars} characters", "messages")
        text = service.chat_template.render(
            messages,
            add_generation_prompt=call.add_generation_prompt,
            continue_final_message=call.continue_final_message,
            variables=call.chat_template_kwargs,
        )
        ids = encoded(tokenizer, text, call.add_special_tokens, limits, at_most, "messages")
        if not ids:
            raise UserError("the chat template made an empty prompt of the messages", param="messages")
        refuse_unknown(ids, tokenizer, limits, "messages")
        return Prompt(ids, text)

    return await in_thread(made, sum(map(size_of, call.messages)) + MESSAGE_SIZE * len(call.chat_template_kwargs))


def size_of(message: dict[str, Any]) -> int:
    """About how long a message takes to check, render and tokenize, in characters to tokenize."""
    return MESSAGE_SIZE + sum(len(value) for value in message.values() if isinstance(value, str | list | dict))


def encoded(
    tokenizer: Tokenizer, text: str, add_special_tokens: bool, limits: ModelLimits, at_most: int | None, param: str
) -> list[int]:
    """The ids of a text. UserError beyond `at_most`, by default as many as a sequence may have."""
    try:
        return tokenizer.encode(text, add_special_tokens, limits.max_model_len if at_most is None else at_most)
    except TooManyTokens as error:
        raise too_long(limits.max_model_len, f"your prompt has {error.count} tokens", param) from None


def max_new_tokens(prompt: Prompt, asked: int | None, default: int | None, limits: ModelLimits, param: str) -> int:
    """How many tokens a sequence may generate. `asked` must fit whole, be it 0; `default` (None: all that is left) is cut."""
    length = len(prompt.ids)
    left = limits.max_model_len - length
    if left < min(1, asked if asked is not None else 1):
        raise too_long(limits.max_model_len, f"your prompt has {length} tokens", param)
    if asked is not None and asked > left:
        detail = f"you requested {length + asked} tokens ({length} in the prompt, {asked} in the completion)"
        raise too_long(limits.max_model_len, detail, param)
    return min(default or left, left) if asked is None else asked


def too_long(max_model_len: int, detail: str, param: str) -> UserError:
    limit = f"This model's maximum context length is {max_model_len} tokens."
    text = f"{limit} However, {detail}; shorten the prompt or lower max_tokens."
    return UserError(text, param=param, code="context_length_exceeded")


def split_prompt(prompt: str | list[Any]) -> list[str | list[int]]:
    """One entry a prompt. UserError for an empty or a mixed list."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise UserError("prompt is empty; send a text, texts, token ids, or lists of token ids", param="prompt")
    if all(isinstance(item, str) for item in prompt) or all(isinstance(item, list) for item in prompt):
        return list(prompt)
    return [prompt]


def refuse_too_long(text: str, tokenizer: Tokenizer, limits: ModelLimits, param: str) -> None:
    """A token stands for so many characters at most, so some texts need no tokenizing to be too long."""
    if len(text) > limits.max_model_len * tokenizer.longest_token_chars:
        raise too_long(limits.max_model_len, f"your prompt has {len(text)} characters", param)


def plain_message(message: dict[str, Any], index: int) -> dict[str, Any]:
    """A message as templates expect it: nulls left out; what this server cannot show the model is refused."""
    where = f"messages[{index}]"
    message = {name: value for name, value in message.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str):
        raise UserError(f"{where}.role must be a string", param=f"{where}.role")
    if role in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        raise UserError(f"{where}: tools are not supported by this server", param=where, code="unsupported_parameter")
    content = message.get("content")
    if isinstance(content, list):
        for at, part in enumerate(content):
            check_part(part, f"{where}.content[{at}]")
        message["content"] = content or ""
    elif not isinstance(content, str):
        raise UserError(f"{where}.content must be a string or a list of text parts", param=f"{where}.content")
    return message


def num_chars(message: dict[str, Any]) -> int:
    content = message["content"]
    return len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)


def check_part(part: Any, where: str) -> None:
    """UserError unless it is a text part."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise UserError(f"{where}: only text parts are supported, got {shown(kind)}", param=where, code="unsupported_parameter")


async def in_thread(work: Callable[[], T], size: int) -> T:
    """`size`: characters to tokenize, or numbers to turn into JSON; either takes about a microsecond."""
    return work() if size < THREAD_SIZE else await asyncio.to_thread(work)
