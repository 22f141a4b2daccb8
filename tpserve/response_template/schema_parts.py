"""What the JSON schema of an argument says, as far as arguments that are not JSON need to know: kinds, branches, bounds."""

import re
from collections.abc import Mapping
from typing import Any

from tpserve.response_template.lark import regex

MAX_HOPS = 64
"""References and branches that are followed to find what a parameter may be."""
_NOT_STRINGS = {"properties", "required", "additionalProperties", "patternProperties", "items", "prefixItems", "minItems"}
_NOT_STRINGS |= {"maxItems", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}


def has_counts(schema: Mapping[str, Any]) -> bool:
    """Whether the bounds of an array are numbers; llguidance says what is wrong with others."""
    least, most = schema.get("minItems", 0), schema.get("maxItems", 0)
    return all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in (least, most))


def is_readable(root: Any) -> bool:
    """Whether the root of a schema is an object with named parameters, as arguments in tags need it."""
    if not isinstance(root, Mapping) or root.get("type") != "object" or "$ref" in root:
        return False
    required, additional = root.get("required", []), root.get("additionalProperties", True)
    return (
        isinstance(root.get("properties", {}), Mapping)
        and isinstance(required, list)
        and all(isinstance(key, str) for key in required)
        and isinstance(additional, Mapping | bool)
    )


def resolved(root: Any, schema: Any) -> Any:
    """The schema that local references lead to; the last one that could be found."""
    for _ in range(MAX_HOPS):
        ref = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(ref, str) or not ref.startswith("#"):
            break
        found: Any = root
        for step in ref[1:].split("/")[1:]:
            found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
        if found is None:
            break
        schema = (
            {**found, **{key: value for key, value in schema.items() if key != "$ref"}} if isinstance(found, Mapping) else found
        )
    return schema


def branches_of(root: Any, schema: Any) -> list[Any]:
    """The alternatives of a schema, without references; the schema itself when they are too many."""
    found, open_ = [], [schema]
    for _ in range(MAX_HOPS):
        if not open_:
            break
        branch = resolved(root, open_.pop(0))
        choices = (
            next((branch[key] for key in ("anyOf", "oneOf") if key in branch), None) if isinstance(branch, Mapping) else None
        )
        if isinstance(choices, list) and choices:
            open_ += choices
        elif isinstance(branch, Mapping) and isinstance(types := branch.get("type"), list) and enumerated(branch) is None:
            open_ += [{**branch, "type": type} for type in types]
        else:
            found.append(branch)
    return found if found and not open_ else [schema]


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is an object; else an empty one."""
    return value if isinstance(value, Mapping) else {}


def enumerated(schema: Any) -> list[Any] | None:
    """The values of an enumeration; None for anything else."""
    if not isinstance(schema, Mapping):
        return None
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) and values else None


def may_be_string(schema: Any) -> bool:
    """Whether a string may obey the schema, as far as it says at first sight."""
    if not isinstance(schema, Mapping):
        return schema is True
    if "type" in schema:
        return bool(schema["type"] == "string")
    return not _NOT_STRINGS & schema.keys() and not any(key in schema for key in ("allOf", "not", "if", "$ref"))


def is_string(schema: Any) -> bool:
    """Whether the schema declares a string."""
    return isinstance(schema, Mapping) and schema.get("type") == "string"


def limits_of(schema: Any) -> str:
    """The length and the pattern of a string, as a terminal's body; empty when it has neither."""
    if not isinstance(schema, Mapping):
        return ""
    parts = []
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    if least or most != "":
        parts.append(f"/(?s:.){{{_count(least)},{_count(most)}}}/")
    if "pattern" in schema:
        parts.append(regex(_anywhere(str(schema["pattern"]))))
    return " & ".join(parts)


def _count(value: Any) -> str:
    """A bound of a schema as a number; what is none goes on as it is, to be refused."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _anywhere(pattern: str) -> str:
    """A JSON schema's pattern, which matches anywhere in a text, for llguidance, whose patterns match all and know no anchors."""
    depth, skipped = 0, re.sub(r"\\.|\[(\\.|[^\]\\])*\]", "", pattern, flags=re.DOTALL)
    for character in skipped:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "|" and depth == 0:
            return f"(?s:.*)(?:{pattern})(?s:.*)"
    begin = "" if pattern.startswith("^") else "(?s:.*)"
    end = "" if skipped.endswith("$") and pattern.endswith("$") else "(?s:.*)"
    core = pattern[1:] if not begin else pattern
    return f"{begin}(?:{core[:-1] if not end else core}){end}"
