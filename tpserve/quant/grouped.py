"""Rows times the matrices of their groups (the experts of a layer) or of their heads: `matmul`'s siblings.

On the CPU a product for each matrix, since no library has a grouped one that keeps the contract; on CUDA one kernel.
Invariant on the CPU: a row of the product has the same bits whatever the other rows are, of its group and of others
(docs/numerics.md). Shapes: R or T rows, E groups or heads, K inner, N outputs.
"""

import torch

from tpserve.quant.matmul import matmul
from tpserve.quant.packed import Stack


def grouped_matmul(
    x_RK: torch.Tensor, stack_ENK: Stack, ends_E: torch.Tensor, bias_EN: torch.Tensor | None = None
) -> torch.Tensor:
    """x[r] @ stack[e].T + bias[e] for the group e of row r: [R, N], contents undefined in rows from ends_E[-1] on.

    `ends_E`: int32; rows are in order of their groups, group e has [ends_E[e - 1], ends_E[e]).
    """
    if x_RK.is_cuda:
        from tpserve_kernels import grouped

        assert isinstance(stack_ENK, torch.Tensor), "nothing is packed on CUDA"
        return grouped.grouped_matmul(x_RK, stack_ENK, ends_E, bias_EN)
    y_RN, start = x_RK.new_empty(len(x_RK), stack_ENK[0].shape[0]), 0
    for e, (weight_NK, end) in enumerate(zip(stack_ENK, ends_E.tolist(), strict=True)):
        if end > start:
            y_RN[start:end] = matmul(x_RK[start:end], weight_NK)
            if bias_EN is not None:
                y_RN[start:end] += bias_EN[e]
        start = end
    return y_RN


def per_head(x_TEK: torch.Tensor, stack_ENK: Stack) -> torch.Tensor:
    """Each head's rows times its own matrix, x[t, e] @ stack[e].T: [T, E, N], the rows of a head adjacent."""
    x_ETK = x_TEK.transpose(0, 1)
    if x_TEK.is_cuda:
        assert isinstance(stack_ENK, torch.Tensor), "nothing is packed on CUDA"
        return torch.bmm(x_ETK, stack_ENK.transpose(1, 2)).transpose(0, 1)
    out_ETN = x_TEK.new_empty(*x_ETK.shape[:2], stack_ENK[0].shape[0])
    for x_TK, weight_NK, out_TN in zip(x_ETK.contiguous(), stack_ENK, out_ETN, strict=True):
        out_TN.copy_(matmul(x_TK, weight_NK))
    return out_ETN.transpose(0, 1)
