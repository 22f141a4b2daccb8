"""How every command line is read and explained, whatever its flags are. Pure: nothing is looked at, nothing is printed.

`read` and `tokenizer_config` take options (`option.options_of` a struct); `Command` is a command whose flags are a struct.
Whatever is
wrong with a command line is a UserError of one sentence. Dashes and underscores are the same in a flag's name.
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
from tpserve.cli.other_servers import MEANT
from tpserve.errors import UserError

Of = TypeVar("Of", bound=Struct)


class HelpWanted(Exception):
    """The user asked for the help; `str()` is its text."""


class Parsed(NamedTuple, Generic[Of]):
    """The flags of a command, what is passed on, and what of vLLM's is so anyway, in one line (empty without any)."""

    flags: Of
    rest: list[str]
    holding: str


@dataclass(frozen=True)
class Command(Generic[Of]):
    """A command but `tpserve serve`. `flags`: the struct of its flags. `passes_on`: takes the server's flags beside its own.
    `known`: flags of vLLM's command of that name that are none of these."""

    name: str
    about: str
    flags: type[Of]
    passes_on: bool = False
    known: Mapping[str, vllm.Known] = field(default_factory=dict)

    def parse(self, argv: Sequence[str]) -> Parsed[Of]:
        """Read a command line. Raises UserError, or HelpWanted for `--help`."""
        argv, holding, refused = vllm.translate(dashes(argv), self.known)
        options = options_of(self.flags)
        if wants_help(argv):
            usage = f"usage: tpserve {self.name} " + ("[MODEL] [flags of tpserve serve] " if self.passes_on else "") + "[flags]"
            raise HelpWanted("\n".join([usage, "", self.about, *described(options.values())]))
        said = read(argv, options)
        help = f"see `tpserve {self.name} --help`"
        wrong = [*said.wrong, *(UserError(given.refusal(), param=given.flag) for given in refused)]
        if not self.passes_on:
            wrong += [unknown(arg, options, (), help) for arg in said.rest if arg.startswith("-")]
        refuse_all(wrong)
        if said.rest and not self.passes_on:
            raise UserError(f"unexpected argument {said.rest[0]!r}: {help}")
        return Parsed(self.flags(**said.values), said.rest, vllm.holding_line(holding))


def dashes(argv: Sequence[str]) -> list[str]:
    """With dashes for underscores in the names of flags."""
    split = (arg.partition("=") for arg in argv)
    return [name.replace("_", "-") + equals + value if name.startswith("--") else name + equals + value
            for name, equals, value in split]  # fmt: skip


def wants_help(argv: Sequence[str]) -> bool:
    """Whether the help is asked for."""
    return "--help" in argv or "-h" in argv


class ParsedFlags(NamedTuple):
    """What a command line says: values by field name, the arguments that are none of its flags, and what is wrong with values."""

    values: dict[str, Any]
    rest: list[str]
    wrong: list[UserError]


def read(argv: Sequence[str], options: Mapping[str, Option]) -> ParsedFlags:
    """Read what is said of `options`. UserError only for a flag that lacks its value; other mistakes are collected in `wrong`."""
    wrong: list[UserError] = []
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for option in options.values():
        if option.kind is bool:
            parser.add_argument(*option.names, dest=option.name, action="store_const", const=True)
            parser.add_argument(*option.off_names, dest=option.name, action="store_const", const=False)
        else:
            nargs = "+" if option.many else None
            parser.add_argument(*option.names, dest=option.name, nargs=nargs, action=_ReadOption, option=option, wrong=wrong)
    given, rest = parser.parse_known_args(argv)
    return ParsedFlags(vars(given), rest, wrong)


def refuse_all(wrong: Sequence[UserError]) -> None:
    """Raise what is wrong, all of it as one error; nothing without any."""
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        raise UserError("; ".join(map(str, wrong)), param=wrong[0].param)


def described(options: Iterable[Option]) -> list[str]:
    """Lines of help, by groups."""
    groups: dict[str, list[str]] = {}
    for option in options:
        spellings = ", ".join(option.spellings)
        default = f" (default {option.default_text()})" if option.default_text() else ""
        lines = [f"  {spellings} {option.value_name()}".rstrip(), f"        {option.about.help}{default}"]
        groups.setdefault(option.about.group, []).extend(lines)
    return [line for group, lines in groups.items() for line in (f"\n{group}:", *lines)]


def unknown(flag: str, options: Mapping[str, Option], more: Sequence[str], otherwise: str) -> UserError:
    """What to say of a flag that there is not: what does the same, what was perhaps meant, or else `otherwise`."""
    flag = flag.partition("=")[0]
    names = {name for option in options.values() for name in (option.flag, option.off)}
    if (meant := MEANT.get(flag)) is not None and meant.split()[0].rstrip(",:") in names:
        return UserError(f"unknown flag {flag}: use {meant}", param=flag)
    return UserError(f"unknown flag {flag}{nearest(flag, options, more) or f': {otherwise}'}", param=flag)


def nearest(flag: str, options: Mapping[str, Option], more: Sequence[str] = ()) -> str:
    """A guess at what was meant, to end a sentence with; empty without one."""
    names = [name for option in options.values() for name in (*option.names, option.off) if name]
    near = difflib.get_close_matches(flag.partition("=")[0], [*names, *more], n=1, cutoff=0.6)
    return f": did you mean {near[0]}?" if near else ""


class _Parser(argparse.ArgumentParser):
    """argparse with our manners: errors are raised, and `-p 8000` is no short form of `-pp`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(re.sub(r"^argument ([^ /:]+)[^ :]*: ", r"\1: ", message))

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        return []


class _ReadOption(argparse.Action):
    """Reads by the option's own reader."""

    def __init__(self, *args: Any, option: Option, wrong: list[UserError], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._option, self._wrong = option, wrong

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        option = self._option
        try:
            setattr(namespace, self.dest, tuple(values) if option.many else option.read(values, option.flag))
        except UserError as error:
            self._wrong.append(error)
