"""Removes secrets from data that others will read. Pure: knows how secrets look, and gets this host's as an argument."""

import re
from collections.abc import Collection
from typing import Any

HIDDEN = "***"
SHORTEST = 6
"""Shorter values are not replaced: they are weak as secrets and often occur inside other words."""
_NAMES = re.compile(r"(^|[-_ .])(keys?|tokens?|secrets?|passwords?|passwd|credentials?|authorization|cookies?)$", re.IGNORECASE)
_INSIDE = (
    re.compile(r"(?i)(\b(?:bearer|basic)\s+)[^\s\"',;]+"),
    re.compile(r"(?i)([\w-]*(?:key|token|secret|password|passwd)s?[\"']?\s*(?:=|:\s)\s*[\"']?)[^\s\"',;&]+"),
    re.compile(r"(?i)(--[\w-]*(?:key|token|secret|password)\s+)[^\s\"',;]+"),
    re.compile(r"(\w://)[^/\s@]+(?=@)"),
    re.compile(r"()\b(?:hf_|sk-|gh[pousr]_|AKIA)[\w-]{8,}"),
)


def redact(value: Any, secrets: Collection[str] = ()) -> Any:
    """A copy of a JSON value without secrets: fields with a secret's name, text that looks like one, and all of `secrets`."""
    if isinstance(value, dict):
        return {name: HIDDEN if _is_secret_field(name, each) else redact(each, secrets) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [redact(each, secrets) for each in value]
    if not isinstance(value, str):
        return value
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= SHORTEST:
            value = value.replace(secret, HIDDEN)
    for pattern in _INSIDE:
        value = pattern.sub(rf"\g<1>{HIDDEN}", value)
    return value


def _is_secret_field(name: str, value: Any) -> bool:
    """Whether a field has a secret's name. Numbers are not secrets, as in `max_tokens`."""
    return isinstance(value, str) and _NAMES.search(name) is not None


def is_secret(name: str) -> bool:
    """Whether a name, such as that of an environment variable, is that of a secret."""
    return _NAMES.search(name) is not None
