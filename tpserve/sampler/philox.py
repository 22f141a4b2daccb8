"""Philox4x32-10: random bits as a pure function of a counter and a key (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011). No state: whoever knows counter and key knows the bits, on every device.

32-bit words live in int64 tensors with the upper half zero; their 64-bit products wrap, as the algorithm wants them to.
"""

import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF

Words2 = tuple[torch.Tensor, torch.Tensor]
Words4 = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox4x32(counter: Words4, key: Words2) -> Words4:
    """Four random words for each counter; int64 tensors with values in [0, 2**32) that broadcast against each other."""
    c0, c1, c2, c3 = counter
    for index in range(ROUNDS):
        k0, k1 = ((k + index * weyl) & WORD for k, weyl in zip(key, WEYL, strict=True))
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ (c1 ^ k0), low1, high0 ^ (c3 ^ k1), low0
    return c0, c1, c2, c3


def _multiply(x: torch.Tensor, multiplier: int) -> Words2:
    """Upper and lower word of the 64-bit product. The arithmetic shift's sign bits are masked off."""
    product = x * multiplier
    return (product >> 32) & WORD, product & WORD
