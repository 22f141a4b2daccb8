"""Parses sizes, rates and durations such as 80GB, 2GB/s and 120s. Raises WrongValue.

GPU memory uses binary units, as GPU makers count: an 80 GB GPU has 80 x 2^30 bytes or a few per cent less, so GB and GiB are the
same here. Rates of memory and disks use decimal units.
"""

import re

from tpserve.config.flags import WrongValue

_BINARY = {"M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_DECIMAL = {"M": 10**6, "G": 10**9, "T": 10**12}
_SECONDS = {"": 1, "s": 1, "min": 60, "h": 3600}


def memory(text: str) -> int:
    """A size in bytes."""
    return _of(text, r"([MGT])(?:i?B)?", _BINARY, "a size with its unit, such as 80GB or 46068MiB")


def rate(text: str) -> int:
    """A rate in bytes a second."""
    return _of(text, r"([MGT])B/s", _DECIMAL, "a rate with its unit, such as 3350GB/s")


def duration(text: str) -> int:
    """A duration in seconds."""
    return _of(text, r"(s|min|h|)", _SECONDS, "a time, such as 120s or 2min")


def _of(text: str, unit: str, factors: dict[str, int], what: str) -> int:
    match = re.fullmatch(rf"(\d+(?:\.\d+)?) ?{unit}", text.strip(), re.IGNORECASE)
    value = 0 if match is None else round(float(match[1]) * (factors.get(match[2].upper()) or factors[match[2].lower()]))
    if value <= 0:
        raise WrongValue(what)
    return value
