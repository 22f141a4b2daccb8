"""RMS norm (Zhang and Sennrich 2019, arXiv:1910.07467) and layer norm (Ba et al. 2016, arXiv:1607.06450), alone and fused
with the residual sum. T rows, H channels, Q channels of all query heads of this rank, K of its key heads.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tpserve.parallel.group import Group


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """Each row of `x` over its root mean square, times `offset + weight`. More dims than two are more rows."""
    if x_TH.is_cuda:
        from tpserve_kernels import norm

        return norm.rms_norm(x_TH.reshape(-1, x_TH.shape[-1]), weight_H, eps, offset).view(x_TH.shape)
    if offset:  # added in float32: the dtype's own 1 + w loses the weight's last bits
        return F.rms_norm(x_TH.float(), weight_H.shape, weight_H.float() + offset, eps).to(x_TH.dtype)
    return F.rms_norm(x_TH, weight_H.shape, weight_H, eps)


def add_rms_norm(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual)."""
    if not x_TH.is_cuda:
        sum_TH = x_TH + residual_TH
        return rms_norm(sum_TH, weight_H, eps, offset), sum_TH
    from tpserve_kernels import norm

    return norm.add_rms_norm(x_TH, residual_TH, weight_H, eps, offset)


@dataclass(frozen=True)
class RMSNorm:
    """Over all channels of the residual stream. `offset` is what the stored weights lack: they lie around 1 - offset."""

    weight_H: torch.Tensor
    eps: float
    offset: float = 0.0

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        return rms_norm(x_TH, self.weight_H, self.eps, self.offset)

    def add(self, x_TH: torch.Tensor, residual_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of the sum, the sum)."""
        return add_rms_norm(x_TH, residual_TH, self.weight_H, self.eps, self.offset)


@dataclass(frozen=True)
class LayerNorm:
    """Over all channels of the residual stream; without weight and bias it only centres and scales."""

    weight_H: torch.Tensor | None
    bias_H: torch.Tensor | None
    eps: float

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x_TH, x_TH.shape[-1:], self.weight_H, self.bias_H, self.eps)

    def add(self, x_TH: torch.Tensor, residual_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of the sum, the sum)."""
        sum_TH = x_TH + residual_TH
        return self(sum_TH), sum_TH


Norm = RMSNorm | LayerNorm


@dataclass(frozen=True)
class HeadNorm:
    """RMS norm over each head of query and key."""

    q_D: torch.Tensor
    k_D: torch.Tensor
    eps: float
    offset: float = 0.0

    def __call__(self, q_TND: torch.Tensor, k_TKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rms_norm(q_TND, self.q_D, self.eps, self.offset), rms_norm(k_TKD, self.k_D, self.eps, self.offset)


@dataclass(frozen=True)
class AllHeadsNorm:
    """RMS norm over all heads of query and over all of key together, those of other ranks included: sums of squares are
    summed over the ranks, in their order.
    """

    q_Q: torch.Tensor
    k_K: torch.Tensor
    eps: float
    num_q: int
    num_k: int
    """Channels of all ranks."""
    counts_k: bool
    """False where another rank counts the same key head: with fewer of them than ranks some are held several times."""
    tp: Group

    def __call__(self, q_TND: torch.Tensor, k_TKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q_TQ, k_TK = q_TND.flatten(1).float(), k_TKD.flatten(1).float()
        squares_T2 = torch.stack((q_TQ.square().sum(1), k_TK.square().sum(1) * self.counts_k), dim=1)
        q_T, k_T = self.tp.all_reduce(squares_T2).unbind(1)
        return (
            _over_root_mean(q_TQ, q_T / self.num_q, self.q_Q, self.eps).to(q_TND.dtype).view(q_TND.shape),
            _over_root_mean(k_TK, k_T / self.num_k, self.k_K, self.eps).to(k_TKD.dtype).view(k_TKD.shape),
        )


def _over_root_mean(x_TH: torch.Tensor, mean_T: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    return x_TH * (mean_T + eps).rsqrt().unsqueeze(1) * weight_H
