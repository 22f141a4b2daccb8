"""The one matrix product of the model: `matmul` dispatches on the weight's type. A plain tensor is the dense case.

Invariant on the CPU: a row of the product has the same bits whatever the other rows are, how many there are, and how
many threads compute it (docs/numerics.md). Shapes: T rows, K inner, N outputs.
"""

import torch
import torch.nn.functional as F

from tpserve.quant.packed import PackedWeight, Weight

ROW_UNIT = 4
"""The CPU libraries take other paths below four rows, and for the rows left over when threads share out groups of four."""


def matmul(x_TK: torch.Tensor, weight_NK: Weight) -> torch.Tensor:
    """x @ weight.T in the dtype of `x`: [T, N]."""
    rows, x_TK = len(x_TK), pad_rows(x_TK)
    out_TN = weight_NK.product(x_TK) if isinstance(weight_NK, PackedWeight) else F.linear(x_TK, weight_NK)
    return out_TN if rows == len(x_TK) else out_TN[:rows]


def pad_rows(x_TK: torch.Tensor) -> torch.Tensor:
    """Rows of zeros added as the CPU's products need them. Done once for a step, `matmul` has nothing left to add."""
    missing = 0 if x_TK.is_cuda else -len(x_TK) % ROW_UNIT
    return F.pad(x_TK, (0, 0, 0, missing)) if missing else x_TK
