"""Structural tags: text with parts of a given form, as a grammar in llguidance's form.

    {"structures": [{"begin", "schema", "end"}, ...], "triggers": [...]}    the older form: triggered_tags of JSON
    {"format": {"type": ...}}                                              the newer one, a tree

Source of the forms: XGrammar 0.2, `structural_tag.py`. Here tags are text, not tokens. Free text lasts until the first place
where what follows it can begin.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llguidance import grammar_from

from tpserve.errors import UserError
from tpserve.response_template.lark import Lark, SpecialTokens, quoted, re_escape, regex
from tpserve.structured_output.json_schema import prepared

MAX_PARTS = 2_000
MAX_DEPTH = 32
Ends = tuple[str, ...]
"""The texts of which one follows; none: what the caller puts behind, or the end."""


def structural_tag(value: Any, field: str) -> str:
    """The grammar. UserError names the part that is wrong or unknown."""
    if not isinstance(value, Mapping):
        raise _wrong(f'{field} needs "format", or "structures" and "triggers"', field)
    if "format" not in value:
        value = {"format": _older(value, field)}
    tags = _Tags()
    tags.lark.rule("start", tags.part(value["format"], f"{field}.format", 0, (), True))
    if not tags.grammars:
        return str(tags.lark)
    return json.dumps({"grammars": [{"lark_grammar": str(tags.lark)}, *tags.grammars]})


def _older(value: Mapping[str, Any], field: str) -> dict[str, Any]:
    structures, triggers = value.get("structures"), value.get("triggers")
    if not isinstance(structures, list) or not structures or not isinstance(triggers, list):
        raise _wrong(f'{field} needs "structures", each with begin, schema and end, and "triggers"', field)
    tags = []
    for index, structure in enumerate(structures):
        if not isinstance(structure, Mapping) or not isinstance(structure.get("begin"), str):
            raise _wrong(f"{field}.structures[{index}] needs begin, schema and end", f"{field}.structures[{index}]")
        schema = structure.get("schema") or structure.get("json_schema") or {}
        content = {"type": "json_schema", "json_schema": schema}
        tags.append({"begin": structure["begin"], "content": content, "end": structure.get("end") or ""})
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags}


class _Tags:
    """The rules of a tree of parts. A part gets the texts of which one follows it, since free text has to know where it ends."""

    def __init__(self) -> None:
        self.lark = Lark(SpecialTokens({}, frozenset(), 0))
        self.grammars: list[dict[str, str]] = []
        self._num_parts = 0

    def part(self, value: Any, where: str, depth: int, ends: Ends, last: bool) -> str:
        """The body of a rule for a part and one of `ends`. `last`: nothing else follows."""
        self._num_parts += 1
        if depth > MAX_DEPTH or self._num_parts > MAX_PARTS:
            raise _wrong(f"{where}: at most {MAX_PARTS} parts, {MAX_DEPTH} deep; make it smaller", where)
        kind = value.get("type") if isinstance(value, Mapping) else None
        if kind in ("any_text", "triggered_tags"):
            if not ends and not last:
                raise _wrong(f"{where}: {kind} must come last or before a const_string, to have an end", where)
            return self._any_text(value, where, ends) if kind == "any_text" else self._triggered(value, where, depth, ends)
        if kind == "sequence":
            return self._sequence(value, where, depth, ends, last)
        if (make := self._makers.get(str(kind))) is None:
            known = ", ".join((*self._makers, "any_text", "triggered_tags", "sequence"))
            raise _wrong(f"{where}.type is {kind!r}; known are {known}", f"{where}.type")
        return f"{make(self, value, where, depth)} {_any_of(ends)}"

    def _const(self, value: Mapping[str, Any], where: str, depth: int) -> str:
        return quoted(_text(value, "value", where))

    def _json(self, value: Mapping[str, Any], where: str, depth: int) -> str:
        if value.get("style", "json") != "json" or value.get("any_order") or value.get("excludes"):
            raise _wrong(f"{where}: of json_schema only style json is supported, without any_order and excludes", where)
        own = prepared(value.get("json_schema"), f"{where}.json_schema")
        return self.lark.json(own, own["x-guidance"])

    def _regex(self, value: Mapping[str, Any], where: str, depth: int) -> str:
        return regex(_text(value, "pattern", where))

    def _grammar(self, value: Mapping[str, Any], where: str, depth: int) -> str:
        try:
            text = grammar_from("grammar", _text(value, "grammar", where))
        except ValueError as error:
            raise _wrong(f"{where}.grammar: {error}", f"{where}.grammar") from None
        name = f"grammar_{len(self.grammars)}"
        self.grammars.append({"name": name, "lark_grammar": text})
        return f"@{name}"

    def _or(self, value: Mapping[str, Any], where: str, depth: int) -> str:
        parts = [self.part(part, at, depth + 1, (), False) for part, at in _listed(value, "elements", where)]
        return f"({' | '.join(parts)})"

    def _tag(self, value: Mapping[str, Any], where: str, depth: int) -> str:
        return f"{quoted(_text(value, 'begin', where))} {self._behind_begin(value, where, depth)}"

    def _behind_begin(self, value: Mapping[str, Any], where: str, depth: int) -> str:
        """The content and the end of a tag."""
        end = value.get("end")
        ends = tuple(end) if isinstance(end, list) else (end,)
        if not ends or not all(isinstance(text, str) for text in ends):
            raise _wrong(f"{where}.end must be a text or a list of texts; tokens are not supported", f"{where}.end")
        return self.part(value.get("content"), f"{where}.content", depth + 1, () if ends == ("",) else ends, False)

    def _separated(self, value: Mapping[str, Any], where: str, depth: int) -> str:
        tags = " | ".join(self._tag(tag, at, depth) for tag, at in _listed(value, "tags", where))
        more = "" if value.get("stop_after_first") else f"({quoted(str(value.get('separator') or ''))} ({tags}))*"
        return f"(({tags}) {more})" + ("" if value.get("at_least_one") else "?")

    def _repeated(self, value: Mapping[str, Any], where: str, depth: int) -> str:
        body = self.part(value.get("content"), f"{where}.content", depth + 1, (), False)
        if value["type"] != "repeat":
            return f"({body}){ {'optional': '?', 'plus': '+', 'star': '*'}[value['type']] }"
        least, most = value.get("min"), value.get("max")
        if type(least) is not int or type(most) is not int or least < 0 or not (most == -1 or most >= least):
            raise _wrong(f"{where} needs min and max, numbers with 0 <= min <= max, or max -1 for no limit", where)
        return f"({body}){{{least},{'' if most == -1 else most}}}"

    def _sequence(self, value: Mapping[str, Any], where: str, depth: int, ends: Ends, last: bool) -> str:
        parts, elements = [], _listed(value, "elements", where)
        follows = False
        for index, (element, at) in enumerate(elements):
            if follows:  # the text behind free text is part of its rule
                follows = False
                continue
            is_last = index == len(elements) - 1
            behind = elements[index + 1][0] if not is_last else None
            own = ends if is_last else ()
            if isinstance(behind, Mapping) and behind.get("type") == "const_string" and _is_free(element):
                own, follows = (_text(behind, "value", elements[index + 1][1]),), True
            parts.append(self.part(element, at, depth + 1, own, last and is_last))
            if follows and index == len(elements) - 2:
                parts.append(_any_of(ends))
        return " ".join(parts)

    def _any_text(self, value: Mapping[str, Any], where: str, ends: Ends) -> str:
        if value.get("max_tokens") is not None or value.get("max_chars") is not None:
            raise _wrong(f"{where}: max_tokens and max_chars are not supported; leave them out", where)
        text = self._text_without(value, where)
        return self.lark.rule(f"until_{self._num_parts}", f"{text} {_any_of(ends)}", "lazy") if ends else text

    def _text_without(self, value: Mapping[str, Any], where: str) -> str:
        """Any text, without what it excludes."""
        excluded = value.get("excludes") or []
        if not isinstance(excluded, list) or not all(isinstance(text, str) and text for text in excluded):
            raise _wrong(f"{where}.excludes must be a list of texts that are not empty", f"{where}.excludes")
        bodies = ["/(?s:.*)/", *(f"~{regex(f'(?s:.*){re_escape(text)}(?s:.*)')}" for text in excluded)]
        return self.lark.rule(f"FREE_{self._num_parts}", " & ".join(bodies))

    def _triggered(self, value: Mapping[str, Any], where: str, depth: int, ends: Ends) -> str:
        """Text in which triggers begin tags."""
        triggers, text = value.get("triggers"), self._text_without(value, where)
        if not isinstance(triggers, list) or not all(isinstance(trigger, str) and trigger for trigger in triggers):
            raise _wrong(f"{where}.triggers must be a list of texts that are not empty", f"{where}.triggers")
        own = self._num_parts
        bodies: dict[str, list[str]] = {}
        for tag, at in _listed(value, "tags", where):
            begin = _text(tag, "begin", at)
            if (trigger := next((trigger for trigger in triggers if begin.startswith(trigger)), None)) is None:
                raise _wrong(f"{at}: no trigger begins {begin!r}", at)
            rest = begin[len(trigger) :]
            bodies.setdefault(trigger, []).append(f"{quoted(rest) if rest else ''} {self._behind_begin(tag, at, depth)}")
        tags = [
            f"{self.lark.rule(f'trigger_{own}_{index}', f'{text} {quoted(trigger)}', 'lazy')} ({' | '.join(rules)})"
            for index, (trigger, rules) in enumerate(bodies.items())
        ]
        one = self.lark.rule(f"tag_{own}", " | ".join(tags))
        tail = self.lark.rule(f"until_{own}", f"{text} {_any_of(ends)}", "lazy") if ends else text
        if value.get("stop_after_first"):
            stop = f"{one} {_any_of(ends)}"
            return stop if value.get("at_least_one") else f"({stop} | {tail})"
        return f"{one}{'+' if value.get('at_least_one') else '*'} {tail}"

    _makers: Mapping[str, Callable[["_Tags", Mapping[str, Any], str, int], str]] = {
        "const_string": _const,
        "json_schema": _json,
        "regex": _regex,
        "grammar": _grammar,
        "or": _or,
        "tag": _tag,
        "tags_with_separator": _separated,
        **dict.fromkeys(("optional", "plus", "star", "repeat"), _repeated),
    }


def _is_free(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("type") in ("any_text", "triggered_tags")


def _any_of(ends: Sequence[str]) -> str:
    return f"({' | '.join(map(quoted, ends))})" if ends else ""


def _listed(value: Mapping[str, Any], key: str, where: str) -> list[tuple[Any, str]]:
    """The members of a list, each with its place."""
    found = value.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(part, Mapping) for part in found):
        raise _wrong(f"{where}.{key} must be a list of objects, at least one", f"{where}.{key}")
    return [(part, f"{where}.{key}[{index}]") for index, part in enumerate(found)]


def _text(value: Mapping[str, Any], key: str, where: str) -> str:
    text = value.get(key)
    if not isinstance(text, str) or not text:
        raise _wrong(f"{where}.{key} must be a text that is not empty", f"{where}.{key}")
    return text


def _wrong(text: str, param: str) -> UserError:
    return UserError(text, param=param, code="invalid_value")
