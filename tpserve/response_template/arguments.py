"""The rules of a call's arguments: one JSON object, arguments in tags, or Python's keyword arguments.

A schema is a client's: what is wrong in it goes into the grammar as it is, and llguidance's error is the answer.
"""

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from tpserve.errors import UserError
from tpserve.response_template.format import KEY, TYPE, TaggedArguments, ToolFormat, bare_key, marked, type_of
from tpserve.response_template.lark import Lark, encoded, is_token, quoted, re_escape, regex, without
from tpserve.response_template.schema_parts import (
    branches_of,
    enumerated,
    has_counts,
    is_readable,
    is_string,
    limits_of,
    mapping,
    may_be_string,
    resolved,
)
from tpserve.response_template.schema_types import declared_types
from tpserve.structured_output.json_schema import WHITESPACE, prepared

PYTHON = TaggedArguments(begin="", middle="=", end="", between=", ")
STRICT = prepared({}, "")["x-guidance"]
"""llguidance's options for a value that obeys a schema."""
_LOCAL = re.compile(r'"\$ref":"#(?!/\$defs/|/definitions/)')
_ROOT = "tpserve-root"
_UNKNOWN_AT_ROOT = (
    *("anyOf", "oneOf", "allOf", "not", "if", "patternProperties", "propertyNames", "minProperties", "maxProperties"),
    *("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties"),
)
_TYPES = ("number", "boolean", "object", "array", "null")
"""Of values that are no strings, as a format names them."""
_PYTHON_VALUE = {
    "py_value": 'PY_ATOM | "[" (py_value (PY_COMMA py_value)*)? "]" | "{" (py_item (PY_COMMA py_item)*)? "}"',
    "py_item": "PY_STRING PY_COLON py_value",
    "PY_ATOM": 'PY_STRING | PY_NUMBER | "True" | "False" | "None" | "true" | "false" | "null"',
    "PY_STRING": r"""/"([^"\\\x00-\x1f]|\\[^\x00-\x1f])*"|'([^'\\\x00-\x1f]|\\[^\x00-\x1f])*'/""",
    "PY_NUMBER": r"/-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/",
    "PY_COMMA": "/, ?/",
    "PY_COLON": "/: ?/",
}


class Tool(Struct, frozen=True):
    """A function that the model may call. `strict`: its arguments obey `parameters`, a JSON schema."""

    name: str
    parameters: Any = {}
    strict: bool = False


def arguments(lark: Lark, tool: Tool, name: str, format: ToolFormat) -> str:
    """The arguments of a call, as the body of a rule; names of new rules begin with `name`."""
    schema = _of_object(tool) if tool.strict else {"type": "object"}
    if format.arguments == "json":
        return lark.json(schema, STRICT if tool.strict else {"whitespace_pattern": WHITESPACE})
    if not tool.strict:
        return _Parameters(lark, name, format, {}).body()
    root = resolved(schema, schema)
    if not is_readable(root):
        return lark.json(schema, STRICT)
    if unknown := [key for key in _UNKNOWN_AT_ROOT if key in root]:
        text = f"{unknown[0]!r} at the root of the parameters of {tool.name!r} cannot be enforced in this model's form of calls"
        raise UserError(f"{text}; leave it out, or set strict to false", param="tools", code="invalid_value")
    return _Parameters(lark, name, format, {**schema, **root}).body()


def _of_object(tool: Tool) -> Mapping[str, Any]:
    """The schema of a tool's arguments, as llguidance understands it; they are an object also where it does not say so."""
    none = {"properties": {}, "additionalProperties": False}
    schema = none if tool.parameters is None else {} if tool.parameters is True else tool.parameters
    types = schema.get("type", "object") if isinstance(schema, Mapping) else "object"
    if types != "object" and not (isinstance(types, list) and "object" in types):
        text = f"the parameters of {tool.name!r} have type {str(types)[:80]!r}, arguments are an object"
        raise UserError(f"{text}; give them type object", param="tools", code="invalid_value")
    try:
        own = prepared({**schema, "type": "object"} if isinstance(schema, Mapping) else schema, f"parameters of {tool.name!r}")
    except UserError as error:
        raise UserError(str(error), param="tools", code=error.code) from None
    del own["x-guidance"]
    return own


class _Parameters:
    """The rules of named arguments: each parameter of the schema in its order, then additional ones.

    `own`: the schema of the arguments, when `root`, in which its references are looked for, is another.
    """

    def __init__(
        self, lark: Lark, name: str, format: ToolFormat, root: Mapping[str, Any], own: Mapping[str, Any] | None = None
    ) -> None:
        self._lark, self._name, self._root, self._python = lark, name, root, format.arguments == "python"
        self._own, self._format = root if own is None else own, format
        self._tags = tags = PYTHON if self._python else format.tags or TaggedArguments("", "", "")
        self._between = str(lark.literal(tags.between))
        self._begin, self._end = str(lark.literal(tags.begin)), lark.literal(tags.end)
        self._call_end = _plain_end(lark, format)

    def body(self) -> str:
        """Required parameters are present, optional ones may be."""
        properties, required = self._own.get("properties", {}), set(self._own.get("required", ()))
        additional = self._own.get("additionalProperties", "properties" not in self._own)
        named = [key for key, schema in properties.items() if schema is not False or key in required]
        named += sorted(required - properties.keys())
        named = sorted(named) if self._tags.sorts else named
        items = [(self._item(at, key, properties.get(key, additional)), key in required) for at, key in enumerate(named)]
        return self._sequence(items, self._extra(named, additional) if additional is not False else "")

    def _sequence(self, items: list[tuple[str, bool]], extra: str) -> str:
        """Items in order with separators: rule `more_N` continues with item N, `first_N` begins with it or a later one."""
        name, between = self._name, self._between
        last = len(items)
        self._lark.rule(f"{name}_more_{last}", f"({between} {extra})*" if extra else "")
        self._lark.rule(f"{name}_first_{last}", f"({extra} {name}_more_{last})?" if extra else "")
        for at in reversed(range(last)):
            item, is_required = items[at]
            more = f"{between} {item} {name}_more_{at + 1}"
            first = f"{item} {name}_more_{at + 1}"
            self._lark.rule(f"{name}_more_{at}", more if is_required else f"{more} | {name}_more_{at + 1}")
            self._lark.rule(f"{name}_first_{at}", first if is_required else f"{first} | {name}_first_{at + 1}")
        return f"{name}_first_0"

    def _item(self, at: int, key: str, schema: Any) -> str:
        name = f"{self._name}_p{at}"
        return self._lark.rule(name, f"{self._begin} {self._behind_key(name, key, schema)}")

    def _extra(self, named: list[str], schema: Any) -> str:
        """An argument that the schema does not name."""
        name = f"{self._name}_extra"
        bare = self._python or self._tags.mark
        characters = "[a-zA-Z_][a-zA-Z0-9_]{0,63}" if bare else r"[^\s<>\[\]=\"]{1,64}"
        body = f"/{characters}/" + (f" & ~{regex('|'.join(map(re_escape, named)))}" if named else "")
        self._lark.rule(key := f"{name}_KEY".upper(), body)
        return self._lark.rule(name, f"{self._begin} {self._behind_key(name, None, schema, key)}")

    def _behind_key(self, name: str, key: str | None, schema: Any, pattern: str = "") -> str:
        """The key - or one of a pattern -, what stands between it and its value, and the value to the end of its tag."""
        if self._python or self._tags.mark:
            value = self._python_value(schema) if self._python else _Marked(self._lark, self._format, self._root).value(schema)
            forms = [(self._tags.middle, [value])]
        elif self._tags.item:
            value = _Nested(self._lark, self._format, self._root).value(schema)
            behind = self._tags.end.partition(KEY)[2]
            closing = quoted(key + behind) if key is not None else f"{pattern} {quoted(behind)}"
            forms = [(self._tags.middle, [f"{value} {closing}"])]
        else:
            texts, others = self._values(name, schema)
            other = self._tags.other_middle or self._tags.middle
            forms = [(self._tags.middle, texts)]
            forms += [(other.replace(TYPE, kind), [f"{value} {self._end}" for value in others[kind]]) for kind in others]
            if not self._tags.other_middle:
                forms = [(self._tags.middle, [value for _, values in forms for value in values])]
        written = [
            f"{self._key(f'{name}_{at}', key, middle, pattern)} ({' | '.join(values)})"
            for at, (middle, values) in enumerate(forms)
            if values
        ]
        return f"({' | '.join(written)})"

    def _key(self, name: str, key: str | None, middle: str, pattern: str) -> str:
        if key is not None:
            return " ".join(self._lark.named(bare_key(key) if self._tags.mark else key, middle))
        return self._lark.until(f"{name}_key", self._lark.literal(middle), pattern)

    def _values(self, name: str, schema: Any) -> tuple[list[str], dict[str, list[str]]]:
        """A value: as text, up to the end of its tag, and as JSON, without it, by the type if the format names that."""
        texts, named = [], []
        others: dict[str, list[str]] = {}
        for at, branch in enumerate(branches_of(self._root, schema)):
            if (values := enumerated(branch)) is not None:
                named += [quoted(value) for value in values if isinstance(value, str)]
                for value in values:
                    if not isinstance(value, str):
                        others.setdefault(self._kind(value), []).append(quoted(encoded(value)))
                continue
            if may_be_string(branch):
                texts.append(self._text(f"{name}_{at}", branch))
            if not is_string(branch):
                for kind, own in self._by_type(branch):
                    others.setdefault(kind, []).append(self.of_json(own))
        if texts and not self._tags.other_middle:
            return texts, {}  # which may be JSON, too
        if named:
            texts.append(f"{self._lark.rule(f'{name}_VALUES'.upper(), ' | '.join(named))} {self._end}")
        return texts, others

    def _kind(self, value: Any) -> str:
        return type_of(value) if TYPE in self._tags.other_middle else ""

    def _by_type(self, branch: Any) -> list[tuple[str, Any]]:
        """A schema for each type that a format has to name: those that it declares, or all."""
        if TYPE not in self._tags.other_middle:
            return [("", branch)]
        declared = {"number" if each == "integer" else each for each in declared_types(branch, self._root)}
        schema = mapping(branch)
        if declared:
            return [(kind, branch if "type" in schema else {**schema, "type": kind}) for kind in _TYPES if kind in declared]
        return [(kind, {**schema, "type": kind}) for kind in _TYPES] if branch is True or schema else [("", branch)]

    def _text(self, name: str, schema: Any) -> str:
        """A string as it is, up to the end of its tag; without limits the blanks before the end need not be the format's."""
        end, limits = self._tags.end, limits_of(schema)
        if limits:
            first = next(iter(self._end.atoms), "")
            apart = without(end.strip()) if first and not is_token(first) and end.strip() else "/(?s:.*)/"
            return self._lark.until(f"{name}_text", self._end, self._lark.rule(f"{name}_TEXT".upper(), f"{limits} & {apart}"))
        if not (core := end.strip()):
            return self._lark.until("text", self._end)
        value = self._lark.rule("VALUE", without(self._call_end)) if self._call_end else "TEXT?"
        text = self._lark.until("text", self._lark.literal(core), value)
        return f"{text} {self._lark.literal(end[len(end.rstrip()) :])}"

    def _python_value(self, schema: Any) -> str:
        if self._root or schema is not True:
            return self.of_json(schema)
        for name, body in _PYTHON_VALUE.items():
            self._lark.rule(name, body)
        return "py_value"

    def of_json(self, schema: Any) -> str:
        """A value by JSON, with the definitions of the whole schema."""
        if not isinstance(schema, Mapping):  # llguidance says what is wrong with it
            schema = {} if schema is True else {"allOf": [schema]}
        if '"$ref"' not in encoded(schema):
            return self._lark.json(schema, STRICT)
        whole = dict(schema)
        for key in ("$defs", "definitions"):
            if named := mapping(self._root.get(key)):
                whole[key] = {**mapping(schema.get(key)), **named}
        if _LOCAL.search(encoded(whole)):  # another place of the whole schema
            whole["$defs"] = {**mapping(whole.get("$defs")), _ROOT: self._root}
        return self._lark.json(msgspec.json.decode(_LOCAL.sub(f'"$ref":"#/$defs/{_ROOT}', encoded(whole))), STRICT)


class _Marked:
    """The rules of values in the dialect of JSON whose strings stand between marks. Equal schemas share a rule, so references may
    go round. What cannot be said in the dialect is plain JSON, which its readers take as well."""

    def __init__(self, lark: Lark, format: ToolFormat, root: Mapping[str, Any]) -> None:
        assert format.tags is not None
        self._lark, self._format, self._root, self._tags = lark, format, root, format.tags
        self._mark = lark.literal(format.tags.mark)

    def value(self, schema: Any) -> str:
        """The rule of a value."""
        name, is_new = self._lark.shared("marked", encoded([schema, self._root] if '"$ref"' in encoded(schema) else schema))
        if is_new:
            branches = branches_of(self._root, schema)
            bodies = [self._branch(f"{name}_{at}", branch) for at, branch in enumerate(branches)]
            self._lark.rule(name, " | ".join(bodies))
        return name

    def _branch(self, name: str, schema: Any) -> str:
        if (values := enumerated(schema)) is not None:
            return " | ".join(str(self._lark.literal(marked(value, self._tags))) for value in values)
        if schema is True or schema == {}:
            kinds = ("string", "object", "array")
            return " | ".join([*(self._branch(f"{name}_{kind}", {"type": kind}) for kind in kinds), self._scalar({})])
        keys = set(mapping(schema)) - {"type", "description", "title", "default", "examples", "$defs", "definitions"}
        match mapping(schema).get("type"):
            case "string" if not keys - {"minLength", "maxLength", "pattern"}:
                return f"{self._mark} {self._text(name, schema)}"
            case "object" if not keys - {"properties", "required", "additionalProperties"} and is_readable(schema):
                return f'"{{" {_Parameters(self._lark, name, self._format, self._root, schema).body()} "}}"'
            case "array" if not keys - {"items", "minItems", "maxItems"} and has_counts(schema):
                return self._array(schema)
        return _Parameters(self._lark, name, self._format, self._root).of_json(schema)

    def _scalar(self, schema: Mapping[str, Any]) -> str:
        return self._lark.json({**schema, "type": ["number", "boolean", "null"]}, STRICT)

    def _text(self, name: str, schema: Any) -> str:
        apart = " & ".join(without(text) for text in (self._tags.mark, _plain_end(self._lark, self._format)) if text)
        if not (limits := limits_of(schema)):
            return self._lark.until("marked_text", self._mark, self._lark.rule("MARKED", apart))
        value = self._lark.rule(f"{name}_TEXT".upper(), f"{limits} & {apart}")
        return self._lark.until(f"{name}_text", self._mark, value)

    def _array(self, schema: Mapping[str, Any]) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        item = self.value(schema.get("items", True))
        if most == 0:
            return '"[" "]"'
        rest = f"{{{max(0, least - 1)},{'' if most is None else most - 1}}}" if least > 1 or most is not None else "*"
        items = f'{item} ("," {item}){rest}'
        return f'"[" ({items}){"" if least else "?"} "]"'


class _Nested:
    """The rules of values that are tags within tags; each goes up to the key in the end of its tag."""

    def __init__(self, lark: Lark, format: ToolFormat, root: Mapping[str, Any]) -> None:
        assert format.tags is not None
        self._lark, self._format, self._root, self._tags = lark, format, root, format.tags
        self._end = lark.literal(format.tags.end.partition(KEY)[0])
        self._apart = without(format.tags.begin.removesuffix("<"))

    def value(self, schema: Any) -> str:
        """The rule of a value and the beginning of its end."""
        name, is_new = self._lark.shared("nested", encoded([schema, self._root] if '"$ref"' in encoded(schema) else schema))
        if is_new:
            branches = branches_of(self._root, schema)
            self._lark.rule(name, " | ".join(self._branch(f"{name}_{at}", branch) for at, branch in enumerate(branches)))
        return name

    def _branch(self, name: str, schema: Any) -> str:
        if (values := enumerated(schema)) is not None:
            texts = [quoted(value if isinstance(value, str) else encoded(value)) for value in values]
            return f"({' | '.join(texts)}) {self._end}"
        parameters = _Parameters(self._lark, name, self._format, self._root, mapping(schema))
        if schema is True or schema == {}:
            return f"{self._branch(f'{name}_string', {'type': 'string'})} | {parameters.body()} {self._end}"
        keys = set(mapping(schema)) - {"type", "description", "title", "default", "examples", "$defs", "definitions"}
        match mapping(schema).get("type"):
            case "string" if not keys - {"minLength", "maxLength", "pattern"}:
                limits = limits_of(schema)
                text = self._lark.rule(f"{name}_TEXT".upper(), " & ".join(filter(None, (limits, self._apart))))
                return self._lark.until(f"{name}_text", self._end, text)
            case "object" if not keys - {"properties", "required", "additionalProperties"} and is_readable(schema):
                return f"{parameters.body()} {self._end}"
            case "array" if not keys - {"items", "minItems", "maxItems"} and has_counts(schema):
                begin = self._lark.literal(self._tags.begin + self._tags.item + self._tags.middle)
                closing = quoted(self._tags.item + self._tags.end.partition(KEY)[2])
                item = self._lark.rule(f"{name}_item", f"{begin} {self.value(schema.get('items', True))} {closing}")
                return f"{item}{{{schema.get('minItems', 0)},{schema.get('maxItems', '')}}} {self._end}"
        return f"{parameters.of_json(schema)} {self._end}"


def _plain_end(lark: Lark, format: ToolFormat) -> str:
    """What would end a call in the midst of a text argument; empty when a special token is part of it."""
    end = format.call_end.strip().lstrip("}")
    return end if all(atom.startswith('"') for atom in lark.literal(end).atoms) else ""
