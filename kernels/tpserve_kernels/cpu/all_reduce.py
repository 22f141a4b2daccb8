"""Sums over the ranks of one host through shared memory: kernels/cpu/all_reduce.h. The specification, in torch, is
tpserve/parallel/shm.py, whose page this works on and whose waits it leaves to Python when they grow long.
"""

import ctypes
from enum import IntEnum

import torch

from tpserve_kernels.cpu.library import SUM_DTYPES
from tpserve_kernels.cpu.rows import NormArgs


class Page(ctypes.Structure):
    """`Page` of kernels/cpu/api.h: what both sides know of a rank's page. `round` counts the rounds of either."""

    _fields_ = (
        ("counters", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("slot_bytes", "round", "done")),
        *((name, ctypes.c_int32) for name in ("waiting", "ranks", "index")),
    )


class AllReduceArgs(ctypes.Structure):
    """`AllReduce` of kernels/cpu/api.h."""

    _fields_ = (
        ("page", ctypes.POINTER(Page)),
        ("x", ctypes.c_void_p),
        ("norm", ctypes.POINTER(NormArgs)),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("reduction", ctypes.c_int32),
    )


class Reduction(IntEnum):
    """`Reduction` of kernels/cpu/api.h."""

    SUM = 0
    MAX = 1


def all_reduce_args(
    page: Page, x_TH: torch.Tensor, norm: NormArgs | None = None, reduction: Reduction = Reduction.SUM
) -> AllReduceArgs:
    """The arguments of Operation.ALL_REDUCE, which sums `x` [T, H] in place; tensors, page and norm must outlive the call.

    `x`: float32, bfloat16 or int32, and for MAX int32; floats that are not negative are ordered as their bits are.
    `norm`: to do afterwards on the sum, for as many rows; its `x` is `x_TH`. `rows` of the result counts for both.
    """
    assert x_TH.is_contiguous() and (norm is None or norm.x == x_TH.data_ptr())
    assert reduction == Reduction.SUM or x_TH.dtype == torch.int32
    norm_at = None if norm is None else ctypes.pointer(norm)
    return AllReduceArgs(ctypes.pointer(page), x_TH.data_ptr(), norm_at, *x_TH.shape, SUM_DTYPES[x_TH.dtype], reduction)
