"""`tpserve template MODEL`: how the model's answers are read and written, and which features passed their round trip.

Never loads torch or weights. Exit code: 0 when content, reasoning or tools can be read, 1 when the model has no chat template.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from msgspec import Struct, structs, to_builtins

from tpserve import builtin
from tpserve.cli import server_flags
from tpserve.cli.command import Command
from tpserve.config import env
from tpserve.config.flags import Flag
from tpserve.errors import UserError
from tpserve.hub.locate import locate_tokenizer
from tpserve.response_template.call_reader import CallArguments, CallBegin
from tpserve.response_template.detect import Answers, detect
from tpserve.response_template.parser import ResponseParser
from tpserve.response_template.regions import Content, Reasoning
from tpserve.response_template.template import ResponseTemplate
from tpserve.text.chat import ChatTemplate
from tpserve.text.tokenizer import Tokenizer
from tpserve.text.tokenizer_config import CONFIG, read_json

OUTPUT = "Output"
TITLES: Mapping[str, str] = {
    "content": "content",
    "reasoning": "reasoning",
    "call": "a tool call",
    "calls": "several calls",
}


class TemplateFlags(Struct, frozen=True, kw_only=True):
    """The flags of `tpserve template`."""

    parse: Annotated[
        str | None,
        Flag(OUTPUT, "A file with an answer as the model wrote it, - for the standard input: print what is read from it."),
    ] = None
    json: Annotated[bool, Flag(OUTPUT, "Everything as JSON.")] = False


COMMAND = Command(
    "template",
    "Shows how a model's reasoning and tool calls are found in what it writes: its `response_template`, where that comes from,\n"
    "and which features passed their round trip through the chat template. Takes MODEL and the server's flags as\n"
    "`tpserve serve` does, such as --chat-template, --tool-call-parser or --reasoning-parser.",
    TemplateFlags,
    takes_server_flags=True,
)


def run(argv: Sequence[str]) -> int:
    """Print the page; returns the exit code. Raises UserError, or HelpWanted."""
    own, server_argv, _ = COMMAND.parse(argv)
    flags, _ = server_flags.read_line(server_argv, env.overrides())
    if flags.model is None:
        flags = structs.replace(flags, model=str(builtin.path()))
    files = locate_tokenizer(flags)
    tokenizer = Tokenizer.load(files.tokenizer)
    template = ChatTemplate.load(files.tokenizer, tokenizer.special_tokens, files.chat_template)
    config = read_json(Path(files.tokenizer) / CONFIG)
    answers = detect(template, config, flags.tool_call_parser, flags.reasoning_parser)
    if own.parse is not None:
        sys.stdout.write(_shown(_read(answers, _text(own.parse))))
    elif own.json:
        sys.stdout.write(_shown(to_builtins(answers)))
    else:
        sys.stdout.write(_page(flags.model or "", answers))
    return 0 if answers.source else 1


def _page(model: str, answers: Answers) -> str:
    lines = [model, ""]
    for feature, title in TITLES.items():
        source, reason = answers.source.get(feature), answers.off.get(feature, "not looked for")
        lines.append(f"{title:<14}{f'read, from {source}' if source is not None else f'off: {reason}'}")
    if answers.format.tools is None and "call" in answers.source:
        lines.append("Calls are read, but their form is not known to the letter: tool_choice required and strict are refused.")
    return "\n".join([*lines, "", "response_template:", _shown(answers.spec)])


def _read(answers: Answers, text: str) -> dict[str, Any]:
    """What is read from an answer, as a message."""
    message: dict[str, Any] = {"reasoning": "", "content": "", "tool_calls": []}
    parser = ResponseParser(ResponseTemplate.load(answers.spec))
    for event in [*parser.feed(text), *parser.finish()]:
        match event:
            case Reasoning(more):
                message["reasoning"] += more
            case Content(more):
                message["content"] += more
            case CallBegin(name):
                message["tool_calls"].append({"name": name, "arguments": ""})
            case CallArguments(more):
                message["tool_calls"][-1]["arguments"] += more
    return message


def _text(path: str) -> str:
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--parse {path} cannot be read: {error}", param="parse") from None


def _shown(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
