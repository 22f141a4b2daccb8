"""Grouped matrix products: each row times the matrix of its group (an expert), or of its head. The siblings of `matmul`.

One kernel on CUDA and in the library of CPU kernels; without that one product per matrix.
Invariant on the CPU: the bits of a row do not depend on the other rows, of its own group or others (docs/numerics.md).

Legend: T rows, R rows sorted by group, E groups or heads, K inner channels, N outputs.
"""

import torch

from tpserve.quant.int8 import Int8Stack
from tpserve.quant.matmul import matmul
from tpserve.quant.packed import PackedStack, Stack, stack_shape
from tpserve_kernels.cpu import product


def grouped_matmul(
    x_TK: torch.Tensor,
    stack_ENK: Stack,
    ends_E: torch.Tensor,
    bias_EN: torch.Tensor | None = None,
    tokens_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """x[tokens[r]] @ stack[e].T + bias[e], where e is the group of row r: [R, N] in the dtype of `x`.

    Source: MegaBlocks (Gale et al. 2022, arXiv:2211.15841). `x` and `stack` have one dtype. `ends_E`: int32, ascending; group e
    has the rows [ends_E[e - 1], ends_E[e]). Rows from ends_E[-1] on are undefined. `tokens_R`: integers (int32 on CUDA), None for
    row r of `x`. AssertionError for a packed stack on CUDA.
    """
    if x_TK.is_cuda:
        from tpserve_kernels import grouped

        assert isinstance(stack_ENK, torch.Tensor), "nothing is packed on CUDA"
        return grouped.grouped_matmul(x_TK, stack_ENK, ends_E, bias_EN, tokens_R)
    x_RK = x_TK if tokens_R is None else x_TK[tokens_R]
    if isinstance(stack_ENK, PackedStack):
        bias_EN = None if bias_EN is None else bias_EN.float()
        return product.grouped_product(x_RK, stack_ENK.blob_EB, stack_ENK.shape[1], ends_E, bias_EN)
    if isinstance(stack_ENK, Int8Stack):
        return stack_ENK.grouped_product(x_RK, ends_E, bias_EN)
    y_RN, start = x_RK.new_empty(len(x_RK), stack_shape(stack_ENK)[1]), 0
    for e, (weight_NK, end) in enumerate(zip(stack_ENK, ends_E.tolist(), strict=True)):
        if end > start:
            y_RN[start:end] = matmul(x_RK[start:end], weight_NK, None if bias_EN is None else bias_EN[e])
        start = end
    return y_RN


def per_head(x_TEK: torch.Tensor, stack_ENK: Stack) -> torch.Tensor:
    """x[t, e] @ stack[e].T: [T, E, N] in the dtype of `x`, contiguous or a view in which the rows of a head are adjacent.

    AssertionError for a packed stack on CUDA.
    """
    x_ETK = x_TEK.transpose(0, 1)
    if x_TEK.is_cuda:
        assert isinstance(stack_ENK, torch.Tensor), "nothing is packed on CUDA"
        return torch.bmm(x_ETK, stack_ENK.transpose(1, 2)).transpose(0, 1)
    if isinstance(stack_ENK, PackedStack):
        return product.product_of_heads(x_TEK, stack_ENK.blob_EB, stack_ENK.shape[1])
    out_ETN = x_TEK.new_empty(*x_ETK.shape[:2], stack_shape(stack_ENK)[1])
    for x_TK, weight_NK, out_TN in zip(x_ETK.contiguous(), stack_ENK, out_ETN, strict=True):
        out_TN.copy_(matmul(x_TK, weight_NK))
    return out_ETN.transpose(0, 1)
