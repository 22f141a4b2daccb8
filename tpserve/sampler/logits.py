"""The logits that a draw reads, by blocks of 128 vocabulary ids: written rows, rows that are never written, or rows on a card.

All forms of one device give the same bits, so a request that asks for log probabilities or filters, which may need written rows,
draws the same tokens.

Legend: S rows, V vocabulary ids of this rank, K channels of the LM head, B blocks, E the 128 ids of a block.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from tpserve_kernels.cpu import head, product
from tpserve_kernels.cpu.head import BLOCK, Blocks
from tpserve_kernels.cpu.library import library
from tpserve_kernels.sampler_types import RawLogits


class HostLogits(Protocol):
    """Logits of S rows over this rank's vocabulary, on the CPU."""

    def blocks(self, temperature_S: torch.Tensor | None) -> Blocks:
        """What a draw needs of each block; None: only the largest logit of each row."""

    def block(self, block_S: torch.Tensor) -> torch.Tensor:
        """The logits of one block for each row: float32 [S, E], -inf past the vocabulary."""

    def written(self) -> torch.Tensor:
        """All logits: float32 [S, V]."""


@dataclass(frozen=True)
class CardLogits:
    """What the LM head gave on a card. The sampler's kernels scale and cap it as they read it."""

    raw: RawLogits

    def written(self) -> torch.Tensor:
        """As of `HostLogits`; new memory."""
        from tpserve_kernels.logits import write_logits

        return write_logits(self.raw)


Logits = HostLogits | CardLogits


@dataclass(frozen=True)
class WrittenLogits:
    """Logits in memory: float32 [S, V]."""

    values_SV: torch.Tensor

    def blocks(self, temperature_S: torch.Tensor | None) -> Blocks:
        """As of `HostLogits`."""
        values_SV = self.values_SV
        if temperature_S is None:
            none_SB = values_SV[:, :0]
            return Blocks(*values_SV.max(dim=1), none_SB, none_SB.double())
        if library() is None:
            return head.blocks_of_logits_reference(values_SV, temperature_S)
        return head.blocks_of_logits(values_SV, temperature_S)

    def block(self, block_S: torch.Tensor) -> torch.Tensor:
        """As of `HostLogits`."""
        width = self.values_SV.shape[1]
        padded_SV = F.pad(self.values_SV, (0, -width % BLOCK), value=float("-inf")) if width % BLOCK else self.values_SV
        index_S1E = block_S[:, None, None].expand(-1, 1, BLOCK)
        return padded_SV.view(len(padded_SV), -1, BLOCK).gather(1, index_S1E).squeeze(1)

    def written(self) -> torch.Tensor:
        """As of `HostLogits`."""
        return self.values_SV


@dataclass(frozen=True)
class UnwrittenLogits:
    """Logits that the library of CPU kernels computes as they are read: `scale` * x @ weight.T.

    `x_SK`: the input of the LM head; `blob`: its packed weight (`tpserve_kernels.cpu.product`) of `outputs` = V rows.
    """

    x_SK: torch.Tensor
    blob: torch.Tensor
    outputs: int
    scale: float

    def blocks(self, temperature_S: torch.Tensor | None) -> Blocks:
        """As of `HostLogits`."""
        return head.blocks_of_product(self.x_SK, self.blob, self.outputs, self.scale, temperature_S)

    def block(self, block_S: torch.Tensor) -> torch.Tensor:
        """As of `HostLogits`."""
        return head.block_logits(self.x_SK, self.blob, self.outputs, self.scale, block_S)

    def written(self) -> torch.Tensor:
        """As of `HostLogits`."""
        return product.product(self.x_SK, self.blob, self.outputs, None, torch.float32).mul_(self.scale)
