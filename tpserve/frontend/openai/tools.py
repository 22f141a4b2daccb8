"""The functions that a chat request offers to the model, and which of them it may or must call."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tpserve.errors import UserError
from tpserve.frontend.openai.errors import shown
from tpserve.frontend.openai.schema import ChatCompletionRequest
from tpserve.response_template.arguments import Tool

NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
"""Matches the name of a function."""
NO_ARGUMENTS = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class ToolUse:
    """`declared`: all functions, as chat templates see them. `tools`: those that may be called. `named`: one was asked for.

    `lax`: the names of those for which the client has ruled out that their arguments are held to the schema.
    """

    declared: Sequence[Mapping[str, Any]] = ()
    tools: Sequence[Tool] = ()
    choice: Literal["none", "auto", "required"] = "none"
    named: bool = False
    lax: frozenset[str] = frozenset()
    parallel: bool = True

    @property
    def schemas(self) -> dict[str, Any]:
        """The schema of each function's arguments by its name."""
        return {tool.name: tool.parameters for tool in self.tools}


def tool_use(call: ChatCompletionRequest) -> ToolUse:
    """What a request says about tools. UserError names the wrong field."""
    tools = [_tool(value, f"tools[{index}]") for index, value in enumerate(call.tools)]
    if len(names := {tool.name for tool in tools}) < len(tools):
        twice = next(tool.name for at, tool in enumerate(tools) if tool.name in {other.name for other in tools[:at]})
        raise _wrong(f"tools: two functions are called {twice}", "tools")
    choice = call.tool_choice if call.tool_choice is not None else "auto" if tools else "none"
    mode, wanted = (choice, None) if isinstance(choice, str) else _named(choice)
    if mode not in ("none", "auto", "required"):
        raise _wrong(f"tool_choice is {shown(mode)}; known are none, auto, required and a function", "tool_choice")
    if not tools and (mode == "required" or wanted is not None):
        raise _wrong("tool_choice asks for a call, and the request has no tools", "tool_choice")
    if unknown := sorted(set(wanted or ()) - names):
        raise _wrong(f"tool_choice names {shown(unknown[0])}, which is not among tools", "tool_choice")
    return ToolUse(
        declared=[{**value, "function": {"parameters": NO_ARGUMENTS, **value["function"]}} for value in map(_plain, call.tools)],
        tools=[tool for tool in tools if wanted is None or tool.name in wanted],
        choice=mode if tools else "none",  # type: ignore[arg-type]
        named=wanted is not None and isinstance(choice, dict) and choice.get("type") == "function",
        lax=frozenset(tool["function"]["name"] for tool in call.tools if tool["function"].get("strict") is False),
        parallel=call.parallel_tool_calls,
    )


def _plain(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool without nulls, and without what is meant for this server."""
    function = {name: value for name, value in tool["function"].items() if value is not None and name != "strict"}
    return {"type": "function", "function": function}


def _tool(value: Any, where: str) -> Tool:
    if value.get("type") != "function":
        raise _wrong(f"{where}.type is {shown(value.get('type'))}; this server calls functions only", f"{where}.type")
    function = value.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not NAME.fullmatch(name):
        raise _wrong(f"{where}.function.name must be 1 to 128 letters, digits or any of _ . : / -", f"{where}.function.name")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise _wrong(f"{where}.function.parameters must be a JSON schema, an object", f"{where}.function.parameters")
    if not isinstance(description := function.get("description") or "", str):
        raise _wrong(f"{where}.function.description must be a text, not {shown(description)}", f"{where}.function.description")
    return Tool(name, parameters or NO_ARGUMENTS, strict=function.get("strict") is True or value.get("strict") is True)


def _named(choice: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The mode and the names of a `tool_choice` that is an object: a function, or OpenAI's `allowed_tools`."""
    match choice:
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            return "required", [name]
        case {"type": "allowed_tools", "allowed_tools": {"mode": ("auto" | "required") as mode, "tools": [*tools]}}:
            names = [_allowed(tool) for tool in tools]
            if names:
                return mode, names
    raise _wrong('tool_choice must be a text or {"type": "function", "function": {"name": ...}}', "tool_choice")


def _allowed(tool: Any) -> str:
    match tool:
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            return name
    raise _wrong("tool_choice.allowed_tools.tools must name functions", "tool_choice")


def _wrong(text: str, param: str) -> UserError:
    return UserError(text, param=param, code="invalid_value")
