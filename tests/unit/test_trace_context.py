"""traceparent and tracestate: the examples and the rules of the W3C's recommendation."""

import pytest

from tpserve.observe.trace_context import SAMPLED, trace_context

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{SPAN}-01"


def test_the_parts_of_a_parent() -> None:
    context = trace_context([GOOD], ["rojo=00f067aa0ba902b7, congo=t61rcWkgMzE", "fw529a3039@dt=a b"])
    assert context is not None and (context.trace_id, context.span_id, context.flags) == (TRACE, SPAN, SAMPLED)
    assert context.state == (("rojo", "00f067aa0ba902b7"), ("congo", "t61rcWkgMzE"), ("fw529a3039@dt", "a b"))
    unsampled = trace_context([f" 00-{TRACE}-{SPAN}-00\t"], [])
    assert unsampled is not None and unsampled.flags == 0 and unsampled.state == ()


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "00",
        GOOD.upper(),
        GOOD[:-1],
        GOOD + "-extra",
        GOOD + " x",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}g-{SPAN}-01",
        f"00-{TRACE}{SPAN}-01",
        f"01-{TRACE}-{SPAN}-01extra",
        f"01-{TRACE}-{SPAN}-01-" + "a" * 300,
    ],
)
def test_a_wrong_parent_is_none(parent: str) -> None:
    assert trace_context([parent], ["rojo=1"]) is None


def test_a_later_version_may_have_more() -> None:
    context = trace_context([f"cc-{TRACE}-{SPAN}-09-what-comes"], [])
    assert context is not None and (context.trace_id, context.flags) == (TRACE, 9)


def test_one_parent_is_expected() -> None:
    assert trace_context([], []) is None
    assert trace_context([GOOD, GOOD], []) is None


@pytest.mark.parametrize(
    "state",
    [
        "rojo",
        "=1",
        "ROJO=1",
        "rojo=1=2",
        "rojo=",
        "rojo=1,rojo=2",
        "a b=1",
        ",".join(f"k{i}=1" for i in range(33)),
        "k=" + "v" * 257,
    ],
)
def test_a_wrong_state_costs_the_state_alone(state: str) -> None:
    context = trace_context([GOOD], [state])
    assert context is not None and context.trace_id == TRACE and context.state == ()


def test_empty_members_are_allowed() -> None:
    context = trace_context([GOOD], ["a=1,,\t b=2 ,", ""])
    assert context is not None and context.state == (("a", "1"), ("b", "2"))
