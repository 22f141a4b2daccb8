"""Which blocks a window needs, against every position looked at one by one."""

from functools import partial

import pytest

from tpserve.types.window import blocks_needed, first_block, max_blocks, max_length


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 16, 17, 24, None])
def test_what_a_position_sees(window: int | None, block_size: int) -> None:
    for length in range(1, 70):
        seen = [
            {p // block_size for p in range(at + 1) if window is None or p > at - window} for at in range(length)
        ]  # blocks by position
        assert first_block(length - 1, window, block_size) == min(seen[-1])
        assert max(map(len, seen)) <= max_blocks(length, window, block_size) <= -(-length // block_size)
        assert length < 60 or max(map(len, seen)) == max_blocks(length, window, block_size), "and no more than that"


def test_the_longest_sequence_that_blocks_serve() -> None:
    windows = (None, 24, 5)
    assert blocks_needed(1000, windows, 16) == 63 + 3 + 2
    for num_blocks in range(80):
        found = max_length(partial(served, windows, num_blocks), 16, 1000)
        assert served(windows, num_blocks, found) and found <= 1000
        assert found == 1000 or not served(windows, num_blocks, found + 1)
    assert max_length(partial(served, (24,), 3), 16, 10**6) == 10**6, "a window's blocks serve any length"


def served(windows: tuple[int | None, ...], num_blocks: int, length: int) -> bool:
    return blocks_needed(length, windows, 16) <= num_blocks
