"""Turns the arguments of a call into one `PromptJob` a prompt. Pure. Checks shapes only; the content is checked later."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tpserve.errors import UserError
from tpserve.llm.params import SamplingParams

Ids = Sequence[int]
PromptInput = str | Ids | Mapping[str, Any]
Priority = int | Sequence[int] | None
"""One for all prompts, or one for each. Lower values run first."""


@dataclass(frozen=True)
class PromptJob:
    """One prompt: a `text`, or token `ids` (with their text where the caller passed both), or a conversation, for which `chat`
    holds the messages and the arguments of the template. `fields`: fields of the request besides those of `params`."""

    params: SamplingParams
    text: str | None = None
    ids: list[int] | None = None
    chat: Mapping[str, Any] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


def jobs(
    prompts: PromptInput | Sequence[PromptInput], params: SamplingParams | Sequence[SamplingParams], priority: Priority
) -> list[PromptJob]:
    """One job a prompt, in order. Raises UserError for arguments of a wrong shape."""
    single = isinstance(prompts, str | Mapping) or _are_ids(prompts)
    if not single and not isinstance(prompts, Iterable):
        raise UserError(f"prompts must be a prompt or a list of them, not {type(prompts).__name__}", param="prompts")
    items: list[Any] = [prompts] if single else list(prompts)
    rows = zip(items, _params(params, len(items)), _priorities(priority, len(items)), strict=True)
    return [_job(item, index, own, fields) for index, (item, own, fields) in enumerate(rows)]


def chats(
    messages: Sequence[Any],
    params: SamplingParams | Sequence[SamplingParams],
    priority: Priority,
    arguments: Mapping[str, Any],
) -> list[PromptJob]:
    """One job a conversation. `messages`: one conversation, or a list of them. `arguments`: those of the chat template."""
    if not isinstance(messages, list | tuple):
        raise UserError("messages must be a list of messages, or a list of such lists", param="messages")
    conversations: list[Any] = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
    rows = zip(conversations, _params(params, len(conversations)), _priorities(priority, len(conversations)), strict=True)
    return [PromptJob(own, chat={**arguments, "messages": one}, fields=fields) for one, own, fields in rows]


def _params(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, list | tuple) or len(params) != count or not all(isinstance(own, SamplingParams) for own in params):
        raise UserError(
            f"sampling_params must be one SamplingParams or a list of {count}, one for each prompt", param="sampling_params"
        )
    return list(params)


def _priorities(priority: Priority, count: int) -> list[dict[str, Any]]:
    if not isinstance(priority, list | tuple):
        return [{"priority": priority}] * count
    if len(priority) != count:
        raise UserError(f"priority must be one number or a list of {count}, one for each prompt", param="priority")
    return [{"priority": one} for one in priority]


def _job(item: Any, index: int, params: SamplingParams, fields: dict[str, Any]) -> PromptJob:
    where, text = f"prompts[{index}]", None
    if isinstance(item, Mapping):
        members = {key: value for key, value in item.items() if value is not None}
        if unknown := [key for key in members if key not in ("prompt", "prompt_token_ids", "cache_salt")]:
            raise UserError(f"{where}: {unknown[0]} is not supported: leave it out", param=where)
        text = members.pop("prompt", None)
        item = members.pop("prompt_token_ids", text)
        fields = {**fields, **members}
        if item is None:
            raise UserError(f"{where} must hold 'prompt' or 'prompt_token_ids'", param=where)
    if isinstance(item, str):
        return PromptJob(params, text=item, fields=fields)
    if _are_ids(item) or (isinstance(item, list | tuple) and not item):
        return PromptJob(params, text, list(item), fields=fields)
    odd = next((type(one).__name__ for one in item if not isinstance(one, int)), "") if isinstance(item, list | tuple) else ""
    kind = f"a {type(item).__name__} of {odd}" if odd else type(item).__name__
    raise UserError(f"{where} must be a text or a list of token ids, not {kind}", param=where)


def _are_ids(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(id, int) for id in value)
