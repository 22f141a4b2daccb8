"""Types of JSON schemas, to give arguments that a model wrote as bare text their values."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from tpserve.response_template.content import MarkedJson, TagTree
from tpserve.response_template.format import type_of
from tpserve.response_template.schema_parts import branches_of, mapping

MAX_DEPTH = 16
_PYTHON = {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "list": "array", "dict": "object"}
"""Types as Python names them, which schemas of tools also have."""
_EMPTY: Mapping[str, type] = {"object": dict, "array": list}


def typed(value: Any, key: str, schema: Any) -> Any:
    """The argument `key` as its schema asks. `schema`: of all arguments. Text that fits no type stays text."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    own = properties.get(key) if isinstance(properties, dict) else None
    if own is None and isinstance(schema, dict):
        own = schema.get("additionalProperties")
    if isinstance(value, TagTree):
        return _of_tree(value, own, schema)
    types = list(dict.fromkeys(_PYTHON.get(each, each) for each in declared_types(own, schema)))
    if not types and isinstance(value, MarkedJson):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return str(value)
    if isinstance(value, list) and "array" not in types:  # of several arguments with one name
        return [_typed(each, types) if isinstance(each, str) else each for each in value]
    return _typed(value, types) if isinstance(value, str) else value


def _of_tree(tree: TagTree, own: Any, root: Any) -> Any:
    """The value of tags within tags: by the types of its schema `own`, else by what is in it."""
    types = list(dict.fromkeys(_PYTHON.get(each, each) for each in declared_types(own, root)))
    if not tree.tags:
        if not tree.text and "string" not in types and (kind := next((each for each in types if each in _EMPTY), None)):
            return _EMPTY[kind]()
        return _typed(tree.text, types)
    schemas = [mapping(each) for each in branches_of(root, own)]
    items = {name for name, _ in tree.tags}
    if "array" in types or ("object" not in types and len(items) == 1 and len(tree.tags) > 1):
        inner = next((each["items"] for each in schemas if "items" in each), None)
        return [_of_tree(each, inner, root) for _, each in tree.tags]
    found: dict[str, list[Any]] = {}
    for name, each in tree.tags:
        named = [mapping(schema.get("properties")).get(name, schema.get("additionalProperties")) for schema in schemas]
        found.setdefault(name, []).append(_of_tree(each, next((schema for schema in named if schema is not None), None), root))
    return {name: values if len(values) > 1 else values[0] for name, values in found.items()}


def declared_types(schema: Any, root: Any, depth: int = MAX_DEPTH) -> Iterator[str]:
    """The types that a schema names, in its order. `root`: where its references are looked for."""
    if not isinstance(schema, dict) or depth == 0:
        return
    declared = schema.get("type")
    yield from [declared] if isinstance(declared, str) else [each for each in declared or () if isinstance(each, str)]
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    for value in values if declared is None and isinstance(values, list) else ():
        yield type_of(value)
    for several in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(several)
        for part in parts if isinstance(parts, list) else ():
            yield from declared_types(part, root, depth - 1)
    if isinstance(reference := schema.get("$ref"), str):
        yield from declared_types(_target(reference, root), root, depth - 1)
    if schema.get("nullable"):
        yield "null"


def _target(reference: str, root: Any) -> Any:
    for part in reference.removeprefix("#/").split("/"):
        root = root.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(root, Mapping) else None
    return root


def _typed(text: str, types: list[str]) -> Any:
    if "null" in types and text.strip() == "null":  # where there may be none, the word is not meant
        return None
    for kind in types:
        if kind == "string":
            return text
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = {"True": True, "False": False, "None": None}.get(text.strip(), text)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        fits = {
            "integer": is_number and value == math.floor(value),
            "number": is_number,
            "boolean": isinstance(value, bool),
            "null": value is None,
            "object": isinstance(value, dict),
            "array": isinstance(value, list),
        }
        if fits.get(kind, False):
            return int(value) if kind == "integer" else value
    return text
