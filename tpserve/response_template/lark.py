"""A grammar in llguidance's form of Lark, rule by rule, and the literal text of an answer's form in it.

Text of a special token matches no pattern of text: in rules such a token is written by its id, `<[id]>`. Other added tokens are
ordinary text. Source: llguidance, docs/syntax.md and docs/special_tokens.md.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import msgspec
from msgspec import Struct

from tpserve.errors import UserError
from tpserve.response_template.format import ID, INDEX
from tpserve.text.tokenizer import Tokenizer

_TERMINALS = {
    "TEXT": "/(?s:.+)/",
    "BLANKS": r"/[ \t\r\n]+/",
    "INDEX": "/[0-9]{1,9}/",
    "ID": "/[a-zA-Z0-9]{9}/",
}


class SpecialTokens(Struct, frozen=True, dict=True):
    """The tokens that match no text. `size`: ids below it have a token; `ends`: the ids that end an answer (EOS)."""

    ids: Mapping[str, int]
    ends: frozenset[int]
    size: int

    @staticmethod
    def of(tokenizer: Tokenizer, eos_ids: Iterable[int], vocab_size: int) -> "SpecialTokens":
        """Those of a tokenizer, for a model with `vocab_size` ids."""
        size, ends = min(tokenizer.vocab_size, vocab_size), frozenset(eos_ids)
        ids = {tokenizer.piece(id): id for id in range(size) if id in ends or tokenizer.is_special(id)}
        return SpecialTokens(ids, ends, size)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Finds special tokens and placeholders in a literal, the longest first."""
        texts = sorted((text for text in (*self.ids, INDEX, ID) if text), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, texts))})")


class Literal(Struct, frozen=True):
    """A literal in the grammar. `ended`: a token that ends the answer stood in it; nothing can follow."""

    atoms: tuple[str, ...]
    ended: bool

    def __str__(self) -> str:
        return " ".join(self.atoms)


class Lark:
    """Rules under construction."""

    def __init__(self, tokens: SpecialTokens) -> None:
        self._tokens = tokens
        self._rules: dict[str, str] = {}
        self._json: dict[str, str] = {}
        self._shared: dict[str, str] = {}
        self._literals: dict[str, Literal] = {}

    def __str__(self) -> str:
        return "\n".join(["%llguidance {}", *(f"{name}: {body}" for name, body in {**self._rules, **_TERMINALS}.items()), ""])

    def rule(self, name: str, body: str, options: str = "") -> str:
        """Add a rule, or a terminal where the name is in capitals; return its name."""
        self._rules[name + (options and f"[{options}]")] = body or '""'
        return name

    def json(self, schema: Mapping[str, Any], options: Mapping[str, Any]) -> str:
        """A value of a JSON schema with llguidance's `options`; equal ones share a rule."""
        text = encoded({**schema, "x-guidance": options})
        return self.rule(self._json.setdefault(text, f"json_{len(self._json)}"), f"%json {text}")

    def shared(self, kind: str, key: str) -> tuple[str, bool]:
        """The name of the rule that all who have the same key share, and whether it has still to be added."""
        is_new = key not in self._shared
        return self._shared.setdefault(key, f"{kind}_{len(self._shared)}"), is_new

    def named(self, name: str, text: str) -> list[str]:
        """The atoms of a literal behind a name, which is always text; the first has the name."""
        first, *rest = self.literal(text).atoms or ("",)
        return (
            [quoted(name + json.loads(first)), *rest] if first.startswith('"') else [quoted(name), *filter(None, [first]), *rest]
        )

    def literal(self, text: str) -> Literal:
        """The atoms of a literal: texts in quotes, special tokens by id,"""
        if text not in self._literals:
            self._literals[text] = self._split(text)
        return self._literals[text]

    def _split(self, text: str) -> Literal:
        atoms: list[str] = []
        for part in self._tokens.pattern.split(text):
            if (id := self._tokens.ids.get(part)) is not None:
                if id in self._tokens.ends:
                    return Literal(tuple(atoms), True)
                atoms.append(f"<[{id}]>")
            elif part:
                atoms.append({INDEX: "INDEX", ID: "ID"}.get(part) or quoted(part))
        return Literal(tuple(atoms), False)

    def opening(self, name: str, literal: Literal) -> str:
        """A literal that wins over other text which begins alike."""
        first, *rest = literal.atoms or ("",)
        return str(literal) if not first or is_token(first) else " ".join([self.rule(name, first, "lazy"), *rest])

    def until(self, name: str, end: Literal, text: str = "TEXT?") -> str:
        """Text up to the first `end`, and `end`."""
        first, *rest = end.atoms or ("",)
        if not first or is_token(first):
            return f"{text} {end}"
        return " ".join([self.rule(name, f"{text} {first}", "lazy"), *rest])

    def others(self, *without: str) -> str:
        """Any one special token but those that end an answer and the atoms `without`; empty when there is none."""
        return _ranges(sorted({*self._tokens.ids.values()} - self._tokens.ends - _ids(without)))

    def any_token(self, *without: str) -> str:
        """Any one token, of text or special, but those that end an answer and the atoms `without`."""
        left_out = sorted(id for id in self._tokens.ends | _ids(without) if id < self._tokens.size)
        bounds = zip([-1, *left_out], [*left_out, self._tokens.size], strict=True)
        return _token((before + 1, after - 1) for before, after in bounds)


def is_token(atom: str) -> bool:
    """Whether an atom is a special token."""
    return atom.startswith("<[")


def quoted(text: str) -> str:
    """A text as a literal of Lark."""
    return json.dumps(text, ensure_ascii=False)


def regex(pattern: str) -> str:
    """A regular expression between slashes."""
    pattern = re.sub(r"\\.|/", lambda found: "\\/" if found[0] == "/" else found[0], pattern, flags=re.DOTALL)
    return "/" + pattern.replace("\n", "\\n").replace("\r", "\\r") + "/"


def without(text: str) -> str:
    """A terminal's body: any text that does not contain `text`, whatever blanks that has."""
    pattern = "[ \\t\\r\\n]*".join(re_escape(part) for part in text.split() or [text])
    return f"/(?s:.*)/ & ~{regex(f'(?s:.*){pattern}(?s:.*)')}"


def re_escape(text: str) -> str:
    """A text as a regular expression of Rust's regex crate, which knows fewer escapes than Python."""
    return re.sub(r"[\\.+*?()|\[\]{}^$#&\-~]", lambda found: "\\" + found[0], text)


def encoded(value: Any) -> str:
    """A client's value as JSON. UserError for one that is nested too deeply or is no JSON."""
    try:
        return msgspec.json.encode(value).decode()
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"a tool's parameters cannot be written as JSON: {error}", param="tools", code="invalid_value") from None


def _ids(atoms: Sequence[str]) -> set[int]:
    return {int(atom[2:-2]) for atom in atoms if is_token(atom)}


def _ranges(ids: Sequence[int]) -> str:
    """Any one of the sorted ids."""
    starts = [at for at in range(len(ids)) if at == 0 or ids[at] != ids[at - 1] + 1]
    return _token((ids[begin], ids[end - 1]) for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True))


def _token(runs: Iterable[tuple[int, int]]) -> str:
    """Any one token of the runs (first, last), as `<[a-b,c]>`; empty for no token."""
    shown = [f"{first}-{last}" if last > first else str(first) for first, last in runs if last >= first]
    return f"<[{','.join(shown)}]>" if shown else ""
