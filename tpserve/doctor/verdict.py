"""The result of a check with its remedy, their printed page and the exit code. Pure."""

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from tpserve.observe.table import table

Level = Literal["good", "slow", "broken"]
OK, BROKEN = 0, 1


class Verdict(Struct, frozen=True):
    """The result of one check. `what`: its subject. `remedy`: advice; empty when nothing is wrong."""

    level: Level
    what: str
    found: str
    remedy: str = ""


def page(verdicts: Sequence[Verdict]) -> list[str]:
    """One line a verdict, followed by the remedy if there is one."""
    lines = []
    for verdict, line in zip(verdicts, table([(each.level, each.what, each.found) for each in verdicts]), strict=True):
        lines.append(line)
        if verdict.remedy:
            lines.append(f"        -> {verdict.remedy}")
    return lines


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """1 when something is broken, else 0."""
    return BROKEN if any(verdict.level == "broken" for verdict in verdicts) else OK


def summary(verdicts: Sequence[Verdict]) -> str:
    """The number of verdicts by level, as a line."""
    counts = {level: sum(verdict.level == level for verdict in verdicts) for level in ("good", "slow", "broken")}
    return ", ".join(f"{count} {level}" for level, count in counts.items() if count)


def duration(seconds: float) -> str:
    """A time with a unit that suits its size."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
