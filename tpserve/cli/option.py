"""Derives command-line options from a struct of flags: the spellings, the value's type and the help of each field."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from msgspec import Struct
from msgspec.structs import fields

from tpserve.config.flags import Flag, Flags, WrongValue
from tpserve.errors import UserError


@dataclass(frozen=True)
class Option:
    """One flag. `kind`: the type of its value; `tuple[str, ...]` takes several arguments, `tuple[int, ...]` one with commas.

    `words`: literal values that it takes besides values of that type, such as "auto".
    """

    name: str
    kind: Any
    default: Any
    about: Flag
    words: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        """The main spelling, such as `--max-model-len`."""
        return "--" + self.name.replace("_", "-")

    @property
    def off(self) -> str:
        """The spelling that turns a switch off; empty for other flags."""
        return "--no-" + self.name.replace("_", "-") if self.kind is bool else ""

    @property
    def names(self) -> tuple[str, ...]:
        """All spellings that turn a switch on, or that take a value."""
        return tuple(filter(None, [self.flag, self.about.short, *self.about.aliases]))

    @property
    def off_names(self) -> tuple[str, ...]:
        """All spellings that turn a switch off."""
        if self.kind is not bool:
            return ()
        return (*("--no-" + name[2:] for name in self.names if name.startswith("--")), *self.about.off_aliases)

    @property
    def spellings(self) -> tuple[str, ...]:
        """The spellings that help texts show; a switch that is on by default shows how to turn it off."""
        return tuple(filter(None, [self.off if self.default is True else self.flag, self.about.short]))

    @property
    def many(self) -> bool:
        """Whether the flag takes several arguments."""
        return bool(self.kind == tuple[str, ...])

    def value_name(self) -> str:
        """The value's placeholder in help texts; empty for a switch."""
        if self.about.metavar:
            return self.about.metavar
        if get_origin(self.kind) is Literal:
            return "{" + ",".join(get_args(self.kind)) + "}"
        return "|".join((_VALUE_NAMES[self.kind], *self.words))

    def default_text(self) -> str:
        """The default for help texts; empty when the help text already describes it."""
        if self.default in (None, ()) or self.kind is bool or (self.about.parse and not isinstance(self.default, str)):
            return ""
        return self.text(self.default)

    def text(self, value: Any) -> str:
        """The text from which `read` makes `value`."""
        if isinstance(value, dict):
            return json.dumps(value)
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    def read(self, text: str, source: str) -> Any:
        """Parse `text`. Raises UserError that names `source` (the flag, keyword or variable) and what it takes."""
        if not text:
            raise UserError(f"{source} is empty", param=self.name)
        if text in self.words:
            return text
        try:
            if self.about.parse is not None:
                return self.about.parse(text)
            return self._choice(text) if get_origin(self.kind) is Literal else self._bounded(_READERS[self.kind](text))
        except WrongValue as wrong:
            what = " or ".join((str(wrong), *self.words))
            raise UserError(f"{source} must be {what}, not {text!r}", param=self.name) from None

    def _choice(self, text: str) -> str:
        if text not in get_args(self.kind):
            raise WrongValue("one of " + ", ".join(get_args(self.kind)))
        return text

    def _bounded(self, value: Any) -> Any:
        about = self.about
        if about.at_least is not None and not value >= about.at_least:
            raise WrongValue(f"at least {about.at_least}")
        if about.above is not None and not value > about.above:
            raise WrongValue(f"above {about.above}")
        if about.at_most is not None and not value <= about.at_most:
            raise WrongValue(f"at most {about.at_most}")
        if about.below is not None and not value < about.below:
            raise WrongValue(f"below {about.below}")
        return value


def human_number(text: str) -> int:
    """Parse a whole number, with vLLM's suffixes: 32k is 32,000 and 32K is 32,768; m, g and t, M, G and T likewise.

    Raises WrongValue.
    """
    match = re.fullmatch(r"(\d+)(\.\d+)?([kmgt])", text.strip(), re.IGNORECASE)
    if match is None:
        try:
            return int(text)
        except ValueError:
            raise WrongValue("a whole number") from None
    whole, fraction, unit = match.groups(default="")
    power = "kmgt".index(unit.lower()) + 1
    if unit.isupper() and fraction:
        raise WrongValue(f"a whole number before {unit}, which counts by 1,024 ({unit.lower()} counts by 1,000)")
    size = Decimal(whole + fraction) * (1024 if unit.isupper() else 1000) ** power
    if size != int(size):
        raise WrongValue("a whole number")
    return int(size)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise WrongValue("a number") from None


def _switch(text: str) -> bool:
    if text.lower() not in ("0", "1", "false", "true"):
        raise WrongValue("0 or 1")
    return text.lower() in ("1", "true")


def _sizes(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise WrongValue("positive numbers joined by commas, such as 3,2")
    return tuple(map(int, parts))


def _members(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise WrongValue('a JSON object, such as {"temperature": 0.5}')
    return value


_VALUE_NAMES = {
    int: "N", float: "X", str: "TEXT", bool: "", Path: "FILE", tuple[str, ...]: "NAME [NAME ...]", tuple[int, ...]: "N,N,...",
    dict[str, Any]: "JSON",
}  # fmt: skip
_READERS: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: human_number,
    float: _number,
    bool: _switch,
    Path: Path,
    tuple[int, ...]: _sizes,
    tuple[str, ...]: lambda text: tuple(text.split()),
    dict[str, Any]: _members,
}


def _option(name: str, default: Any, hint: Any) -> Option:
    kind, about = hint.__origin__, hint.__metadata__[0]
    words: tuple[str, ...] = ()
    if get_origin(kind) in (Union, UnionType):
        kind, *others = (option for option in get_args(kind) if option is not NoneType)
        words = tuple(word for other in others for word in get_args(other))
    return Option(name, kind, default, about, words)


def options_of(flags: type[Struct]) -> dict[str, Option]:
    """The options of a struct by field name, in field order; every field is `Annotated[..., Flag(...)]`."""
    hints = get_type_hints(flags, include_extras=True)
    return {field.name: _option(field.name, field.default, hints[field.name]) for field in fields(flags)}


OPTIONS: dict[str, Option] = options_of(Flags)
"""All flags of the server."""
