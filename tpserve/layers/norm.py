"""RMS norm (Zhang and Sennrich 2019, arXiv:1910.07467), alone and fused with the residual sum. T rows, H channels."""

import torch
import torch.nn.functional as F


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Each row of `x` over its root mean square, times `weight`. More dims than two are more rows."""
    if not x_TH.is_cuda:
        return F.rms_norm(x_TH, weight_H.shape, weight_H, eps)
    from tpserve_kernels import norm

    return norm.rms_norm(x_TH.reshape(-1, x_TH.shape[-1]), weight_H, eps).view(x_TH.shape)


def add_rms_norm(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual)."""
    if not x_TH.is_cuda:
        sum_TH = x_TH + residual_TH
        return F.rms_norm(sum_TH, weight_H.shape, weight_H, eps), sum_TH
    from tpserve_kernels import norm

    return norm.add_rms_norm(x_TH, residual_TH, weight_H, eps)
