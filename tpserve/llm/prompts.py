"""The prompts of a call in all their shapes, each beside what is asked for it. Pure; what a prompt holds is checked later."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpserve.errors import UserError
from tpserve.llm.params import SamplingParams

Ids = Sequence[int]
PromptInput = str | Ids | Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """One prompt: a text or ids, or the messages of a conversation, for which `chat` holds the template's arguments."""

    params: SamplingParams
    text: str | None = None
    ids: list[int] | None = None
    chat: Mapping[str, Any] | None = None


def jobs(prompts: PromptInput | Sequence[PromptInput], params: SamplingParams | Sequence[SamplingParams]) -> list[Job]:
    """One a prompt, in order. UserError for a shape that means nothing."""
    single = isinstance(prompts, str | Mapping) or _are_ids(prompts)
    items: list[Any] = [prompts] if single else list(prompts)
    return [_job(item, index, own) for index, (item, own) in enumerate(zip(items, _spread(params, len(items)), strict=True))]


def chats(messages: Sequence[Any], params: SamplingParams | Sequence[SamplingParams], arguments: Mapping[str, Any]) -> list[Job]:
    """One a conversation: a list of messages, or a list of such lists."""
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError("messages must be a list of messages, or a list of such lists", param="messages")
    conversations: list[Any] = [messages] if isinstance(messages[0], Mapping) else list(messages)
    spread = _spread(params, len(conversations))
    return [Job(own, chat={**arguments, "messages": one}) for one, own in zip(conversations, spread, strict=True)]


def _spread(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count or not all(isinstance(own, SamplingParams) for own in params):
        raise UserError(
            f"sampling_params must be one SamplingParams or a list of {count}, one for each prompt", param="sampling_params"
        )
    return list(params)


def _job(item: Any, index: int, params: SamplingParams) -> Job:
    where = f"prompts[{index}]"
    if isinstance(item, Mapping):
        if len(item) != 1 or not item.keys() <= {"prompt", "prompt_token_ids"}:
            keys = ", ".join(map(str, item))
            raise UserError(f"{where} must hold 'prompt' or 'prompt_token_ids' and nothing else, not {keys}", param=where)
        item = next(iter(item.values()))
    if isinstance(item, str):
        return Job(params, text=item)
    if _are_ids(item) or (isinstance(item, list | tuple) and not item):
        return Job(params, ids=list(item))
    raise UserError(f"{where} must be a text or a list of token ids, not {type(item).__name__}", param=where)


def _are_ids(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(id, int) for id in value)
