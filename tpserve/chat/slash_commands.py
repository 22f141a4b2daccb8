"""What a line that begins with a slash does: `SLASH_COMMANDS`, each a function of the conversation and the rest of the line."""

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tpserve.chat.conversation import Conversation
from tpserve.errors import UserError


class Quit(Exception):
    """The user ends the chat."""


class Retry(Exception):
    """The question `str()` is to be asked again."""


class SlashCommand(NamedTuple):
    """`run` returns what to say, and raises UserError, `Quit` or `Retry`."""

    argument: str
    about: str
    run: Callable[[Conversation, str], str]


def run_command(conversation: Conversation, line: str) -> str:
    """Carry out a line such as "/set temperature 0.5"; what to say. UserError for an unknown command, or what it cannot do."""
    name, _, rest = line.partition(" ")
    if (command := SLASH_COMMANDS.get(name)) is None:
        close = difflib.get_close_matches(name, SLASH_COMMANDS, n=1)
        way_out = f"did you mean {close[0]}?" if close else "/help lists them; a blank before the slash sends it as a message"
        raise UserError(f"there is no command {name}: {way_out}")
    return command.run(conversation, rest.strip())


def _help(_conversation: Conversation, _rest: str) -> str:
    rows = [f"{name} {command.argument}".rstrip().ljust(20) + command.about for name, command in SLASH_COMMANDS.items()]
    lines = 'A line that ends in \\ goes on in the next one; """ begins and ends a message of several lines.'
    return "\n".join([*rows, "", lines, "Ctrl-C stops an answer, Ctrl-D ends the chat."])


def _system(conversation: Conversation, rest: str) -> str:
    conversation.system = rest
    return f"system prompt: {rest}" if rest else "no system prompt"


def _set(conversation: Conversation, rest: str) -> str:
    name, _, value = rest.partition(" ")
    if name:
        conversation.set(name, value.strip())
    fields = conversation.fields.items()
    return "\n".join(f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in fields) or "nothing is set"


def _model(conversation: Conversation, rest: str) -> str:
    conversation.model = rest or conversation.model
    return f"model: {conversation.model}"


def _retry(conversation: Conversation, _rest: str) -> str:
    raise Retry(conversation.undo())


def _undo(conversation: Conversation, _rest: str) -> str:
    return f"forgotten: {conversation.undo()}"


def _clear(conversation: Conversation, _rest: str) -> str:
    conversation.messages.clear()
    return "a new conversation"


def _save(conversation: Conversation, rest: str) -> str:
    if not rest:
        raise UserError("the file is missing: /save FILE")
    try:
        Path(rest).expanduser().write_text(conversation.dump())
    except OSError as error:
        raise UserError(f"{rest} cannot be written: {error.strerror}") from error
    return f"saved {len(conversation.messages)} messages to {rest}"


def _load(conversation: Conversation, rest: str) -> str:
    if not rest:
        raise UserError("the file is missing: /load FILE")
    try:
        text = Path(rest).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{rest} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}") from error
    conversation.load(text)
    return f"{len(conversation.messages)} messages of {rest}"


def _quit(_conversation: Conversation, _rest: str) -> str:
    raise Quit


SLASH_COMMANDS: dict[str, SlashCommand] = {
    "/help": SlashCommand("", "this list", _help),
    "/system": SlashCommand("TEXT", "the system prompt; without TEXT none", _system),
    "/set": SlashCommand("NAME VALUE", "a field of the request, such as temperature; without VALUE its default", _set),
    "/model": SlashCommand("NAME", "which model answers", _model),
    "/retry": SlashCommand("", "the last question again", _retry),
    "/undo": SlashCommand("", "forget the last question and its answer", _undo),
    "/clear": SlashCommand("", "forget everything but the system prompt and the fields", _clear),
    "/save": SlashCommand("FILE", "write the conversation as JSON", _save),
    "/load": SlashCommand("FILE", "go on with a conversation that /save has written", _load),
    "/quit": SlashCommand("", "end the chat", _quit),
    "/exit": SlashCommand("", "the same", _quit),
}
