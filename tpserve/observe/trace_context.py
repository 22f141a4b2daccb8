"""The W3C's trace context: which trace a request belongs to, from its headers `traceparent` and `tracestate`.

Source: https://www.w3.org/TR/trace-context/ (level 2). A wrong `traceparent` counts as none, and so does a wrong `tracestate`:
the sender's mistake is no reason to refuse a request.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

PARENT = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})(?P<rest>-.*)?"
)
KEY = r"[a-z0-9][a-z0-9_*/@-]{0,255}"
VALUE = r"[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
MEMBER = re.compile(rf"({KEY})=({VALUE})")
MAX_MEMBERS = 32
MAX_PARENT_CHARS = 256
SAMPLED = 1


class TraceContext(NamedTuple):
    """A request's place in a trace. `trace_id` (32) and `span_id` (16) are hexadecimal; `flags` has `SAMPLED` when the sender
    records the trace; `state`: members (key, value) in their order, which tracing systems add."""

    trace_id: str
    span_id: str
    flags: int
    state: tuple[tuple[str, str], ...] = ()


def trace_context(parents: Sequence[str], states: Sequence[str]) -> TraceContext | None:
    """The context that headers name; None without a valid one. `parents`, `states`: the values of each, as often as they came."""
    if len(parents) != 1 or len(parents[0]) > MAX_PARENT_CHARS or (match := PARENT.fullmatch(parents[0].strip(" \t"))) is None:
        return None
    version = match["version"]
    if version == "ff" or (version == "00" and match["rest"] is not None):
        return None
    trace_id, span_id = match["trace"], match["span"]
    if not int(trace_id, 16) or not int(span_id, 16):
        return None
    return TraceContext(trace_id, span_id, int(match["flags"], 16), _members(states))


def _members(states: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The members of all `tracestate` headers; none of them when one is wrong."""
    texts = [text.strip(" \t") for text in ",".join(states).split(",")]
    matches = [MEMBER.fullmatch(text) for text in texts if text]
    members = [(match[1], match[2]) for match in matches if match is not None]
    is_valid = len(members) == len(matches) <= MAX_MEMBERS and len(dict(members)) == len(members)
    return tuple(members) if is_valid else ()
