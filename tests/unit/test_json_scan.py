"""The scan of a body counts what a parser would make of it, wherever the slices end, and never what a text holds."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpserve.errors import UserError
from tpserve.frontend.openai import json_scan
from tpserve.frontend.openai.json_scan import MAX_DEPTH, MAX_DIGITS, MAX_WEIGHT, scan

TEXTS = st.text('"\\,[]{}:1 aé漢\n', max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**25), 10**25) | TEXTS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS, inner, max_size=5),
    max_leaves=30,
)


def weight(value: Any) -> int:
    """Of a value, but for the comma before it."""
    match value:
        case str():
            return 2
        case list():
            return 15 + max(0, len(value) - 1) + sum(map(weight, value))
        case dict():
            return 15 + max(0, len(value) - 1) + sum(16 + 2 + weight(inner) for inner in value.values())
        case int() if len(str(abs(value))) >= 20:
            return 4
    return 0


def depth(value: Any) -> int:
    if not isinstance(value, list | dict):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth, inner), default=0)


def refused(data: bytes) -> str:
    with pytest.raises(UserError) as info:
        list(scan(data))
    assert info.value.status == 400
    return str(info.value)


@settings(max_examples=60, deadline=None)
@given(VALUES, st.integers(1, 40), st.booleans())
def test_slices_do_not_matter(value: Any, size: int, ascii_only: bool) -> None:
    """The same verdict at the bound, and none below, however the text is cut."""
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    with pytest.MonkeyPatch.context() as patch:

        def passes(bound: int, depth_bound: int, slice_size: int) -> bool:
            for name, number in (("MAX_WEIGHT", bound), ("MAX_DEPTH", depth_bound), ("SLICE", slice_size)):
                patch.setattr(json_scan, name, number)
            try:
                return list(scan(data)) is not None
            except UserError:
                return False

        bound = 1 + weight(value)
        assert passes(bound, depth(value), 1 << 20) and not passes(bound - 1, MAX_DEPTH, 1 << 20)
        assert passes(bound, depth(value), size)
        if not any(len(digits) >= 20 for digits in re.findall(r"\d+", data.decode())):  # a number may be cut in two
            assert not passes(bound - 1, MAX_DEPTH, size)
        assert depth(value) == 0 or not passes(MAX_WEIGHT, depth(value) - 1, size)


@pytest.mark.parametrize("item", [b"[]", b"{}", b'{"a":1}', b'"a"', b"1", b"null", b"1" * 30])
def test_many_values_are_refused(item: bytes) -> None:
    text = refused(b"[" + b",".join([item] * (MAX_WEIGHT + 1)) + b"]")
    assert str(MAX_WEIGHT) in text


def test_what_a_text_holds_does_not_count() -> None:
    for text in (b"[[[{{{,,,:::" * 200_000, rb"\"[,\\" * 200_000, b"1" * 1_000_000, rb"\\" * 500_000):
        list(scan(b'{"prompt":"' + text + b'","n":1}'))
    list(scan(b"[" + b",".join([b"123456"] * 700_000) + b"]"))


def test_depth_and_digits_have_a_bound() -> None:
    for unit in (b"[", b'{"a":'):
        list(scan(unit * MAX_DEPTH))
        assert str(MAX_DEPTH) in refused(unit * (MAX_DEPTH + 1))
    list(scan(b"[" + b"7" * MAX_DIGITS + b"]"))
    assert str(MAX_DIGITS) in refused(b"[" + b"7" * (MAX_DIGITS + 1) + b"]")
