"""Which KV blocks of a sequence a cache group keeps: arithmetic shared by the scheduler, the ranks and the configuration.

A layer with a window of W sees, at position p, positions (p - W, p]; without one (None) it sees [0, p]. Position p lives in
block p // block_size of the sequence:

    [0, first_block(p)) not visible from p on | [first_block(p), p // block_size] kept while p is computed
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable


def first_block(position: int, window: int | None, block_size: int) -> int:
    """The first block that `position` or any later position sees."""
    return 0 if window is None or position < window else (position - window + 1) // block_size


def max_blocks(length: int, window: int | None, block_size: int) -> int:
    """The largest number of blocks that a group keeps while a sequence grows to `length` positions, one at a time."""
    all_blocks = -(-length // block_size)
    return all_blocks if window is None else min(all_blocks, (window + block_size - 2) // block_size + 1)


def blocks_needed(length: int, windows: Iterable[int | None], block_size: int) -> int:
    """Blocks that a sequence of `length` positions needs in all groups. `windows`: the window of each group."""
    return sum(max_blocks(length, window, block_size) for window in windows)


def max_length(fits: Callable[[int], bool], block_size: int, most: int) -> int:
    """The largest length up to `most` for which `fits` holds: `most` itself, or a multiple of `block_size`.

    `fits` must be monotonic: it holds for every length shorter than one for which it holds.
    """
    numbers = range(1, 1 - -most // block_size)
    return min(most, block_size * bisect_left(numbers, True, key=lambda number: not fits(number * block_size)))
