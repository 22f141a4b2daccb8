"""Parses a command line and formats its help. Pure: reads no file and no environment, prints nothing.

`read_flags` and `help_lines` take options (`option.options_of(struct)`); `Command` is a command whose flags are a struct. Every
mistake on a command line is a UserError of one sentence. Dashes and underscores are the same in a flag's name.
"""

import argparse
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

from msgspec import Struct

from tpserve.cli import vllm
from tpserve.cli.option import Option, options_of
from tpserve.cli.other_servers import EQUIVALENT_FLAGS
from tpserve.errors import UserError

Of = TypeVar("Of", bound=Struct)


class HelpWanted(Exception):
    """The command line has --help; `str()` is the help text."""


class Parsed(NamedTuple, Generic[Of]):
    """A parsed command line. `rest`: arguments for the server's parser; `notice`: a log line about accepted vLLM flags."""

    flags: Of
    rest: list[str]
    notice: str


@dataclass(frozen=True)
class Command(Generic[Of]):
    """A command other than `tpserve serve`.

    `flags`: the struct of its flags. `takes_server_flags`: the command also takes the server's flags, returned unparsed in
    `Parsed.rest`. `vllm_flags`: flags of vLLM's command of the same name that this one does not have.
    """

    name: str
    about: str
    flags: type[Of]
    takes_server_flags: bool = False
    vllm_flags: Mapping[str, vllm.VllmFlag] = field(default_factory=dict)

    def parse(self, argv: Sequence[str]) -> Parsed[Of]:
        """Read a command line. Raises UserError, or HelpWanted for `--help`."""
        argv, accepted, refused = vllm.translate(normalize_dashes(argv), self.vllm_flags)
        options = options_of(self.flags)
        if wants_help(argv):
            server_usage = "[MODEL] [flags of tpserve serve] " if self.takes_server_flags else ""
            usage = f"usage: tpserve {self.name} {server_usage}[flags]"
            raise HelpWanted("\n".join([usage, "", self.about, *help_lines(options.values())]))
        parsed = read_flags(argv, options)
        see_help = f"see `tpserve {self.name} --help`"
        errors = [*parsed.errors, *(UserError(given.refusal(), param=given.flag) for given in refused)]
        if not self.takes_server_flags:
            errors += [unknown_flag(arg, options, (), see_help) for arg in parsed.rest if arg.startswith("-")]
        raise_all(errors)
        if parsed.rest and not self.takes_server_flags:
            raise UserError(f"unexpected argument {parsed.rest[0]!r}: {see_help}")
        return Parsed(self.flags(**parsed.values), parsed.rest, vllm.accepted_line(accepted))


def normalize_dashes(argv: Sequence[str]) -> list[str]:
    """The arguments with dashes for underscores in the names of flags."""
    split = (arg.partition("=") for arg in argv)
    return [name.replace("_", "-") + equals + value if name.startswith("--") else name + equals + value
            for name, equals, value in split]  # fmt: skip


def wants_help(argv: Sequence[str]) -> bool:
    """Whether the command line has --help or -h."""
    return "--help" in argv or "-h" in argv


class ParsedFlags(NamedTuple):
    """A command line as values by field name, arguments that are not its flags, and errors about values."""

    values: dict[str, Any]
    rest: list[str]
    errors: list[UserError]


def read_flags(argv: Sequence[str], options: Mapping[str, Option]) -> ParsedFlags:
    """Read the values of `options`. Raises UserError only for a flag without its value; other errors are in the result."""
    errors: list[UserError] = []
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for option in options.values():
        if option.kind is bool:
            parser.add_argument(*option.names, dest=option.name, action="store_const", const=True)
            parser.add_argument(*option.off_names, dest=option.name, action="store_const", const=False)
        else:
            nargs = "+" if option.many else None
            parser.add_argument(*option.names, dest=option.name, nargs=nargs, action=_ReadOption, option=option, errors=errors)
    namespace, rest = parser.parse_known_args(argv)
    return ParsedFlags(vars(namespace), rest, errors)


def raise_all(errors: Sequence[UserError]) -> None:
    """Raise all errors as one; does nothing when there are none."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise UserError("; ".join(map(str, errors)), param=errors[0].param)


def help_lines(options: Iterable[Option]) -> list[str]:
    """The help text's lines, by group."""
    groups: dict[str, list[str]] = {}
    for option in options:
        spellings = ", ".join(option.spellings)
        default = f" (default {option.default_text()})" if option.default_text() else ""
        lines = [f"  {spellings} {option.value_name()}".rstrip(), f"        {option.about.help}{default}"]
        groups.setdefault(option.about.group, []).extend(lines)
    return [line for group, lines in groups.items() for line in (f"\n{group}:", *lines)]


def unknown_flag(flag: str, options: Mapping[str, Option], other_names: Sequence[str], fallback: str) -> UserError:
    """The error for an unknown flag: names the equivalent flag or the closest name, else ends with `fallback`."""
    flag = flag.partition("=")[0]
    names = {name for option in options.values() for name in (option.flag, option.off)}
    if (equivalent := EQUIVALENT_FLAGS.get(flag)) is not None and equivalent.split()[0].rstrip(",:") in names:
        return UserError(f"unknown flag {flag}: use {equivalent}", param=flag)
    return UserError(f"unknown flag {flag}{did_you_mean(flag, options, other_names) or f': {fallback}'}", param=flag)


def did_you_mean(flag: str, options: Mapping[str, Option], other_names: Sequence[str] = ()) -> str:
    """ ": did you mean NAME?" for the closest name, or nothing."""
    names = [name for option in options.values() for name in (*option.names, option.off) if name]
    close = difflib.get_close_matches(flag.partition("=")[0], [*names, *other_names], n=1, cutoff=0.6)
    return f": did you mean {close[0]}?" if close else ""


class _Parser(argparse.ArgumentParser):
    """argparse that raises UserError instead of exiting, and does not take `-p 8000` for a short form of `-pp`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(re.sub(r"^argument ([^ /:]+)[^ :]*: ", r"\1: ", message))

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        return []


class _ReadOption(argparse.Action):
    """Reads a value with `Option.read`, and collects its error."""

    def __init__(self, *args: Any, option: Option, errors: list[UserError], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._option, self._errors = option, errors

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        option = self._option
        try:
            setattr(namespace, self.dest, tuple(values) if option.many else option.read(values, option.flag))
        except UserError as error:
            self._errors.append(error)
