"""Completion scripts for bash, zsh and fish, generated from the options of the commands. Pure.

A script holds every command and flag as words: pressing Tab starts no Python. It is as new as the tpserve that has printed it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args, get_origin

from tpserve.cli.commands import ABOUT
from tpserve.cli.option import Option

Values = tuple[str, ...] | Literal["files", "directories", "other"]
"""What may follow a flag, or stand as an argument: some words, a path, or what no script knows."""
NAMED_PATHS: dict[str, Values] = {
    "model": "directories", "tokenizer": "directories", "dir": "directories", "trace": "directories",
    "file": "files", "template": "files", "config": "files",
}  # fmt: skip
"""The last word of a flag's name -> what it takes, for the server's flags whose values are plain text."""


@dataclass(frozen=True)
class CompletedCommand:
    """One command, such as ("bench", "serve"). `arguments`: what stands where no flag does."""

    words: tuple[str, ...]
    about: str
    flags: Sequence[Option] = ()
    server_flags: Sequence[Option] = ()
    arguments: Values = field(default=())

    @property
    def name(self) -> str:
        """Its words as one, as on a command line."""
        return " ".join(self.words)

    def options(self) -> Iterable[tuple[Option, Values]]:
        """Every option with what it takes; () for a switch. An option of its own hides one of the server's of the same name."""
        own = {option.name for option in self.flags}
        yield from ((option, _values(option, {})) for option in self.flags)
        yield from ((option, _values(option, NAMED_PATHS)) for option in self.server_flags if option.name not in own)


def _values(option: Option, paths: dict[str, Values]) -> Values:
    if option.kind is bool:
        return ()
    if get_origin(option.kind) is Literal:
        return (*get_args(option.kind), *option.words)
    if option.kind is Path:
        return "files"
    if option.kind is str and (kind := paths.get(option.name.rpartition("_")[2])):
        return kind
    return option.words or "other"


def _takes_value(values: Values) -> bool:
    return values != ()


def quoted(text: str) -> str:
    """A text in single quotes, for any of the three shells."""
    return "'" + text.replace("'", "'\\''") + "'"


def about_text(option: Option) -> str:
    """The help of a flag in one short line."""
    return option.about.help.partition(". ")[0].rstrip(".")


# bash

_BASH = """# bash completion for tpserve, printed by `tpserve completion bash`
_tpserve() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}}
    local command=${{COMP_WORDS[1]}} words= paths= flags=
    COMPREPLY=()
    if [[ $current == = ]]; then current=
    elif [[ $previous == = ]]; then previous=${{COMP_WORDS[COMP_CWORD-2]}}; fi
    if (( COMP_CWORD == 1 )); then
        COMPREPLY=($(compgen -W {commands} -- "$current")); return
    fi
    case $command in {groups})
        if (( COMP_CWORD == 2 )); then command+=" "; else command+=" ${{COMP_WORDS[2]}}"; fi ;;
    esac
    case "$command $previous" in
{values}
    esac
    if [[ -z $words$paths ]]; then
        case $command in
{flags}
        esac
    fi
    if [[ -z $words$paths && $current == -* ]]; then words=$flags; fi
    if [[ -z $words$paths ]]; then
        case $command in
{arguments}
        esac
    fi
    [[ $words == - ]] && return
    if [[ -n $paths ]]; then compopt -o filenames; mapfile -t COMPREPLY < <(compgen "$paths" -- "$current")
    else COMPREPLY=($(compgen -W "$words" -- "$current")); fi
}}
complete -F _tpserve tpserve
"""
_BASH_PATHS = {"files": "paths=-f", "directories": "paths=-d", "other": "words=-"}


def bash(commands: Sequence[CompletedCommand]) -> str:
    """The script for bash. `words=-` stands for a value that only the user knows."""

    def reply(values: Values) -> str:
        return _BASH_PATHS[values] if isinstance(values, str) else f"words={quoted(' '.join(values))}"

    rows, flags, arguments = list[str](), list[str](), list[str]()
    for command in commands:
        by_reply: dict[str, list[str]] = {}
        spellings: list[str] = []
        for option, values in command.options():
            spellings += option.spellings
            if _takes_value(values):
                by_reply.setdefault(reply(values), []).extend(f'"{command.name} {name}"' for name in option.names)
        rows += [f"        {'|'.join(patterns)}) {action} ;;" for action, patterns in by_reply.items()]
        flags.append(f'            "{command.name}") flags={quoted(" ".join([*spellings, "--help"]))} ;;')
        if command.arguments:
            arguments.append(f'            "{command.name}") {reply(command.arguments)} ;;')
    for group, members in groups_of(commands).items():
        arguments.append(f'            "{group} ") words={quoted(" ".join(members))} ;;')
    return _BASH.format(
        commands=quoted(" ".join(dict.fromkeys(command.words[0] for command in commands))),
        groups="|".join(groups_of(commands)),
        values="\n".join(rows),
        flags="\n".join(flags),
        arguments="\n".join(arguments),
    )


def groups_of(commands: Sequence[CompletedCommand]) -> dict[str, list[str]]:
    """Commands of two words: the first -> all second ones."""
    groups: dict[str, list[str]] = {}
    for command in commands:
        if len(command.words) > 1:
            groups.setdefault(command.words[0], []).append(command.words[1])
    return groups


# zsh

_ZSH = """#compdef tpserve
# zsh completion for tpserve, printed by `tpserve completion zsh`
_tpserve() {{
    local command=$words[2] previous=$words[CURRENT-1]
    local -a described
    if (( CURRENT == 2 )); then
        described=({commands})
        _describe -V command described; return
    fi
    case $command in
{groups}
    esac
    if [[ $PREFIX == --*=* ]]; then previous=${{PREFIX%%=*}}; compset -P '*='; fi
    case "$command $previous" in
{values}
    esac
    if [[ $PREFIX == -* ]]; then
        case $command in
{flags}
        esac
        _describe -V -o flag described; return
    fi
    case $command in
{arguments}
    esac
}}
if [[ $funcstack[1] == _tpserve ]]; then _tpserve "$@"; else compdef _tpserve tpserve; fi
"""
_ZSH_PATHS = {"files": "_files", "directories": "_files -/", "other": "_message value"}


def zsh(commands: Sequence[CompletedCommand]) -> str:
    """The script for zsh: sourced, or a file named _tpserve on `fpath`."""

    def reply(values: Values) -> str:
        return _ZSH_PATHS[values] if isinstance(values, str) else f"compadd -V values -- {' '.join(map(quoted, values))}"

    def described(name: str, about: str) -> str:
        return quoted(f"{name.replace(':', chr(92) + ':')}:{about}")

    rows, flags, arguments = list[str](), list[str](), list[str]()
    for command in commands:
        by_reply: dict[str, list[str]] = {}
        texts = [described("--help", "the flags and what they mean")]
        for option, values in command.options():
            texts += [described(name, about_text(option)) for name in option.spellings]
            if _takes_value(values):
                by_reply.setdefault(reply(values), []).extend(f'"{command.name} {name}"' for name in option.names)
        rows += [f"        {'|'.join(patterns)}) {action}; return ;;" for action, patterns in by_reply.items()]
        flags.append(f'            "{command.name}") described=({" ".join(texts)}) ;;')
        if command.arguments:
            arguments.append(f'        "{command.name}") {reply(command.arguments)} ;;')
    groups = []
    for group in groups_of(commands):
        members = [described(each.words[1], each.about) for each in commands if each.words[0] == group]
        first = f"if (( CURRENT == 3 )); then described=({' '.join(members)}); _describe -V command described; return; fi"
        groups.append(f'        {group}) {first}; command+=" $words[3]" ;;')
    return _ZSH.format(
        commands=" ".join(described(name, ABOUT[name]) for name in dict.fromkeys(command.words[0] for command in commands)),
        groups="\n".join(groups),
        values="\n".join(rows),
        flags="\n".join(flags),
        arguments="\n".join(arguments),
    )


# fish

_FISH = """# fish completion for tpserve, printed by `tpserve completion fish`
function __tpserve_at
    set -l words (commandline -opc)
    set -l last (math 1 + (count $argv))
    test (count $words) -ge $last; and test "$words[2..$last]" = "$argv"
end
function __tpserve_next
    set -l words (commandline -opc)
    test (count $words) -eq (math 1 + (count $argv)); and __tpserve_at $argv
end
complete -c tpserve -e
complete -c tpserve -f
"""
_FISH_PATHS = {"files": "-r -F", "directories": "-x -a '(__fish_complete_directories)'", "other": "-x"}


def fish(commands: Sequence[CompletedCommand]) -> str:
    """The script for fish."""

    def reply(values: Values) -> str:
        return _FISH_PATHS[values] if isinstance(values, str) else f"-x -a {quoted(' '.join(values))}"

    lines = [_FISH.rstrip("\n")]
    for name in dict.fromkeys(command.words[0] for command in commands):
        lines.append(f"complete -c tpserve -n 'test (count (commandline -opc)) -eq 1' -a {name} -d {quoted(ABOUT[name])}")
    for command in commands:
        at = f"complete -c tpserve -n '__tpserve_at {command.name}'"
        if len(command.words) > 1:
            first, second = command.words
            lines.append(f"complete -c tpserve -n '__tpserve_next {first}' -a {second} -d {quoted(command.about)}")
        for option, values in command.options():
            names = " ".join(_fish_name(name) for name in option.spellings)
            value = f" {reply(values)}" if _takes_value(values) else ""
            lines.append(f"{at} {names}{value} -d {quoted(about_text(option))}")
        lines.append(f"{at} -l help -d 'the flags and what they mean'")
        if command.arguments:
            lines.append(f"{at} {reply(command.arguments).replace('-r ', '').replace('-x ', '')}")
    return "\n".join(lines) + "\n"


def _fish_name(spelling: str) -> str:
    """A flag as fish's options say it: long, one letter, or old-style such as -tp."""
    name = spelling.lstrip("-")
    return f"-l {name}" if spelling.startswith("--") else f"-s {name}" if len(name) == 1 else f"-o {name}"


SHELLS: dict[str, Callable[[Sequence[CompletedCommand]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
