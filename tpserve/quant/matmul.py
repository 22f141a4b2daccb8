"""The one matrix product of the model: `matmul` dispatches on the weight's type. A plain tensor is the dense case.

Invariant on the CPU: a row of the product has the same bits whatever the other rows are, how many there are, and how
many threads compute it (docs/numerics.md). Shapes: T rows, K inner, N outputs.
"""

import torch
import torch.nn.functional as F

ROW_UNIT = 4
"""The CPU libraries take other paths below four rows, and for the rows left over when threads share out groups of four."""


def matmul(x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """x @ weight.T in the dtype of `x`: [T, N]."""
    missing = 0 if x_TK.is_cuda else -len(x_TK) % ROW_UNIT
    if missing == 0:
        return F.linear(x_TK, weight_NK)
    return F.linear(F.pad(x_TK, (0, 0, 0, missing)), weight_NK)[: len(x_TK)]
