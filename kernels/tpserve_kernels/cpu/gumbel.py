"""Gumbel noise from Philox: kernels/cpu/gumbel.h. The specification, in torch, is `gumbel` of tpserve/sampler/draw.py.

Legend: S rows, N ids of a row.
"""

import ctypes

import torch

from tpserve_kernels.cpu.library import Operation, library


class Gumbel(ctypes.Structure):
    """`Gumbel` of kernels/cpu/api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("ids", "seed", "position", "choice", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "count", "ids_stride")),
        ("level", ctypes.c_int32),
    )


def gumbel(
    id_SN: torch.Tensor, seed_S: torch.Tensor, position_S: torch.Tensor, choice_S: torch.Tensor, level: int
) -> torch.Tensor:
    """-log(-log u), u in (0, 1) from Philox with key `seed` and counter (id, position, choice, level): float64 [S, N].

    All are int64; `id_SN` may be [1, N], the same for all rows. The same bits on every instruction set.
    """
    lib, rows, count = library(), len(seed_S), id_SN.shape[1]
    assert lib is not None and len(id_SN) in (1, rows) and id_SN.is_contiguous()
    columns = [each.contiguous() for each in (seed_S, position_S, choice_S)]
    assert all(each.dtype == torch.int64 and each.shape == (rows,) for each in columns) and id_SN.dtype == torch.int64
    out_SN = torch.empty(rows, count, dtype=torch.float64)
    stride = count if len(id_SN) == rows else 0
    addresses = (each.data_ptr() for each in (id_SN, *columns, out_SN))
    lib.run(Operation.GUMBEL, Gumbel(*addresses, rows, count, stride, level))
    return out_SN
