"""A Responses request as the chat request that answers it. Pure."""

from collections.abc import Sequence
from typing import Any

from tpserve.errors import UserError
from tpserve.frontend.openai.errors import Json, shown
from tpserve.frontend.openai.schema import ChatCompletionRequest, GenerationFields
from tpserve.frontend.responses.items import messages_of
from tpserve.frontend.responses.schema import LOGPROBS, InputFields, ResponseRequest

NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""Fields of chat completions by the beginning of their names, the longest first, and what they are called here."""


def chat_request(call: InputFields, items: Sequence[Json]) -> ChatCompletionRequest:
    """The chat request for a conversation. UserError names the wrong field."""
    if not items and not call.instructions:
        raise UserError("input is required", param="input", code="missing_required_parameter")
    fields = {name: getattr(call, name) for name in GenerationFields.__struct_fields__}
    more: dict[str, Any] = {}
    if isinstance(call, ResponseRequest):
        shows = LOGPROBS in call.include or call.top_logprobs is not None
        more = {"max_completion_tokens": call.max_output_tokens, "logprobs": shows}
        more["top_logprobs"] = (call.top_logprobs or 0) if shows else None
    return ChatCompletionRequest(
        **{**fields, "stream": call.stream or call.background},
        messages=messages_of(items, call.instructions),
        tools=[_tool(tool, f"tools[{number}]") for number, tool in enumerate(call.tools)],
        tool_choice=_tool_choice(call.tool_choice),
        parallel_tool_calls=call.parallel_tool_calls,
        reasoning_effort=call.reasoning.effort,
        enable_thinking=call.enable_thinking,
        thinking_token_budget=call.thinking_token_budget,
        chat_template_kwargs=call.chat_template_kwargs,
        response_format=_format(call.text.format),
        **more,
    )


def _tool(tool: Json, where: str) -> Json:
    if tool.get("type") != "function":
        raise UserError(
            f"{where}.type is {shown(tool.get('type'))}; this server calls functions only",
            param=f"{where}.type",
            code="unsupported_parameter",
        )
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _tool_choice(choice: str | Json | None) -> str | Json | None:
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools" and "allowed_tools" not in choice:
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": choice.get("tools")}}
    return choice


def _format(given: Json | None) -> Json | None:
    if given is not None and given.get("type") == "json_schema" and "json_schema" not in given:
        return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}
    return given
