"""Products whose inner channels are split over ranks: each rank computes a term, and an all-reduce adds up.

In int8 the ranks add up integers, scaled alike, before anything is rounded: the result has the same bits whatever the number of
ranks.

Legend: T rows, K inner channels of this rank, N outputs.
"""

import torch

from tpserve.parallel.group import Group
from tpserve.quant.int8 import Int8Weight, check_inner, row_scales
from tpserve.quant.matmul import matmul
from tpserve.quant.packed import Weight, can_pack, pack
from tpserve.quant.weight_memory import PRIVATE, WeightMemory


def row_parallel(x_TK: torch.Tensor, weight_NK: Weight, bias_N: torch.Tensor | None, tp: Group) -> torch.Tensor:
    """x @ weight.T summed over the ranks of `tp`, + bias: [T, N] in the dtype of `x`."""
    if tp.size == 1:
        return matmul(x_TK, weight_NK, bias_N)
    if isinstance(weight_NK, Int8Weight):
        scale_T = _max_over(tp, row_scales(x_TK))
        return weight_NK.rescaled(tp.all_reduce(weight_NK.sums(x_TK, scale_T)), scale_T, bias_N)
    out_TN = tp.all_reduce(matmul(x_TK, weight_NK))
    return out_TN if bias_N is None else out_TN + bias_N


def pack_row_parallel(weight_NK: Weight, tp: Group, *, int8: bool, memory: WeightMemory = PRIVATE) -> Weight:
    """`pack`; in int8 with scales that hold for all ranks, which call this together unless `memory` has the packed weight.

    UserError when a sum over the channels of all ranks might not fit an int32.
    """
    if not int8 or not isinstance(weight_NK, torch.Tensor) or not can_pack(weight_NK):
        return pack(weight_NK, memory=memory)
    if memory.packed:
        return Int8Weight.of(weight_NK, memory=memory)
    check_inner(sum(inner for (inner,) in tp.all_gather_ints([weight_NK.shape[1]])))
    return Int8Weight.of(weight_NK, _max_over(tp, row_scales(weight_NK)), memory)


def _max_over(tp: Group, x_T: torch.Tensor) -> torch.Tensor:
    return tp.all_gather(x_T).amax(0)
