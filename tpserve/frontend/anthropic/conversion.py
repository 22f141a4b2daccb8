"""A Messages request as the chat request that answers it. Pure. What this server cannot read is an error that names it."""

from collections.abc import Sequence
from typing import Any

from tpserve.errors import UserError
from tpserve.frontend.anthropic.schema import MessageInput, MessageRequest
from tpserve.frontend.openai.errors import Json, shown
from tpserve.frontend.openai.messages import Message
from tpserve.frontend.openai.schema import ChatCompletionRequest, GenerationFields

NAMES = {
    "thinking_token_budget": "thinking",
    "enable_thinking": "thinking",
    "reasoning_effort": "output_config.effort",
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}
"""Fields of chat completions by the beginning of their names, the longest first, and what they are called here."""
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
SYSTEM_SEPARATOR = "\n\n"


def chat_request(call: MessageInput) -> ChatCompletionRequest:
    """The chat request for a conversation. UserError names the wrong field."""
    fields = {name: getattr(call, name) for name in GenerationFields.__struct_fields__}
    more: dict[str, Any] = {}
    if isinstance(call, MessageRequest):
        more["max_completion_tokens"] = call.max_tokens
    if call.thinking is not None:
        refuse_budget(call)
        more["enable_thinking"] = call.thinking.type != "disabled"
        more["thinking_token_budget"] = call.thinking.budget_tokens if call.thinking.type == "enabled" else None
        more["include_reasoning"] = call.thinking.display != "omitted"
    messages = chat_messages(call)
    is_begun = messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
    return ChatCompletionRequest(
        **fields,
        **more,
        messages=messages,
        add_generation_prompt=not is_begun,
        continue_final_message=is_begun,
        tools=[_tool(tool, f"tools[{number}]") for number, tool in enumerate(call.tools)],
        tool_choice=_tool_choice(call),
        parallel_tool_calls=call.tool_choice.get("disable_parallel_tool_use") is not True,
        reasoning_effort=call.output_config.effort,
        response_format=_format(call.output_config.format),
        chat_template_kwargs=call.chat_template_kwargs,
    )


def refuse_budget(call: MessageInput) -> None:
    """UserError for thinking without a budget, or with one that leaves no room for an answer."""
    thinking = call.thinking
    if thinking is None or thinking.type != "enabled":
        return
    if thinking.budget_tokens is None:
        raise _wrong("thinking.budget_tokens is required with type enabled", "thinking.budget_tokens")
    if isinstance(call, MessageRequest) and thinking.budget_tokens >= call.max_tokens:
        raise _wrong(
            f"thinking.budget_tokens is {thinking.budget_tokens}, and max_tokens {call.max_tokens}; max_tokens must be larger",
            "thinking.budget_tokens",
        )


def chat_messages(call: MessageInput) -> list[Message]:
    """The messages of a request, the system's first. Results of tools are messages of their own."""
    messages: list[Message] = []
    system = call.system if isinstance(call.system, str) else SYSTEM_SEPARATOR.join(_texts(call.system, "system"))
    if system:
        messages.append({"role": "system", "content": system})
    for number, message in enumerate(call.messages):
        where = f"messages[{number}]"
        role, content = message.get("role"), message.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
            raise _wrong(f"{where}.content must be a text or a list of blocks", f"{where}.content")
        if role == "assistant":
            messages.append(_said(blocks, f"{where}.content"))
        elif role == "user":
            messages += _asked(blocks, f"{where}.content")
        elif role == "system":
            text = SYSTEM_SEPARATOR.join(_texts(blocks, f"{where}.content"))
            if messages and messages[-1]["role"] == "system":  # many chat templates know one at most
                text = f"{messages.pop()['content']}{SYSTEM_SEPARATOR}{text}"
            messages.append({"role": "system", "content": text})
        else:
            raise _wrong(f"{where}.role is {shown(role)}; known are user and assistant", f"{where}.role")
    return messages


def _asked(blocks: Sequence[Json], where: str) -> list[Message]:
    """What a user's blocks are: texts, and between them results of tools."""
    messages: list[Message] = []
    for number, block in enumerate(blocks):
        place = f"{where}[{number}]"
        if block.get("type") == "tool_result":
            id = _text(block.get("tool_use_id"), f"{place}.tool_use_id")
            content = block.get("content") or ""
            texts = [content] if isinstance(content, str) else _texts(content, f"{place}.content")
            messages.append({"role": "tool", "tool_call_id": id, "content": _content(texts)})
        else:
            (text,) = _texts([block], where, number)
            if not messages or messages[-1]["role"] == "tool":
                messages.append({"role": "user", "content": []})
            messages[-1]["content"].append(text)
    for message in messages:
        if message["role"] != "tool":
            message["content"] = _content(message["content"])
    return messages or [{"role": "user", "content": ""}]


def _said(blocks: Sequence[Json], where: str) -> Message:
    """What an assistant's blocks are: one message."""
    message: Message = {"role": "assistant"}
    for number, block in enumerate(blocks):
        place = f"{where}[{number}]"
        match block.get("type"):
            case "thinking":
                message["reasoning"] = message.get("reasoning", "") + _text(block.get("thinking"), f"{place}.thinking")
            case "redacted_thinking":
                pass  # another server's, which nobody but it can read
            case "tool_use":
                function = {"name": _text(block.get("name"), f"{place}.name"), "arguments": block.get("input") or {}}
                call = {"id": _text(block.get("id"), f"{place}.id"), "type": "function", "function": function}
                message.setdefault("tool_calls", []).append(call)
            case _:
                message["content"] = message.get("content", "") + "".join(_texts([block], where, number))
    if "tool_calls" not in message:
        message.setdefault("content", "")
    return message


def _texts(blocks: Any, where: str, first: int = 0) -> list[str]:
    """The texts of text blocks. UserError names a block of another type."""
    if not isinstance(blocks, list):
        raise _wrong(f"{where} must be a text or a list of blocks", where)
    texts = []
    for number, block in enumerate(blocks, first):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind != "text":
            raise UserError(
                f"{where}[{number}].type is {shown(kind)}; this server reads texts, calls, their results and thinking only",
                param=f"{where}[{number}].type",
                code="unsupported_parameter",
            )
        texts.append(_text(block.get("text"), f"{where}[{number}].text"))
    return texts


def _content(texts: Sequence[str]) -> str | list[Json]:
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]


def _tool(tool: Json, where: str) -> Json:
    if tool.get("type") not in (None, "custom"):
        raise UserError(
            f"{where}.type is {shown(tool['type'])}; this server calls tools of your own only, those with an input_schema",
            param=f"{where}.type",
            code="unsupported_parameter",
        )
    if not isinstance(tool.get("input_schema"), dict):
        raise _wrong(f"{where}.input_schema must be a JSON schema, an object", f"{where}.input_schema")
    function = {name: tool[name] for name in ("name", "description", "strict") if name in tool}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


def _tool_choice(call: MessageInput) -> str | Json | None:
    kind = call.tool_choice.get("type", "auto")
    if kind == "tool":
        name = _text(call.tool_choice.get("name"), "tool_choice.name")
        return {"type": "function", "function": {"name": name}}
    if kind not in CHOICES:
        raise _wrong(f"tool_choice.type is {shown(kind)}; known are auto, any, tool and none", "tool_choice.type")
    return CHOICES[kind]


def _format(given: Json | None) -> Json | None:
    if given is None:
        return None
    if given.get("type") != "json_schema" or "schema" not in given:
        text = 'output_config.format must be {"type": "json_schema", "schema": {...}}'
        raise _wrong(text, "output_config.format")
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": given["schema"]}}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(f"{where} must be a text, not {shown(value)}", where)
    return value


def _wrong(text: str, param: str) -> UserError:
    return UserError(text, param=param, code="invalid_value")
