"""The matrix product of the model: `matmul` dispatches on the type of the weight. A plain tensor is the dense case.

Invariant on the CPU: the bits of a row of the product do not depend on the other rows, their number, or the number of
threads (docs/numerics.md).

Legend: T rows, K inner channels, N outputs.
"""

import torch
import torch.nn.functional as F

from tpserve.quant.packed import PackedWeight, Weight

ROW_UNIT = 4
"""CPU libraries take other paths for fewer than four rows, and for the remainder when threads divide rows in fours."""


def matmul(x_TK: torch.Tensor, weight_NK: Weight) -> torch.Tensor:
    """x @ weight.T: [T, N] in the dtype of `x`, which is that of the weight. RuntimeError of torch when they differ."""
    rows, x_TK = len(x_TK), pad_rows(x_TK)
    out_TN = weight_NK.product(x_TK) if isinstance(weight_NK, PackedWeight) else F.linear(x_TK, weight_NK)
    return out_TN if rows == len(x_TK) else out_TN[:rows]


def pad_rows(x_TK: torch.Tensor) -> torch.Tensor:
    """`x` with zero rows appended up to a multiple of ROW_UNIT; `x` itself on CUDA. Steps pad once, before their products."""
    missing = 0 if x_TK.is_cuda else -len(x_TK) % ROW_UNIT
    return F.pad(x_TK, (0, 0, 0, missing)) if missing else x_TK
