"""The memory that packed weights lie in, taken piece by piece in the order of packing."""

from typing import Protocol

import torch


class WeightMemory(Protocol):
    """`packed`: whether the pieces have their numbers already, from a process that took the same ones in the same order."""

    packed: bool

    def take(self, *shape: int) -> torch.Tensor:
        """The next piece: uint8, 64-byte aligned."""

    def keep(self, plain: torch.Tensor) -> torch.Tensor:
        """The next piece, with the numbers, shape and dtype of a tensor that is not packed; or the tensor itself."""


class PrivateMemory:
    """Of this process alone: torch's."""

    packed = False

    def take(self, *shape: int) -> torch.Tensor:
        """See `WeightMemory`."""
        return torch.empty(shape, dtype=torch.uint8)

    def keep(self, plain: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return plain


PRIVATE = PrivateMemory()
