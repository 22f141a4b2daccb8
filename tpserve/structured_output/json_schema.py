"""Makes a client's JSON schema one that llguidance understands as JSON Schema means it, or refuses it.

llguidance itself refuses most of what it cannot express. This module knows the rest, where a grammar would take instances that
are not valid: it is refused with the keyword's name and place, or put in other words that allow the same or less. Put in other
words, beside keywords that have no effect, are:

    numbers       bounds beyond 2^53 become the next ones inside that a double holds
    format        date, date-time and time know the lengths of months, leap years and no leap seconds; hostname its length
    strings       no \\u escapes: "\\u0061" would be a second name of the property "a", which its schema does not bind

Sources: JSON Schema 2020-12 (core and validation), llguidance 1.9 `docs/json_schema.md`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard
from urllib.parse import unquote

import msgspec

from tpserve.errors import UserError

MAX_DEPTH = 128
"""Levels of nesting: those of a body, also where the schema comes as a text."""
WHITESPACE = r"[\x20\x09]|\x0D?\x0A[\x20\x09]{0,32}"
"""Between the parts of JSON: one blank, or a line break and an indent. A model at a loss may write blanks for ever, and every one
of them would be valid."""
UNSUPPORTED = (
    "not", "if", "contains", "uniqueItems", "propertyNames", "dependentRequired", "dependentSchemas", "dependencies",
    "unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor",
)  # fmt: skip
"""Keywords that no grammar of llguidance expresses."""
COMPANIONS = {"then": "if", "else": "if", "minContains": "contains", "maxContains": "contains"}
"""Keywords that say nothing without another one."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "not": (False,), "uniqueItems": (False,), "propertyNames": (True, {}), "dependentRequired": ({},), "dependentSchemas": ({},),
    "dependencies": ({},), "unevaluatedItems": (True, {}), "unevaluatedProperties": (True, {}), "$recursiveAnchor": (False,),
}  # fmt: skip
"""Values with which a keyword says nothing."""
IN_ONE = ("additionalProperties", "items", "additionalItems")
IN_LIST = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
IN_MAP, DEFINED = ("properties", "patternProperties"), ("$defs", "definitions")
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
LOWER, UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
LARGEST = 2**63 - 1024
"""The largest double that is a 64-bit integer: llguidance's bounds are both."""

_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DAY = "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8])"
_DATE = f"(?:{_YEAR}-(?:{_DAY})|{_LEAP_YEAR}-02-29)"
_HOUR = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = f"{_HOUR}:[0-5][0-9](?:\\.[0-9]+)?(?:[Zz]|[+-]{_HOUR})"
FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}[Tt]{_TIME}$"}
"""RFC 3339, with years of four digits from 1 on, as patterns. Other formats are llguidance's."""
HOSTNAME_LENGTH = 253
_UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
"""Characters that a string has as \\u escapes only, and DEL, which llguidance never writes."""


def prepared(schema: Any, field: str, whitespace: str | None = WHITESPACE) -> dict[str, Any]:
    """A copy of a schema for llguidance, also inside `%json`; the caller's is left as it is.

    UserError says what is refused and where. `field` names the schema in errors. `whitespace`: the pattern between the parts of
    JSON, None for nothing there at all.
    """
    try:
        own = msgspec.json.decode(msgspec.json.encode(schema))
    except (ValueError, TypeError, RecursionError) as error:
        raise _refused(f"{field} is no JSON: {error}", field) from None
    if not isinstance(own, dict | bool):
        raise _refused(f"{field} must be a JSON schema, an object", field)
    if own is False:
        raise _refused(f"{field} is false: no answer is valid; leave it out", field)
    if own is True:
        own = {}
    if "x-guidance" in own:
        raise _refused(f"{field}: x-guidance is not supported; blanks have fields of their own in structured_outputs", field)
    _Walk(field, own).all()
    blanks = {"whitespace_flexible": False} if whitespace is None else {"whitespace_pattern": whitespace}
    own["x-guidance"] = {"lenient": False, "coerce_one_of": False, "json_allowed_escapes": 'nrbtf\\"', **blanks}
    return own


class _Walk:
    """Visits every schema inside a schema and changes it in its place."""

    def __init__(self, field: str, root: dict[str, Any]) -> None:
        self._field = field
        self._seen: set[int] = set()
        self._pointers: list[str] = []
        self._has_names = False
        """Whether a reference is an anchor or the name of a schema, so that any definition may be meant."""
        self._definitions: list[tuple[str, Any]] = []
        self._resources = [root]
        """Where pointers begin: the root, and schemas with an $id."""

    def all(self) -> None:
        """The root, and then what references lead to. A definition that nothing refers to may be anything."""
        self._visit(self._resources[0], "#", 0)
        while self._pointers or (self._has_names and self._definitions):
            if self._pointers:
                pointer = self._pointers.pop()
                for resource in list(self._resources):
                    self._visit(_at(resource, pointer), f"#{pointer}", 0)
            else:
                place, part = self._definitions.pop()
                self._visit(part, place, 0)

    def _visit(self, schema: Any, place: str, depth: int) -> None:
        if not isinstance(schema, dict) or id(schema) in self._seen:
            return
        if depth > MAX_DEPTH:
            raise self._error(place[:200], f"schemas nest {MAX_DEPTH} deep at most")
        self._seen.add(id(schema))
        if isinstance(schema.get("$id"), str):
            self._resources.append(schema)
        if isinstance(reference := schema.get("$ref"), str):
            base, _, pointer = reference.partition("#")
            self._has_names |= base != "" or (pointer != "" and pointer[0] != "/")
            self._pointers.append(unquote(pointer))
        self._keywords(schema, place)
        for key in DEFINED:
            self._definitions += ((f"{place}/{key}/{name}", part) for name, part in _mapping(schema, key).items())
        for key, part in _parts(schema):
            self._visit(part, f"{place}/{key}", depth + 1)

    def _keywords(self, schema: dict[str, Any], place: str) -> None:
        self._remove_neutral(schema, place)
        if str(schema.get("$schema")).startswith("http://json-schema.org/draft-03"):
            raise self._error(place, "draft 3 of JSON Schema is not supported; use a later one")
        if "prefixItems" in schema and "additionalItems" in schema:
            raise self._error(place, "additionalItems is none of prefixItems' keywords: in 2020-12 it is items")
        self._check_values(schema, place)
        self._check_names(schema, place)
        for pattern in (schema.get("pattern"), *_mapping(schema, "patternProperties")):
            if isinstance(pattern, str) and (found := _class_operator(pattern)):
                raise self._error(place, f"the pattern {pattern[:200]!r} has {found} inside [...]; write a backslash before it")
        self._spell_out_format(schema)

    def _spell_out_format(self, schema: dict[str, Any]) -> None:
        if schema.get("format") == "hostname" and not _is_below(schema.get("maxLength"), HOSTNAME_LENGTH):
            schema["maxLength"] = HOSTNAME_LENGTH
        if (pattern := FORMATS.get(str(schema.get("format")))) is not None:
            del schema["format"]
            if "pattern" in schema:
                schema["allOf"] = [*_listed(schema, "allOf"), {"pattern": pattern}]
            else:
                schema["pattern"] = pattern

    def _remove_neutral(self, schema: dict[str, Any], place: str) -> None:
        for key, companion in COMPANIONS.items():
            if companion not in schema:
                schema.pop(key, None)
        for key in UNSUPPORTED:
            if key not in schema:
                continue
            if not any(type(schema[key]) is type(value) and schema[key] == value for value in NEUTRAL.get(key, ())):
                raise self._error(place, f"the keyword {key} is not supported; leave it out, and check the answer for it")
            del schema[key]

    def _check_values(self, schema: dict[str, Any], place: str) -> None:
        for key in COUNTS:
            if isinstance(value := schema.get(key), float) and value.is_integer():
                schema[key] = int(value)
        for (bound, exclusive), towards in ((LOWER, math.inf), (UPPER, -math.inf)):
            if _is_large(value := schema.get(bound)):
                schema[bound] = _inside(value, towards)
            if _is_large(value := schema.get(exclusive)):  # whose neighbour llguidance rounds to itself
                del schema[exclusive]
                near = _inside(value, towards)
                near = near if near != value else int(math.nextafter(value, towards))
                if isinstance(other := schema.get(bound, near), int | float):
                    schema[bound] = max(other, near) if towards > 0 else min(other, near)
        for key in ("const", "enum", "multipleOf"):
            for value in _scalars(schema.get(key)):
                if _is_large(value) and not _is_exact(value):
                    raise self._error(place, f"{key} has the number {value}, which no double holds; write it as a string")
                if isinstance(value, str) and _UNWRITABLE.search(value):
                    raise self._error(place, f"{key} has the text {value[:100]!r}; no answer can have a control character")

    def _check_names(self, schema: dict[str, Any], place: str) -> None:
        """A name may be written twice in an object, where it counts once, and any grammar would count it twice."""
        least, required = schema.get("minProperties"), {name for name in _listed(schema, "required") if isinstance(name, str)}
        if isinstance(least, int) and least > len(required) + 1:
            most = f"minProperties is {least} and required names {len(required)}; it may be one more at most"
            raise self._error(place, f"{most}: name the properties in required")

    def _error(self, place: str, text: str) -> UserError:
        return _refused(f"{self._field}: at {place}: {text}", self._field)


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas that a schema has as parts, and where."""
    for key in IN_ONE:
        yield key, schema.get(key)
    for key in IN_LIST:
        yield from ((f"{key}/{index}", part) for index, part in enumerate(_listed(schema, key)))
    for key in IN_MAP:
        yield from ((f"{key}/{name}", part) for name, part in _mapping(schema, key).items())


def _listed(schema: Mapping[str, Any], key: str) -> list[Any]:
    return value if isinstance(value := schema.get(key), list) else []


def _mapping(schema: Mapping[str, Any], key: str) -> dict[str, Any]:
    return value if isinstance(value := schema.get(key), dict) else {}


def _at(root: Any, pointer: str) -> Any:
    """What a JSON pointer leads to, or None."""
    for step in pointer.split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(root, dict):
            root = root.get(step)
        elif isinstance(root, list) and step.isdecimal() and int(step) < len(root):
            root = root[int(step)]
        else:
            return None
    return root


def _scalars(value: Any) -> Iterator[Any]:
    """All values inside a value that are no arrays or objects, and the names of members."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        elif isinstance(value, dict):
            left += (*value, *value.values())
        else:
            yield value


def _is_large(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and abs(value) >= 2**53  # never a bool


def _is_below(value: Any, limit: int) -> bool:
    return isinstance(value, int) and value < limit


def _is_exact(value: int) -> bool:
    return abs(value) <= LARGEST and int(float(value)) == value


def _inside(value: int, towards: float) -> int:
    """The nearest bound of a double and of 64 bits that allows no more than `value`: above a lower bound, below an upper one."""
    value = max(value, -LARGEST) if towards > 0 else min(value, LARGEST)
    if abs(value) > LARGEST:  # no instance of 64 bits: llguidance says so
        return value
    near = float(value)
    return int(near if (near >= value if towards > 0 else near <= value) else math.nextafter(near, towards))


def _class_operator(pattern: str) -> str:
    """What ECMA-262 reads as characters inside [...] and llguidance as an operation on sets; empty when there is none."""
    begin = -1
    for match in re.finditer(r"\\.|\[\^?\]?|\]|--|&&|~~|.", pattern, re.DOTALL):
        text = match[0]
        if begin < 0:
            begin = match.start() if text[0] == "[" else -1
        elif text == "]":
            begin = -1
        elif text[0] == "[" or text in ("--", "&&", "~~"):
            return text[:2]
    return ""


def _refused(text: str, field: str) -> UserError:
    return UserError(text, param=field, code="invalid_grammar")
