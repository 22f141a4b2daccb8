"""Which blocks of a sequence a cache group keeps: arithmetic that the scheduler, the ranks and the configuration share.

A layer with a window of W sees, at position p, positions (p - W, p]; without one (None) it sees [0, p]. Position p lives in
block p // block_size of the sequence:

    [0, first_block(p)) nobody sees from p on | [first_block(p), p // block_size] kept while p is computed
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable


def first_block(position: int, window: int | None, block_size: int) -> int:
    """The first block that `position` sees, and with it all positions after."""
    return 0 if window is None or position < window else (position - window + 1) // block_size


def max_blocks(length: int, window: int | None, block_size: int) -> int:
    """The most blocks that a group keeps of a sequence of `length` positions which is computed one position at a time."""
    whole = -(-length // block_size)
    return whole if window is None else min(whole, (window + block_size - 2) // block_size + 1)


def blocks_needed(length: int, windows: Iterable[int | None], block_size: int) -> int:
    """Blocks with which a sequence of `length` positions can be served, over all groups; `windows` has one entry a group."""
    return sum(max_blocks(length, window, block_size) for window in windows)


def max_length(fits: Callable[[int], bool], block_size: int, most: int) -> int:
    """The most positions up to `most` that fit, in whole blocks unless it is `most` itself. What fits, fits if it is shorter."""
    numbers = range(1, 1 - -most // block_size)
    return min(most, block_size * bisect_left(numbers, True, key=lambda number: not fits(number * block_size)))
