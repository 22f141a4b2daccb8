"""Reads the text of a field: the kinds of content that a `response_template` may name, and its transforms.

Every function takes text of a model, which may be anything: ValueError says what is wrong with it.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

import regex
from msgspec import Struct

PLACEHOLDER = re.compile(r"\{(\w+(?:\.\w+)*)\}")
_QUOTED = r'"(?:\\.|[^"\\])*+(?:"|\\?\Z)'
"""A quoted text; one without an end goes on to the end, so that it is looked for once."""
_CALL_NAME = regex.compile(
    rf"""{_QUOTED}|{_QUOTED.replace('"', "'")}|(?<![\w.:/-])([A-Za-z_][\w.:/-]*+)(?=\s*\()""", regex.DOTALL
)
_TAG = regex.compile(r"<(?P<closes>/)?(?P<name>[^<>/]{1,256})>")
_CONSTANTS = {"true": True, "false": False, "null": None}


MAX_TAGS = 1024
"""The most arguments of one call that are looked for in tags."""
MAX_NESTED = 64
"""The most tags within each other."""
MAX_SECONDS = 2.0
"""How long a pattern of the model's own files may look for tags. Only a clock bounds that: the regex package counts no steps.
tpserve's own patterns have `tag_end`; they need a time that grows with the text alone, and no clock."""


class TagTree(Struct):
    """An argument in tags: its text, and the tags within it with their names."""

    text: str = ""
    tags: list[tuple[str, "TagTree"]] = []


class MarkedJson(str):
    """A value that its tag calls JSON."""


def read_content(text: str, kind: str, args: Mapping[str, Any]) -> Any:
    """The value of a field's text."""
    try:
        return CONTENT_KINDS[kind](text, args)
    except (TypeError, LookupError, RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(f"{kind}: {error}") from None


def transformed(transform: Any, names: Mapping[str, Any]) -> Any:
    """`transform` with each placeholder replaced by what it names."""
    if isinstance(transform, dict):
        return {key: transformed(value, names) for key, value in transform.items()}
    if isinstance(transform, list):
        return [transformed(value, names) for value in transform]
    if not is_text(transform) or (match := PLACEHOLDER.fullmatch(transform)) is None:
        return transform
    value: Any = names
    for key in match[1].split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"{transform} is not there")
        value = value[key]
    return value


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a value of JSON is a text."""
    return isinstance(value, str)


def _text(text: str, args: Mapping[str, Any]) -> str:
    return text.strip() if args.get("strip", True) else text


def _bool(text: str, args: Mapping[str, Any]) -> bool:
    return _text(text, args).lower() in ("true", "1")


def _json(text: str, args: Mapping[str, Any]) -> Any:
    """JSON, or a dialect with `unquoted_keys` and texts within `string_delims`; other text with `allow_non_json`."""
    try:
        return json.loads(_as_json(text, args.get("string_delims") or [], bool(args.get("unquoted_keys"))))
    except ValueError:
        if args.get("allow_non_json"):
            return _text(text, args)
        raise


def _as_json(text: str, delimiters: list[list[str]], unquoted_keys: bool) -> str:
    if not delimiters and not unquoted_keys:
        return text
    own = [rf"{regex.escape(begin)}(?P<own>.*?)(?:{regex.escape(end)}|(?P<endless>\Z))" for begin, end in delimiters]
    keys = [r"(?<=[{,]\s*)(?P<key>[\w.$-]+)(?=\s*:)"] if unquoted_keys else []

    def spell(match: "regex.Match[str]") -> str:
        groups = match.groupdict()
        if groups.get("endless") is not None:
            raise ValueError("json: a text has no end")
        found = groups.get("own") if groups.get("own") is not None else groups.get("key")
        return match[0] if found is None else json.dumps(found)

    return regex.sub("|".join([*own, _QUOTED, *keys]), spell, text, flags=regex.DOTALL)


def _value(text: str, args: Mapping[str, Any]) -> Any:
    parser = args.get("value_parser")
    return text if parser is None else CONTENT_KINDS[parser.get("name", "text")](text, parser.get("args") or {})


def _xml_inline(text: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """One entry for each match of `tag_pattern`, which has the groups key and value; with `json`, the value is marked as JSON."""
    found: dict[str, list[Any]] = {}
    for count, match in enumerate(_tags(text, args), 1):
        if count > MAX_TAGS:
            raise ValueError(f"xml-inline: a call has more than {MAX_TAGS} arguments")
        is_json = match.groupdict().get("json") is not None
        found.setdefault(match["key"], []).append(MarkedJson(match["value"]) if is_json else _value(match["value"], args))
    merges = bool(args.get("merge_duplicates"))
    return {key: values if merges and len(values) > 1 else values[-1] for key, values in found.items()}


def _tags(text: str, args: Mapping[str, Any]) -> "Iterator[regex.Match[str]]":
    """The matches of `tag_pattern`. Behind the last `tag_end` it is not tried, but `tag_open_pattern` is."""
    pattern = regex.compile(args["tag_pattern"], regex.DOTALL)
    if "tag_end" not in args:
        try:
            yield from pattern.finditer(text, timeout=MAX_SECONDS)
        except TimeoutError:
            raise ValueError("xml-inline: the tags take too long to find") from None
        return
    end = max((match.end() for match in regex.finditer(args["tag_end"], text)), default=0)
    at = 0
    for match in pattern.finditer(text, 0, end):
        at = match.end()
        yield match
    if "tag_open_pattern" in args:
        yield from regex.finditer(args["tag_open_pattern"], text, regex.DOTALL, pos=at)


def _kv_lines(text: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """One entry for each line with a separator."""
    separator, found = args.get("kv_sep", ":"), {}
    for line in text.split(args.get("line_sep", "\n")):
        key, has_value, value = line.partition(separator)
        if has_value:
            found[_text(key, args)] = _value(_text(value, args), args)
    return found


def _json_keyed_calls(text: str, args: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Calls as members of JSON objects in a list, `[{"f": {"a": 1}}, {"g": {}}]`: name and arguments of each."""
    calls = json.loads(text)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and all(isinstance(value, dict) for value in call.values()) for call in calls):
        raise ValueError("json-keyed-calls: not a list of objects of objects")
    return [{"name": name, "arguments": arguments} for call in calls for name, arguments in call.items()]


def _nested_tags(text: str, args: Mapping[str, Any]) -> dict[str, TagTree]:
    """Arguments in tags within tags, each tag behind `marker`: `M<a>M<b>text M</b>M</a>`. Any end closes the last tag."""
    root = TagTree()
    open_ = [root]
    before, *pieces = text.split(args["marker"])
    if before.strip() or not all(_TAG.match(piece) for piece in pieces):
        raise ValueError("nested-tags: text outside of tags")
    for piece in pieces:
        match = _TAG.match(piece)
        assert match is not None
        if match["closes"]:
            if len(open_) == 1:
                raise ValueError("nested-tags: an end without a beginning")
            open_.pop()
            continue
        if len(open_) > MAX_NESTED:
            raise ValueError(f"nested-tags: more than {MAX_NESTED} tags within each other")
        open_[-1].tags.append((match["name"], tree := TagTree(piece[match.end() :])))
        open_.append(tree)
    return dict(root.tags)


def _python_call_list(text: str, args: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Calls with keyword arguments in a list, `[f(a=1), g()]`: name and arguments of each."""
    names: list[str] = []

    def identifier(match: "regex.Match[str]") -> str:
        if match[1] is None:  # a quoted text, in which models also write what Python wants escaped
            return match[0].replace("\n", "\\n").replace("\r", "\\r").replace("\0", "\\0")
        names.append(match[1])
        return f"_{len(names) - 1}"

    try:
        tree = ast.parse(_CALL_NAME.sub(identifier, text.strip()), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"python-call-list: {error.msg}") from None
    calls = tree.elts if isinstance(tree, ast.List) else [None]
    if not all(isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args for call in calls):
        raise ValueError("python-call-list: not a list of calls with keyword arguments")
    return [
        {
            "name": names[int(call.func.id[1:])],
            "arguments": {keyword.arg: _literal(keyword.value) for keyword in call.keywords if keyword.arg is not None},
        }
        for call in calls
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    ]


def _literal(node: ast.expr) -> Any:
    """The value of a literal of Python, or of JSON's true, false and null in it."""
    match node:
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values) if all(isinstance(key, ast.Constant) for key in keys):
            pairs = zip(keys, values, strict=True)
            return {str(key.value): _literal(value) for key, value in pairs if isinstance(key, ast.Constant)}
    value = ast.literal_eval(node)
    json.dumps(value, allow_nan=False)  # bytes, sets and complex numbers are no JSON
    return value


CONTENT_KINDS: dict[str, Callable[[str, Mapping[str, Any]], Any]] = {
    "text": _text,
    "int": lambda text, args: int(_text(text, args)),
    "float": lambda text, args: float(_text(text, args)),
    "bool": _bool,
    "json": _json,
    "xml-inline": _xml_inline,
    "kv-lines": _kv_lines,
    "python-call-list": _python_call_list,
    "json-keyed-calls": _json_keyed_calls,
    "nested-tags": _nested_tags,
}
"""The kinds of content by the name that templates use; the last two are tpserve's own."""
