"""The best of numbers with Gumbel noise: kernels/cpu/gumbel.h. The specification, in torch, is in tpserve/sampler/draw.py.

Legend: S rows, N numbers of a row.
"""

import ctypes

import torch

from tpserve_kernels.cpu.library import Operation, library


class GumbelMaxArgs(ctypes.Structure):
    """`GumbelMax` of kernels/cpu/api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "sums", "temperature", "seed", "position", "choice", "first_of_row")),
        *((name, ctypes.c_void_p) for name in ("value", "index")),
        *((name, ctypes.c_int64) for name in ("rows", "count", "x_stride", "first")),
        ("level", ctypes.c_int32),
    )


def gumbel_max(
    x_SN: torch.Tensor,
    sum_SN: torch.Tensor | None,
    temperature_S: torch.Tensor,
    counters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    first: int,
    first_S: torch.Tensor | None,
    level: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest x / temperature + log(sum) + noise of each row, float64 [S], and its lowest index, int64 [S].

    `x_SN`: float32, adjacent in a row; `sum_SN`: float64, each 0 or a normal number; None: no logarithm is added.
    `temperature_S`: float32, 0 counts as 1. `counters`: seed, position and choice, int64 [S]. The noise of number n has the id
    first + first_S + n. The bits of a row are the same in any company; those of the noise on every instruction set.
    """
    lib, (rows, count) = library(), x_SN.shape
    assert lib is not None and x_SN.dtype == temperature_S.dtype == torch.float32 and x_SN.stride(1) == 1
    assert sum_SN is None or (sum_SN.dtype == torch.float64 and sum_SN.is_contiguous() and sum_SN.shape == x_SN.shape)
    temperature_S, *counters_S = (each.contiguous() for each in (temperature_S, *counters))
    assert all(each.dtype == torch.int64 for each in counters_S) and (first_S is None or first_S.is_contiguous())
    value_S, index_S = torch.empty(rows, dtype=torch.float64), torch.empty(rows, dtype=torch.int64)
    arguments = GumbelMaxArgs(
        x_SN.data_ptr(), None if sum_SN is None else sum_SN.data_ptr(), temperature_S.data_ptr(),
        *(each.data_ptr() for each in counters_S), None if first_S is None else first_S.data_ptr(),
        value_S.data_ptr(), index_S.data_ptr(), rows, count, x_SN.stride(0), first, level,
    )  # fmt: skip
    lib.run(Operation.GUMBEL_MAX, arguments)
    return value_S, index_S
