"""The matrix product of the model: `matmul` dispatches on the type of the weight. A plain tensor is the dense case.

Invariant on the CPU: the bits of a row of the product do not depend on the other rows, their number, or the number of
threads (docs/numerics.md).

Legend: T rows, K inner channels, N outputs.
"""

import torch
import torch.nn.functional as F

from tpserve.quant.int8 import Int8Weight
from tpserve.quant.packed import PackedWeight, Weight
from tpserve_kernels.cpu.library import is_native

ROW_UNIT = 4
"""CPU libraries take other paths for fewer than four rows, and for the remainder when threads divide rows in fours."""


def matmul(x_TK: torch.Tensor, weight_NK: Weight, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias: [T, N] in the dtype of `x`, that of the plain weight. RuntimeError of torch when they differ."""
    if isinstance(weight_NK, PackedWeight | Int8Weight):
        return weight_NK.product(x_TK, bias_N)
    if x_TK.is_cuda and isinstance(weight_NK, torch.Tensor):
        return F.linear(x_TK, weight_NK, bias_N)
    rows, x_TK = len(x_TK), _padded(x_TK)
    out_TN = F.linear(x_TK, weight_NK) if isinstance(weight_NK, torch.Tensor) else weight_NK.product(x_TK)
    if rows < len(x_TK):
        out_TN = out_TN[:rows]
    return out_TN if bias_N is None else out_TN.add_(bias_N)


def pad_rows(x_TK: torch.Tensor) -> torch.Tensor:
    """`x` with zero rows appended up to a multiple of ROW_UNIT where libraries ask for it, else `x` itself.

    Steps pad once, before their products.
    """
    return x_TK if x_TK.is_cuda or is_native(x_TK) else _padded(x_TK)


def _padded(x_TK: torch.Tensor) -> torch.Tensor:
    missing = -len(x_TK) % ROW_UNIT
    return F.pad(x_TK, (0, 0, 0, missing)) if missing else x_TK
