"""One transformer layer: attention and MLP, each behind a norm and added to the residual stream. T rows, H channels."""

from dataclasses import dataclass, replace

import torch

from tpserve.attention.batch import AttentionBatch
from tpserve.attention.paged import KVCache
from tpserve.layers.attention import Attention
from tpserve.layers.mlp import MLP
from tpserve.layers.norm import add_rms_norm, rms_norm
from tpserve.layers.rope import Turn


@dataclass(frozen=True)
class Block:
    """Takes and gives (x, residual), whose sum is the residual stream, so that adding them fuses with the next norm."""

    attention_norm: torch.Tensor
    attention: Attention
    mlp_norm: torch.Tensor
    mlp: MLP
    eps: float

    def __call__(
        self,
        x_TH: torch.Tensor,
        residual_TH: torch.Tensor | None,
        turn: Turn,
        batch: AttentionBatch,
        cache: KVCache,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual_TH is None:
            normed_TH, residual_TH = rms_norm(x_TH, self.attention_norm, self.eps), x_TH
        else:
            normed_TH, residual_TH = add_rms_norm(x_TH, residual_TH, self.attention_norm, self.eps)
        mixed_TH = self.attention(normed_TH, turn, batch, cache)
        normed_TH, residual_TH = add_rms_norm(mixed_TH, residual_TH, self.mlp_norm, self.eps)
        return self.mlp(normed_TH), residual_TH

    def packed(self) -> "Block":
        """The same with packed weights."""
        return replace(self, attention=self.attention.packed(), mlp=self.mlp.packed())
