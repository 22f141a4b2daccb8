"""Philox4x32-10: random bits as a pure function of a counter and a key (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011, doi:10.1145/2063384.2063405). No state; the bits are equal on every device.

32-bit words are int64 tensors with a zero upper half; their 64-bit products wrap, as the algorithm requires.
"""

import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF

Words2 = tuple[torch.Tensor, torch.Tensor]
Words4 = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox4x32(counter: Words4, key: Words2) -> Words4:
    """Four random words per counter. All words are int64 tensors with values in [0, 2**32); counter and key broadcast."""
    c0, c1, c2, c3 = counter
    for index in range(ROUNDS):
        k0, k1 = ((k + index * weyl) & WORD for k, weyl in zip(key, WEYL, strict=True))
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ (c1 ^ k0), low1, high0 ^ (c3 ^ k1), low0
    return c0, c1, c2, c3


def _multiply(x: torch.Tensor, multiplier: int) -> Words2:
    """The upper and lower word of the 64-bit product. The mask removes the sign bits of the arithmetic shift."""
    product = x * multiplier
    return (product >> 32) & WORD, product & WORD
