"""The terminal of a chat: lines in, with history and several lines a message; text out, with nothing that controls the terminal.

What a model writes is untrusted: of its control characters only line breaks and tabs reach a terminal. Never speaks HTTP.
"""

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from tpserve.config import env

PROMPT, MORE = ">>> ", "... "
BLOCK = '"""'
MAX_HISTORY = 1000
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
DIM, PLAIN = "\x1b[2m", "\x1b[22m"


class Terminal:
    """Standard input and output. `interactive`: both are a terminal."""

    def __init__(self, commands: Sequence[str] = (), *, history: bool = False) -> None:
        """`commands`: what Tab completes. `history`: keep the lines in a file of this user."""
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._color = env.color(sys.stdout)
        self._dim = False
        self._at_line_start = True
        self._commands = commands
        self._history: Path | None = None
        self._readline = _readline() if self.interactive else None
        if self._readline is not None:
            self._start_readline(self._readline, history)

    # In

    def read_message(self) -> str:
        """The next message; lines that end in a backslash, or between lines of three quotes, are one. EOFError at the end."""
        line = self._read_line(PROMPT)
        if line.strip().startswith(BLOCK):
            lines = [line.strip().removeprefix(BLOCK)]
            while not lines[-1].rstrip().endswith(BLOCK):
                lines.append(self._read_line(MORE))
            return "\n".join(lines).rstrip().removesuffix(BLOCK).strip("\n")
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._read_line(MORE))
        return "\n".join(lines)

    def _read_line(self, prompt: str) -> str:
        if not sys.stdout.isatty():  # the answers go to a file: the prompt must not
            sys.stderr.write(prompt)
            sys.stderr.flush()
            prompt = ""
        line = input(prompt)
        self._at_line_start = True
        if self._readline is not None and self._history is not None and line:
            with contextlib.suppress(OSError):  # a full disk is no reason to end a chat
                self._readline.append_history_file(1, self._history)
        return line

    def _start_readline(self, readline: ModuleType, history: bool) -> None:
        readline.set_history_length(MAX_HISTORY)
        readline.set_completer(self._complete)
        readline.set_completer_delims(" \n")
        readline.parse_and_bind("tab: complete")
        directory = env.state_dir()
        if not history or directory is None:
            return
        path = directory / "chat_history"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            path.chmod(0o600)
            readline.read_history_file(path)
        except OSError as error:
            self.note(f"no history: {path}: {error.strerror}")
            return
        self._history = path

    def _complete(self, text: str, state: int) -> str | None:
        found = [name + " " for name in self._commands if text.startswith("/") and name.startswith(text)]
        return found[state] if state < len(found) else None

    # Out

    def write(self, text: str, *, dim: bool = False) -> None:
        """Show a piece of an answer at once. `dim`: it is reasoning."""
        if sys.stdout.isatty():
            text = CONTROL.sub("", text)
        if not text:
            return
        if dim != self._dim:
            self._switch(dim)
        sys.stdout.write(text)
        sys.stdout.flush()
        self._at_line_start = text.endswith("\n")

    def _switch(self, dim: bool) -> None:
        """Between reasoning and answer: a line of its own, and on a terminal with colors another brightness."""
        self._dim = dim
        if not dim and not self._at_line_start:
            sys.stdout.write("\n")
        if self._color:
            sys.stdout.write(DIM if dim else PLAIN)
        else:
            sys.stdout.write("[reasoning]\n" if dim else "[answer]\n")

    def end_answer(self) -> None:
        """After an answer: the next thing begins on a line of its own."""
        if self._dim and self._color:
            sys.stdout.write(PLAIN)
        self._dim = False
        if not self._at_line_start:
            sys.stdout.write("\n")
        sys.stdout.flush()
        self._at_line_start = True

    def note(self, text: str) -> None:
        """Say something that is not the model's, on stderr."""
        text = CONTROL.sub("", text)
        color = env.color(sys.stderr)
        sys.stderr.write(f"{DIM}{text}{PLAIN}\n" if color else f"{text}\n")
        sys.stderr.flush()


def _readline() -> ModuleType | None:
    """The module for editing lines; a Python may be built without it."""
    try:
        import readline
    except ImportError:
        return None
    return readline
