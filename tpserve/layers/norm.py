"""RMS norm (Zhang and Sennrich 2019, arXiv:1910.07467) and layer norm (Ba et al. 2016, arXiv:1607.06450), alone and fused
with the residual sum.

Inputs are float32, float16 or bfloat16; sums are float32; results have the dtype of the input.

Legend: T rows, H hidden channels, N query heads and K key heads of this rank, D channels of a head, Q = N D.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tpserve.parallel.group import Group
from tpserve_kernels.cpu import qkv_heads, rows
from tpserve_kernels.cpu.library import is_native


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """Each row of `x` divided by sqrt(mean(x^2) + eps), times `offset + weight`: the shape of `x`.

    All dims before the last are rows.
    """
    if x_TH.is_cuda:
        from tpserve_kernels import norm

        return norm.rms_norm(x_TH.reshape(-1, x_TH.shape[-1]), weight_H, eps, offset).view(x_TH.shape)
    if is_native(x_TH):
        return rows.rms_norm(x_TH.reshape(-1, x_TH.shape[-1]), weight_H, eps, offset).view(x_TH.shape)
    if offset:  # added in float32: the dtype's own 1 + w loses the weight's last bits
        return F.rms_norm(x_TH.float(), weight_H.shape, weight_H.float() + offset, eps).to(x_TH.dtype)
    return F.rms_norm(x_TH, weight_H.shape, weight_H, eps)


def add_rms_norm(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), both [T, H]; the sum is rounded before the norm."""
    if x_TH.is_cuda:
        from tpserve_kernels import norm

        return norm.add_rms_norm(x_TH, residual_TH, weight_H, eps, offset)
    if is_native(x_TH):
        return rows.add_rms_norm(x_TH, residual_TH, weight_H, eps, offset)
    sum_TH = x_TH + residual_TH
    return rms_norm(sum_TH, weight_H, eps, offset), sum_TH


@dataclass(frozen=True)
class RMSNorm:
    """RMS norm over the hidden channels. `offset` is added to the stored weights; Gemma stores weights - 1 and has offset 1."""

    weight_H: torch.Tensor
    eps: float
    offset: float = 0.0

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        return rms_norm(x_TH, self.weight_H, self.eps, self.offset)

    def add(
        self, x_TH: torch.Tensor, residual_TH: torch.Tensor, before: "Norm | None" = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of the sum, the sum), both [T, H]. `before`: a norm of x alone, before the sum."""
        if before is None:
            return add_rms_norm(x_TH, residual_TH, self.weight_H, self.eps, self.offset)
        if x_TH.is_cuda and isinstance(before, RMSNorm) and (before.eps, before.offset) == (self.eps, self.offset):
            from tpserve_kernels import norm

            return norm.norm_add_rms_norm(x_TH, before.weight_H, residual_TH, self.weight_H, self.eps, self.offset)
        return self.add(before(x_TH), residual_TH)


@dataclass(frozen=True)
class LayerNorm:
    """Layer norm over the hidden channels. Weight and bias are optional."""

    weight_H: torch.Tensor | None
    bias_H: torch.Tensor | None
    eps: float

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        if x_TH.is_cuda:
            from tpserve_kernels import norm

            return norm.layer_norm(x_TH, self.weight_H, self.bias_H, self.eps)
        if is_native(x_TH):
            return rows.layer_norm(x_TH, self.weight_H, self.bias_H, self.eps)
        return F.layer_norm(x_TH, x_TH.shape[-1:], self.weight_H, self.bias_H, self.eps)

    def add(
        self, x_TH: torch.Tensor, residual_TH: torch.Tensor, before: "Norm | None" = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of the sum, the sum), both [T, H]. `before`: a norm of x alone, before the sum."""
        if before is not None:
            x_TH = before(x_TH)
        if x_TH.is_cuda:
            from tpserve_kernels import norm

            return norm.add_layer_norm(x_TH, residual_TH, self.weight_H, self.bias_H, self.eps)
        if is_native(x_TH):
            return rows.add_layer_norm(x_TH, residual_TH, self.weight_H, self.bias_H, self.eps)
        sum_TH = x_TH + residual_TH
        return self(sum_TH), sum_TH


Norm = RMSNorm | LayerNorm


@dataclass(frozen=True)
class HeadNorm:
    """RMS norm over each head of query and key (QK norm; Henry et al. 2020, arXiv:2010.04245, with RMS norm as in Qwen3)."""

    q_D: torch.Tensor
    k_D: torch.Tensor
    eps: float
    offset: float = 0.0

    def __call__(self, q_TND: torch.Tensor, k_TKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed queries [T, N, D] and keys [T, K, D]."""
        return rms_norm(q_TND, self.q_D, self.eps, self.offset), rms_norm(k_TKD, self.k_D, self.eps, self.offset)

    @property
    def weights(self) -> qkv_heads.HeadNorms:
        """The same for kernels."""
        return qkv_heads.HeadNorms(self.q_D, self.k_D, self.eps, self.offset)


@dataclass(frozen=True)
class AllHeadsNorm:
    """RMS norm over all query heads together and over all key heads together, heads of other ranks included (OLMo 2).

    An all-reduce adds up the sums of squares, in rank order.
    """

    q_Q: torch.Tensor
    k_K: torch.Tensor
    eps: float
    num_q: int
    num_k: int
    """Channels of all ranks: `num_q` of queries, `num_k` of keys."""
    counts_k: bool
    """False when another rank counts this key head: with fewer key heads than ranks, several ranks have the same head."""
    tp: Group

    def __call__(self, q_TND: torch.Tensor, k_TKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed queries [T, N, D] and keys [T, K, D]."""
        if q_TND.is_cuda:
            return self._on_card(q_TND, k_TKD)
        q_TQ, k_TK = q_TND.flatten(1).float(), k_TKD.flatten(1).float()
        squares_T2 = torch.stack((q_TQ.square().sum(1), k_TK.square().sum(1) * self.counts_k), dim=1)
        q_T, k_T = self.tp.all_reduce(squares_T2).unbind(1)
        return (
            _scale_by_rms(q_TQ, q_T / self.num_q, self.q_Q, self.eps).to(q_TND.dtype).view(q_TND.shape),
            _scale_by_rms(k_TK, k_T / self.num_k, self.k_K, self.eps).to(k_TKD.dtype).view(k_TKD.shape),
        )

    def _on_card(self, q_TND: torch.Tensor, k_TKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from tpserve_kernels import across_heads

        q_TQ, k_TK = q_TND.flatten(1), k_TKD.flatten(1)
        sums_T2 = across_heads.squares(q_TQ, k_TK)
        if not self.counts_k:
            sums_T2[:, 1].zero_()
        sums_T2, counts = self.tp.all_reduce(sums_T2), (self.num_q, self.num_k)
        q_TQ, k_TK = across_heads.scale(q_TQ, k_TK, sums_T2, self.q_Q, self.k_K, counts, self.eps)
        return q_TQ.view(q_TND.shape), k_TK.view(k_TKD.shape)


def _scale_by_rms(x_TH: torch.Tensor, mean_T: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    return x_TH * (mean_T + eps).rsqrt().unsqueeze(1) * weight_H
