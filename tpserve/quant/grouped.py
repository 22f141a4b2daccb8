"""Rows times the matrices of their groups: one product for all experts of a layer, `matmul`'s sibling.

Invariant on the CPU: a row of the product has the same bits whatever the other rows are, of its group and of others
(docs/numerics.md). Shapes: R rows in order of their groups, E groups, K inner, N outputs.
"""

import torch
import torch.nn.functional as F

from tpserve.quant.matmul import ROW_UNIT

ALIGNMENT_BYTES = 16
"""What torch's grouped product asks of the distance between rows."""


def group_unit(device: torch.device) -> int:
    """The multiple that the rows of each group are padded to."""
    return 1 if device.type == "cuda" else ROW_UNIT


def grouped_matmul(
    x_RK: torch.Tensor, weight_ENK: torch.Tensor, ends_E: torch.Tensor, bias_EN: torch.Tensor | None = None
) -> torch.Tensor:
    """x[r] @ weight[e].T + bias[e] for the group e of row r: [R, N], contents undefined in rows from ends_E[-1] on.

    `ends_E`: int32; group e has rows [ends_E[e - 1], ends_E[e]), on the CPU padded to a multiple of `group_unit`.
    `weight_ENK` has gone through `aligned`.
    """
    if x_RK.is_cuda:
        from tpserve_kernels import grouped

        return grouped.grouped_matmul(x_RK, weight_ENK, ends_E, bias_EN)
    x_RK = F.pad(x_RK, (0, weight_ENK.shape[2] - x_RK.shape[1]))
    y_RN = F.grouped_mm(x_RK, weight_ENK.transpose(1, 2), offs=ends_E)
    if bias_EN is not None:
        y_RN += bias_EN.repeat_interleave(ends_E.diff(prepend=ends_E.new_zeros(1)), dim=0)
    return y_RN


def aligned(weight_ENK: torch.Tensor) -> torch.Tensor:
    """With zeros behind each row where the CPU's product needs them; done once, after loading."""
    missing = 0 if weight_ENK.is_cuda else -weight_ENK.shape[2] % (ALIGNMENT_BYTES // weight_ENK.itemsize)
    return F.pad(weight_ENK, (0, missing)) if missing else weight_ENK
