"""One transformer layer: attention and MLP, each with a norm, each added to the residual stream.

Legend: T rows, H hidden channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from tpserve.attention.metadata import AttentionMetadata
from tpserve.attention.paged import KVCache
from tpserve.layers.attention import Attention
from tpserve.layers.mla import LatentAttention
from tpserve.layers.mlp import MLP
from tpserve.layers.moe import MoE
from tpserve.layers.norm import Norm
from tpserve.layers.packing import Packer
from tpserve.layers.rope import RotaryPositions

Stream = tuple[torch.Tensor, torch.Tensor | None]
"""Two tensors [T, H] whose sum is the residual stream, so that the sum fuses with the next norm; or (stream, None)."""


@dataclass(frozen=True)
class Block:
    """One layer on one rank. `norm_place`: where the norms are, as in ModelSpec.norm_place.

    `residual_scale`: a factor on what attention and MLP add to the residual stream.
    """

    norm_place: Literal["before", "after", "output", "around"]
    attention_norm: Norm
    attention: Attention | LatentAttention
    mlp_norm: Norm
    mlp: MLP | MoE
    residual_scale: float
    attention_out_norm: Norm | None = None
    mlp_out_norm: Norm | None = None
    """The second norms; only "around" has them."""

    def __call__(
        self,
        x_TH: torch.Tensor,
        residual_TH: torch.Tensor | None,
        rotary: RotaryPositions | None,
        batch: AttentionMetadata,
        cache: KVCache,
        before: Norm | None = None,
    ) -> Stream:
        """The residual stream after this layer, without its `deferred` norm.

        `x` and `residual` are the stream before it, both [T, H]; `before`: the deferred norm of x, which fuses with the sum.
        """
        defers = self.deferred is not None
        norms = self.attention_norm, None if defers else self.attention_out_norm
        x_TH, residual_TH = self._add(lambda x: self.attention(x, rotary, batch, cache), norms, x_TH, residual_TH, before)
        # Padding rows would run experts that no token needs.
        mlp = self.mlp if isinstance(self.mlp, MLP) else partial(self.mlp, slots_T=batch.write_slots)
        norms = self.mlp_norm, None if defers else self.mlp_out_norm
        return self._add(mlp, norms, x_TH, residual_TH, self.attention_out_norm if defers else None)

    @property
    def deferred(self) -> Norm | None:
        """The norm of x that is left to who reads the stream."""
        return self.mlp_out_norm if self.residual_scale == 1 else None

    def _add(
        self,
        layer: Callable[[torch.Tensor], torch.Tensor],
        norms: tuple[Norm, Norm | None],
        x_TH: torch.Tensor,
        residual_TH: torch.Tensor | None,
        before: Norm | None,
    ) -> Stream:
        """The residual stream after `layer` and its norms. `before`: of x, when there is a residual."""
        norm, out_norm = norms
        if self.norm_place in ("before", "around"):
            normed_TH, stream_TH = (norm(x_TH), x_TH) if residual_TH is None else norm.add(x_TH, residual_TH, before)
            out_TH = layer(normed_TH)
            return self._scaled(out_TH if out_norm is None else out_norm(out_TH)), stream_TH
        stream_TH = x_TH if residual_TH is None else x_TH + residual_TH
        if self.norm_place == "output":
            return self._scaled(norm(layer(stream_TH))), stream_TH
        return norm(stream_TH + self._scaled(layer(stream_TH))), None

    def _scaled(self, x_TH: torch.Tensor) -> torch.Tensor:
        return x_TH if self.residual_scale == 1 else x_TH * self.residual_scale

    def packed(self, packer: Packer) -> "Block":
        """A copy with packed weights. All ranks call this together."""
        return replace(self, attention=self.attention.packed(packer), mlp=self.mlp.packed(packer))
