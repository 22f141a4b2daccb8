"""JSON schemas: for each keyword of 2020-12 no invalid instance is in the grammar's language, or the schema is refused."""

import json
from typing import Any

import jsonschema
import pytest

from tests.schemas import compiled, spellings, takes
from tpserve.errors import UserError
from tpserve.structured_output.compiler import GrammarError
from tpserve.structured_output.json_schema import prepared

STR, INT, NUM = {"type": "string"}, {"type": "integer"}, {"type": "number"}
CHEAP = {"properties": {"price": {"maximum": 5}}, "required": ["price"]}

SUPPORTED: list[tuple[str, dict[str, Any], list[Any], list[Any]]] = [
    ("type", {"type": ["null", "boolean"]}, [None, True], [0, "", [], {}]),
    ("type integer", INT, [-3, 0, 12345678901234567890], [1.5, "1"]),
    ("enum", {"enum": ["up", 7, None, {"k": [1]}]}, ["up", 7, None, {"k": [1]}], ["down", 8, False, {"k": [2]}, {"k": [1, 1]}]),
    ("const", {"const": [1, {"a": "x"}]}, [[1, {"a": "x"}]], [[1], [1, {}], [1, {"a": "y"}]]),
    ("multipleOf", {"type": "integer", "multipleOf": 6}, [0, 18, -6], [3, 20]),
    ("minimum", {**NUM, "minimum": -2.5}, [-2.5, 0, 90], [-2.6, -3]),
    ("maximum", {**NUM, "maximum": 40}, [40, -7.25], [40.01, 41, 400]),
    ("exclusiveMinimum", {**INT, "exclusiveMinimum": 10}, [11], [10, 9, -11]),
    ("exclusiveMaximum", {**NUM, "exclusiveMaximum": 0.5}, [0.4], [0.5, 1]),
    ("minLength", {**STR, "minLength": 3}, ["abc", "äöü", "\n\n\n"], ["ab", "", "äö", "\n\n"]),
    ("maxLength", {**STR, "maxLength": 2.0}, ["", "ab", "🐟🐟", '"\\'], ["abc", "🐟🐟🐟"]),
    ("pattern", {**STR, "pattern": "^k[0-9]{2}"}, ["k12", "k99z"], ["k1", "ak12", "K12"]),
    ("pattern, not anchored", {**STR, "pattern": "x|yy"}, ["axb", "yy"], ["y", ""]),
    ("items", {"type": "array", "items": INT}, [[], [1, 2]], [["1"], [1, None], {}]),
    ("prefixItems", {"type": "array", "prefixItems": [INT, STR]}, [[], [1], [1, "a", None]], [["a"], [1, 2]]),
    ("prefixItems, items", {"type": "array", "prefixItems": [INT], "items": False}, [[], [1]], [[1, 1], [None]]),
    ("minItems", {"type": "array", "minItems": 2}, [[1, 1], [1, 2, 3]], [[], [1]]),
    ("maxItems", {"type": "array", "items": INT, "maxItems": 2}, [[], [1, 2]], [[1, 2, 3]]),
    ("properties", {"type": "object", "properties": {"n": INT, "é": INT}}, [{}, {"n": 1, "é": 2}, {"x": ""}],
     [{"n": "1"}, {"é": None}]),
    ("additionalProperties", {"type": "object", "properties": {"n": INT}, "additionalProperties": False}, [{}, {"n": 1}],
     [{"m": 1}]),
    ("additionalProperties, a schema", {"type": "object", "properties": {"n": INT}, "additionalProperties": STR},
     [{"n": 1, "o": "x"}], [{"n": "x"}, {"o": 1}]),
    ("patternProperties", {"type": "object", "patternProperties": {"^i_": INT}}, [{"i_a": 1}, {"s": "x"}], [{"i_a": "x"}]),
    ("required", {"type": "object", "required": ["a", "b"]}, [{"a": 1, "b": 2}], [{}, {"a": 1}, {"b": 1, "c": 1}]),
    ("minProperties", {"type": "object", "minProperties": 1}, [{"a": 1}], [{}]),
    ("minProperties, required", {"type": "object", "required": ["a"], "minProperties": 2}, [{"a": 1, "b": 1}],
     [{"a": 1}, {"b": 1}]),
    ("maxProperties", {"type": "object", "maxProperties": 1}, [{}, {"a": 1}], [{"a": 1, "b": 1}]),
    ("allOf", {"allOf": [INT, {"minimum": 4}, {"multipleOf": 3}]}, [6, 9], [3, 8, "x"]),
    ("allOf of objects", {"allOf": [{"type": "object", "properties": {"a": INT}}, {"required": ["a"]}]}, [{"a": 1}],
     [{}, {"a": ""}]),
    ("anyOf", {"anyOf": [{**INT, "maximum": 3}, {"enum": ["many"]}]}, [3, "many"], [4, "few"]),
    ("oneOf", {"oneOf": [STR, {"type": "array", "items": NUM}]}, ["", [1.5]], [1, ["a"]]),
    ("$ref, $defs", {"$defs": {"p": {**INT, "minimum": 1}}, "type": "array", "items": {"$ref": "#/$defs/p"}}, [[1, 2]], [[0],
     ["1"]]),
    ("$ref to itself", {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False},
     [{}, {"next": {"next": {}}}], [{"next": 1}, {"next": {"other": 1}}]),
    ("$ref, $anchor", {"$defs": {"p": {"$anchor": "here", **STR}}, "$ref": "#here"}, ["x"], [1]),
    ("$ref, $id", {"$id": "https://example.com/a", "$defs": {"p": {"$id": "b", **STR}}, "$ref": "b"}, ["x"], [1]),
    ("$ref beside others", {"$defs": {"p": INT}, "$ref": "#/$defs/p", "maximum": 5}, [5], [6, "x"]),
    ("format date", {**STR, "format": "date"}, ["2024-02-29", "1999-12-31"],
     ["2023-02-29", "1900-02-29", "2024-04-31", "24-1-1"]),
    ("format date-time", {**STR, "format": "date-time"}, ["2024-02-29T23:59:59.5Z", "2001-01-01t00:00:00+01:30"],
     ["2023-02-29T10:00:00Z", "2024-01-01 10:00:00Z", "2024-01-01T24:00:00Z", "2024-01-01T10:00:00"]),
    ("format time", {**STR, "format": "time"}, ["10:20:30Z"], ["10:20Z", "10:20:61Z", "25:00:00Z"]),
    ("format and pattern", {**STR, "format": "date", "pattern": "^20"}, ["2024-01-01"], ["1999-01-01", "2024-01-32"]),
    ("format ipv4", {**STR, "format": "ipv4"}, ["10.0.0.255"], ["10.0.0.256", "1.2.3"]),
    ("format uuid", {**STR, "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
    ("format hostname", {**STR, "format": "hostname"}, ["a.example"], ["-a", ".".join("ab" * 85)]),
    ("annotations", {"title": "t", "description": "d", "default": 1, "examples": [2], "deprecated": True, "readOnly": True,
                     "writeOnly": False, "$comment": "c", "contentEncoding": "base64", "contentMediaType": "a/b", **STR},
     ["x"], [1]),
    ("no effect", {"uniqueItems": False, "not": False, "minContains": 2, "then": False, "dependentRequired": {}, **INT}, [1],
     ["x"]),
    ("names that are keywords", {"properties": {"not": INT, "if": STR, "x-guidance": INT}, "additionalProperties": False,
                                 "type": "object"}, [{"not": 1, "if": ""}], [{"not": ""}, {"else": 1}]),
    ("definitions without use", {"$defs": {"a": {"not": {}}, "b": INT}, "$ref": "#/$defs/b"}, [1], [""]),
    ("integers of 64 bits", {**INT, "minimum": -(2**63), "maximum": 2**63 - 1}, [0, 2**62], [2**63, -(2**63) - 1, 2**64]),
    ("an open bound of 2^53", {**INT, "exclusiveMinimum": 2**53, "multipleOf": 2}, [2**53 + 2], [2**53, 2**53 - 2]),
    ("open bounds below -2^53", {**INT, "exclusiveMaximum": -(2**53), "maximum": 5}, [-(2**53) - 2], [-(2**53), 5]),
    ("integers beyond 2^53", {**INT, "minimum": 2**53 + 1}, [2**53 + 2], [2**53, 2**53 - 1]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "valid", "invalid"), [case[1:] for case in SUPPORTED], ids=[case[0] for case in SUPPORTED])
def test_no_invalid_instance_is_in_the_language(schema: dict[str, Any], valid: list[Any], invalid: list[Any]) -> None:
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    assert all(validator.is_valid(value) for value in valid), "the table is right"
    matcher = compiled(schema)
    for value in valid:
        assert any(takes(matcher, text) for text in spellings(value, {})), value
    for value in invalid:
        assert not any(takes(matcher, text) for text in spellings(value, {})), value


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"not": STR}, "the keyword not is not supported; leave it out"),
    ({"if": STR, "then": {"minLength": 1}, "else": False}, "keyword if"),
    ({"type": "array", "contains": INT, "minContains": 2, "maxContains": 3}, "keyword contains"),
    ({"type": "array", "uniqueItems": True}, "keyword uniqueItems"),
    ({"type": "object", "propertyNames": {"maxLength": 3}}, "keyword propertyNames"),
    ({"dependentRequired": {"a": ["b"]}}, "keyword dependentRequired"),
    ({"dependentSchemas": {"a": CHEAP}}, "keyword dependentSchemas"),
    ({"type": "array", "unevaluatedItems": False}, "keyword unevaluatedItems"),
    ({"allOf": [CHEAP], "unevaluatedProperties": False}, "keyword unevaluatedProperties"),
    ({"$dynamicRef": "#node"}, "keyword [$]dynamicRef"),
    ({"$dynamicAnchor": "node"}, "keyword [$]dynamicAnchor"),
    ({"properties": {"a": {"items": {"uniqueItems": True}}}}, "at #/properties/a/items: the keyword uniqueItems"),
    ({"$schema": "http://json-schema.org/draft-07/schema#", "dependencies": {"a": ["b"]}}, "keyword dependencies"),
    ({"$schema": "http://json-schema.org/draft-03/schema#", "extends": INT}, "draft 3"),
    ({"type": "object", "minProperties": 2}, "minProperties is 2 and required names 0"),
    ({"$ref": "#a", "$defs": {"x": {"$anchor": "a", "uniqueItems": True}}}, "at #/[$]defs/x: the keyword uniqueItems"),
    ({"$ref": "#/somewhere/else", "somewhere": {"else": {"minProperties": 3}}}, "at #/somewhere/else: minProperties"),
    ({"type": "array", "prefixItems": [INT], "additionalItems": False}, "it is items"),
    ({"const": 2**53 + 1}, "which no double holds"),
    ({"enum": ["a", {"b": [10**20 + 1]}]}, "which no double holds"),
    ({"enum": ["bell \a"]}, "control character"),
    ({**STR, "pattern": "^[^+--]$"}, r"has -- inside \[...\]"),
    ({"type": "object", "patternProperties": {"[a-z&&[x]]": INT}}, "has && inside"),
    ({**STR, "pattern": "[[:alpha:]]"}, r"has \[ inside"),
    ({**STR, "pattern": "(?=a)b"}, "look-around"),
    ({**STR, "format": "regex"}, "Unknown format"),
    ({"oneOf": [{**INT, "minimum": 1}, {**INT, "maximum": 5}]}, "oneOf"),
    ({"$ref": "https://example.com/other"}, "retriev"),
    ({"x-guidance": {"lenient": True}, **INT}, "x-guidance"),
    ({"type": "integer", "minimum": 5, "maximum": 4}, "minimum"),
    ({"type": "text"}, "Invalid type"),
]


@pytest.mark.parametrize(("schema", "says"), REFUSED, ids=[each[1] for each in REFUSED])
def test_what_no_grammar_expresses_is_refused_by_name(schema: dict[str, Any], says: str) -> None:
    with pytest.raises((UserError, GrammarError), match=says):
        compiled(schema)


def test_a_name_has_one_spelling() -> None:
    """An escaped name would be an additional property for the grammar, and the property itself for whoever parses the answer."""
    matcher = compiled({"type": "object", "properties": {"a": INT}, "patternProperties": {"^b": INT}})
    assert takes(matcher, '{"a":1,"b":2,"c":"x"}')
    for name in ("\\u0061", "\\u0062", "\\u0062\\u0063"):
        assert not takes(matcher, f'{{"{name}":"x"}}')


def test_the_callers_schema_stays_as_it_is_and_what_is_too_deep_is_refused() -> None:
    schema = {"properties": {"d": {"type": "string", "format": "date"}}, "uniqueItems": False}
    before = json.dumps(schema)
    assert prepared(schema, "s")["properties"]["d"]["pattern"] and json.dumps(schema) == before
    deep: dict[str, Any] = {}
    for _ in range(200):
        deep = {"items": deep}
    with pytest.raises(UserError, match="s: at #/items/items.*128 deep"):
        prepared(deep, "s")
    for bad in ([1], 1, {"a": object()}, False):
        with pytest.raises(UserError, match="^s "):
            prepared(bad, "s")
