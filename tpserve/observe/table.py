"""Rows of text as lines with aligned columns, for people. Pure."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line a row; all rows have as many cells. Two spaces part the columns, none trail."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, shortened: "1, 4-7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def of_ranks(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 1, 4-7"."""
    return f"rank {ranges(ranks)}" if len(ranks) == 1 else f"ranks {ranges(ranks)}"
