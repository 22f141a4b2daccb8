"""The feed-forward block, its intermediate channels split over ranks.

Legend: T rows, H hidden channels, I intermediate channels of this rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from tpserve.layers.packing import Packer
from tpserve.layers.row_parallel import row_parallel
from tpserve.parallel.group import Group
from tpserve.quant.matmul import matmul
from tpserve.quant.packed import Weight
from tpserve.quant.product import Product, of_weight


@dataclass(frozen=True)
class MLP:
    """down(activate(up(x))) on one rank.

    `up`: [I, H], or with a gate [2 I, H], the gate first. `down`: [H, I]. `down_bias` is added once, after the sum over ranks.
    """

    up: Weight
    up_bias: torch.Tensor | None
    activate: Callable[[torch.Tensor], torch.Tensor]
    """A function of `activation.py`: from the output of `up` to [T, I]."""
    down: Weight
    down_bias: torch.Tensor | None
    tp: Group

    def partial_sum(self, x_TH: torch.Tensor) -> torch.Tensor:
        """This rank's term of the sum over ranks, without `down_bias`: [T, H] -> [T, H] in the dtype of `x`."""
        return matmul(self._activated(x_TH), self.down)

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H] in the dtype of `x`, summed over ranks."""
        return row_parallel(self._activated(x_TH), self.down, self.down_bias, self.tp)

    def _activated(self, x_TH: torch.Tensor) -> torch.Tensor:
        return self.activate(matmul(x_TH, self.up, self.up_bias))

    def products(self, dtype: torch.dtype) -> Iterator[Product]:
        """The matrix products of this layer with weights of `dtype`, for the self-test."""
        yield of_weight(self.up, dtype)
        yield of_weight(self.down, dtype)

    def packed(self, packer: Packer) -> "MLP":
        """A copy with packed weights."""
        return replace(self, up=packer.matrix(self.up), down=packer.row_parallel(self.down, self.tp))
