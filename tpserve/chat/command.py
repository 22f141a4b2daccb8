"""`tpserve chat`: flags, the loop of an interactive chat, and one question through a pipe.

    tpserve chat                                        a conversation
    echo 'What is a shard?' | tpserve chat              one question, the answer alone on stdout
    tpserve chat -q 'What went wrong here?' < log.txt   one question about a text

Exit codes: 0; 1 when an answer breaks off; 2 for what the user can mend; 130 when an answer through a pipe is interrupted.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated

from msgspec import Struct

from tpserve.chat.chat_client import ChatClient
from tpserve.chat.conversation import Conversation
from tpserve.chat.slash_commands import SLASH_COMMANDS, Quit, Retry, run_command
from tpserve.chat.terminal import Terminal
from tpserve.cli.command import Command
from tpserve.cli.server_url import URL, server_url
from tpserve.config import env
from tpserve.config.flags import Flag
from tpserve.errors import UserError
from tpserve.observe.log import user_error

SERVER, CHAT = "Server", "Chat"


class ChatFlags(Struct, frozen=True, kw_only=True):
    """The flags of `tpserve chat`."""

    url: Annotated[str, Flag(SERVER, "Where the server answers HTTP.", parse=server_url, metavar="URL")] = URL
    api_key: Annotated[
        str | None, Flag(SERVER, "The server's key. Default: TPSERVE_API_KEY, which does not show in a list of processes.")
    ] = None
    model: Annotated[
        str | None, Flag(CHAT, "Which model answers. Default: the first that is served.", aliases=("--model-name",))
    ] = None
    system: Annotated[str, Flag(CHAT, "The system prompt.", aliases=("--system-prompt",))] = ""
    quick: Annotated[
        str | None, Flag(CHAT, "Ask this and end. What comes through a pipe follows it.", short="-q", metavar="TEXT")
    ] = None
    history: Annotated[bool, Flag(CHAT, "Keep no history of what is typed.")] = True


COMMAND = Command(
    "chat",
    "A conversation with a running server in the terminal: answers as they are written, history, several lines a message, and\n"
    "/help for its commands. Through a pipe it is one question, and its output is the answer: `echo hi | tpserve chat`.",
    ChatFlags,
)


def run(argv: Sequence[str]) -> int:
    """Chat; returns the exit code. Raises UserError, or HelpWanted."""
    flags = COMMAND.parse(argv).flags
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    terminal = Terminal(tuple(SLASH_COMMANDS), history=flags.history)
    client = ChatClient(flags.url, flags.api_key or env.overrides().get("api_key"))
    question = _question(flags.quick)
    try:
        client.wait_ready(terminal.note)
        conversation = Conversation(flags.model or _first_model(client), flags.system)
        if question is None:
            return _converse(terminal, client, conversation)
        conversation.ask(question)
        return 0 if _answer(terminal, client, conversation) else 1
    except BrokenPipeError:  # the reader of the answer has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _question(quick: str | None) -> str | None:
    """The one question of a call without a conversation; None for a conversation. UserError for an empty one."""
    if sys.stdin.isatty():
        return quick
    piped = sys.stdin.buffer.read().decode(errors="replace").strip()
    question = "\n\n".join(filter(None, (quick, piped)))
    if not question:
        raise UserError("there is nothing to ask: the standard input is empty, and no -q TEXT is given")
    return question


def _first_model(client: ChatClient) -> str:
    names = client.models()
    if not names:
        raise UserError(f"{client.url} serves no model")
    return names[0]


def _converse(terminal: Terminal, client: ChatClient, conversation: Conversation) -> int:
    terminal.note(f"{conversation.model} at {client.url}; /help for commands, Ctrl-D ends")
    while True:
        try:
            text = terminal.read_message()
            if text.startswith("/"):
                terminal.note(run_command(conversation, text))
                continue
        except Retry as retry:
            text = str(retry)
        except UserError as error:
            terminal.note(str(error))
            continue
        except KeyboardInterrupt:
            terminal.note("\nCtrl-D or /quit ends the chat")
            continue
        except (Quit, EOFError):
            terminal.end_answer()
            return 0
        if not text.strip():
            continue
        conversation.ask(text.lstrip(" ") if text.lstrip().startswith("/") else text)
        try:
            _answer(terminal, client, conversation)
        except UserError as error:
            terminal.note(user_error(str(error)))


def _answer(terminal: Terminal, client: ChatClient, conversation: Conversation) -> bool:
    """Show the answer to the last question and keep it; whether it came to its end. Ctrl-C stops it, in a conversation.

    UserError when the server refuses the question, which is then forgotten.
    """
    parts: list[str] = []
    finish = ""
    try:
        with contextlib.closing(client.answer(conversation.body())) as answer:
            for kind, text in answer:
                if kind == "end":
                    finish = text
                elif kind == "content":
                    parts.append(text)
                    terminal.write(text)
                elif terminal.interactive:
                    terminal.write(text, dim=True)
    except KeyboardInterrupt:
        if not terminal.interactive:
            raise
        finish = "stopped"
    except UserError as error:
        if not parts:
            raise
        terminal.end_answer()
        terminal.note(user_error(str(error)))
    finally:
        terminal.end_answer()
        conversation.answered("".join(parts))
    if finish in ("stopped", "length"):
        terminal.note("[stopped]" if finish == "stopped" else "[cut: max_tokens, or the context, is used up]")
    return bool(finish)
