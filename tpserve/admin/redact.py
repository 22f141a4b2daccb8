"""Secrets taken out of what others will read. Pure; knows what secrets look like, and is told those of this host."""

import re
from collections.abc import Collection
from typing import Any

HIDDEN = "***"
SHORTEST = 6
"""A shorter value is no secret that is worth the name, and would turn up in other words."""
_NAMES = re.compile(r"(^|[-_ .])(keys?|tokens?|secrets?|passwords?|passwd|credentials?|authorization|cookies?)$", re.IGNORECASE)
_INSIDE = (
    re.compile(r"(?i)(\b(?:bearer|basic)\s+)[^\s\"',;]+"),
    re.compile(r"(?i)([\w-]*(?:key|token|secret|password|passwd)s?[\"']?\s*(?:=|:\s)\s*[\"']?)[^\s\"',;&]+"),
    re.compile(r"(?i)(--[\w-]*(?:key|token|secret|password)\s+)[^\s\"',;]+"),
    re.compile(r"(\w://)[^/\s@]+(?=@)"),
    re.compile(r"()\b(?:hf_|sk-|gh[pousr]_|AKIA)[\w-]{8,}"),
)


def redacted(value: Any, secrets: Collection[str] = ()) -> Any:
    """`value` (of JSON) without what is called a secret, looks like one, or is one of `secrets`."""
    if isinstance(value, dict):
        return {name: HIDDEN if _named(name, each) else redacted(each, secrets) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(each, secrets) for each in value]
    if not isinstance(value, str):
        return value
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= SHORTEST:
            value = value.replace(secret, HIDDEN)
    for pattern in _INSIDE:
        value = pattern.sub(rf"\g<1>{HIDDEN}", value)
    return value


def _named(name: str, value: Any) -> bool:
    """Whether a field is a secret by its name. Numbers are none: `max_tokens`."""
    return isinstance(value, str) and _NAMES.search(name) is not None


def is_secret(name: str) -> bool:
    """Whether a variable of the environment is one, by its name."""
    return _NAMES.search(name) is not None
