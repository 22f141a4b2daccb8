"""Arguments of the sampler's kernels. Torch only, so that a server without Triton can name them.

Legend: S rows, V vocabulary ids of a rank, X slots, L positions of a slot.
"""

from typing import NamedTuple

import torch


class RawLogits(NamedTuple):
    """What the LM head gave. The logits are scale * values, and of that cap * tanh(. / cap) unless `cap` is None."""

    values_SV: torch.Tensor
    """[S, V] float32, float16 or bfloat16, the values of a row adjacent"""
    scale: float = 1.0
    cap: float | None = None


class Noise(NamedTuple):
    """What makes the randomness of each row: S entries each, contiguous."""

    temperature_S: torch.Tensor
    """float32, 0 is greedy"""
    seed_S: torch.Tensor
    """int64, the bits of an unsigned seed"""
    position_S: torch.Tensor
    """int64: the position of the drawn token, below 2^32"""
    choice_S: torch.Tensor
    """int64, below 2^32"""


class DrawTarget(NamedTuple):
    """Where drawn tokens go: row s to out[s], and to tokens[slot[s], position[s]] where there are slots."""

    out_S: torch.Tensor
    """int64 or int32, contiguous"""
    slot_S: torch.Tensor | None = None
    """int64 or int32, contiguous; negative: the row is padding. None: no row is."""
    tokens_XL: torch.Tensor | None = None
    """int32, the entries of a slot adjacent; with `slot_S` only. None: tokens are written to `out_S` alone."""


class Sequences(NamedTuple):
    """The tokens of the sequence of each of R rows."""

    tokens_XL: torch.Tensor
    """int32, the entries of a slot adjacent"""
    slot_R: torch.Tensor
    """int64, none negative"""
    position_R: torch.Tensor
    """int64: the number of tokens of the sequence"""
    prompt_R: torch.Tensor
    """int64: how many of them are the prompt's"""

    def ids(self, row: int) -> tuple[list[int], list[int]]:
        """The ids of the prompt and of the output; waits for the device."""
        ids = self.tokens_XL[self.slot_R[row], : self.position_R[row]].tolist()
        return ids[: self.prompt_R[row]], ids[self.prompt_R[row] :]
