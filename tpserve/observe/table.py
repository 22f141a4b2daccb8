"""Text for people: tables with aligned columns, ranges of numbers. Pure."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line per row; all rows have the same number of cells. Two spaces separate columns; no line has trailing spaces."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs shortened: "1, 4-7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def of_ranks(ranks: Sequence[int]) -> str:
    """Ascending ranks in words: "rank 3" or "ranks 1, 4-7"."""
    return f"rank {ranges(ranks)}" if len(ranks) == 1 else f"ranks {ranges(ranks)}"
