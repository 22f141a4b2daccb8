"""What a check has found, and what to do about it: a line each, and the exit code of all. Pure."""

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from tpserve.observe.table import table

Level = Literal["good", "slow", "broken"]
OK, BROKEN = 0, 1


class Verdict(Struct, frozen=True):
    """`remedy`: what to do; empty when nothing is wrong."""

    level: Level
    what: str
    found: str
    remedy: str = ""


def page(verdicts: Sequence[Verdict]) -> list[str]:
    """A line each, and what to do below those that are not good."""
    lines = []
    for verdict, line in zip(verdicts, table([(each.level, each.what, each.found) for each in verdicts]), strict=True):
        lines.append(line)
        if verdict.remedy:
            lines.append(f"        -> {verdict.remedy}")
    return lines


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """1 when something is broken."""
    return BROKEN if any(verdict.level == "broken" for verdict in verdicts) else OK


def summary(verdicts: Sequence[Verdict]) -> str:
    """The last line."""
    counts = {level: sum(verdict.level == level for verdict in verdicts) for level in ("good", "slow", "broken")}
    return ", ".join(f"{count} {level}" for level, count in counts.items() if count)


def duration(seconds: float) -> str:
    """A short time as people read it."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
