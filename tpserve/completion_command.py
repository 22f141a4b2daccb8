"""`tpserve completion bash|zsh|fish`: prints the script with which a shell completes commands and flags. Never loads torch.

Owns the list of what each command takes; flags come from the structs that parse them (`cli/completion`).
"""

import sys
from collections.abc import Sequence
from typing import Any

from tpserve import template_command
from tpserve.admin import control, report, status
from tpserve.bench.command import BENCHMARKS
from tpserve.chat import command as chat
from tpserve.cli.command import Command, HelpWanted, wants_help
from tpserve.cli.commands import ABOUT
from tpserve.cli.completion import SHELLS, CompletedCommand, Values
from tpserve.cli.option import OPTIONS, options_of
from tpserve.doctor import command as doctor
from tpserve.errors import UserError
from tpserve.planner import command as planner

HELP = """usage: tpserve completion bash|zsh|fish

Prints a script that completes tpserve's commands, flags and their values.

  bash   source <(tpserve completion bash)            in ~/.bashrc
  zsh    source <(tpserve completion zsh)             in ~/.zshrc, after compinit
  fish   tpserve completion fish > ~/.config/fish/completions/tpserve.fish

Made anew with `tpserve completion` it is as new as the tpserve that is installed."""
COMMANDS: tuple[Command[Any], ...] = (
    planner.COMMAND,
    doctor.COMMAND,
    *(benchmark.command for benchmark in BENCHMARKS.values()),
    chat.COMMAND,
    status.COMMAND,
    report.COMMAND,
    *control.COMMANDS,
    template_command.COMMAND,
)
OTHERS: dict[str, Values] = {"completion": tuple(SHELLS), "secret": "files", "version": (), "help": tuple(ABOUT)}
"""Commands without flags: what they take."""


def run(argv: Sequence[str]) -> int:
    """Print a script; returns the exit code. Raises UserError, or HelpWanted."""
    if wants_help(argv):
        raise HelpWanted(HELP)
    if len(argv) != 1 or argv[0] not in SHELLS:
        given = f"not {argv[0]!r}" if argv else "and none is given"
        raise UserError(f"the shell is one of {', '.join(SHELLS)}, {given}: `tpserve completion bash` prints the script for bash")
    sys.stdout.write(SHELLS[argv[0]](completed_commands()))
    return 0


def completed_commands() -> list[CompletedCommand]:
    """Every command, in the order of `tpserve --help`."""
    server = tuple(OPTIONS.values())
    found = {"serve": [CompletedCommand(("serve",), ABOUT["serve"], server_flags=server, arguments="directories")]}
    for command in COMMANDS:
        words = tuple(command.name.split())
        about = BENCHMARKS[words[1]].about if words[0] == "bench" else ABOUT[words[0]]
        takes_model = command.takes_server_flags
        own = tuple(options_of(command.flags).values())
        completed = CompletedCommand(words, about, own, server if takes_model else (), "directories" if takes_model else ())
        found.setdefault(words[0], []).append(completed)
    for name, arguments in OTHERS.items():
        found[name] = [CompletedCommand((name,), ABOUT[name], arguments=arguments)]
    return [command for name in ABOUT for command in found[name]]
