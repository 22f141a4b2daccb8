"""Philox4x32-10 against the known answers published with the algorithm."""

import pytest
import torch

from tpserve_kernels.philox import philox4x32

KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    got = philox4x32(*((tuple(torch.tensor([x]) for x in part)) for part in (counter, key)))  # type: ignore[arg-type]
    assert tuple(int(word) for word in got) == words


def test_many_at_once_are_each_alone() -> None:
    columns = [[case[part][i] for case in KNOWN] for part, i in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]]
    c0, c1, c2, c3, k0, k1 = (torch.tensor(column) for column in columns)
    words = torch.stack(philox4x32((c0, c1, c2, c3), (k0, k1)), dim=1)
    assert words.tolist() == [list(case[2]) for case in KNOWN]


def test_words_broadcast() -> None:
    ids, zero = torch.arange(1000)[None], torch.zeros((3, 1), dtype=torch.int64)
    rows = torch.tensor([[0], [1], [2]])
    words = philox4x32((ids, rows, zero, zero), (zero + 5, zero))[0]
    assert words.shape == (3, 1000) and len(set(words.flatten().tolist())) > 2995, "distinct counters, distinct words"
    assert words.min() >= 0 and words.max() < 2**32
