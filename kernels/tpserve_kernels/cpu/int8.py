"""Products of int8 rows with int8 matrices: kernels/cpu/product_int8.h. Weights have a scale for each output, rows one each.

Integer sums are exact, so every instruction set gives the bits of the references here.

Legend: T rows, K inner channels, F those of K filled up to a multiple of 64, N outputs.
"""

import ctypes

import torch

from tpserve_kernels.cpu.library import ALIGNMENT, DTYPES, SUM_DTYPES, Operation, calls_of, library

MOST, SMALLEST, UNIT = 127, 1e-30, 64
MAX_INNER = (2**31 - 1) // MOST**2
"""The largest K, over all ranks, whose sums fit an int32."""


class QuantizeArgs(ctypes.Structure):
    """`Quantize` of kernels/cpu/api.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("x_dtype", ctypes.c_int32),
        ("given_scale", ctypes.c_int32),
    )


class ProductInt8Args(ctypes.Structure):
    """`ProductInt8` of kernels/cpu/api.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("out_dtype", ctypes.c_int32),
    )


class GroupedProductInt8Args(ctypes.Structure):
    """`GroupedProductInt8` of kernels/cpu/api.h."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("weight_bytes", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("out_dtype", ctypes.c_int32),
    )


def filled(inner: int) -> int:
    """F of K."""
    return -(-inner // UNIT) * UNIT


def empty_rows(rows: int, inner: int) -> torch.Tensor:
    """Room for rows of K = `inner` in int8: [T, F]. Rows lie a line further apart, or they would share lines of a cache."""
    return torch.empty(rows, filled(inner) + UNIT, dtype=torch.int8)[:, :-UNIT]


def packed_bytes(outputs: int, inner: int) -> int:
    """Bytes of a packed int8 matrix [outputs, inner], its head, scales and sums included. No library is needed to know them."""
    return ALIGNMENT + -(-outputs // 16) * (filled(inner) * 16 + 128)


def pack(weight_NK: torch.Tensor, scale_N: torch.Tensor | None = None, blob: torch.Tensor | None = None) -> torch.Tensor:
    """The int8 form of a float32 or bfloat16 matrix: uint8 [packed_bytes], in `blob` if given, 64-byte aligned.

    `scale_N`: float32, of each output; its largest magnitude / 127 by default. Position-independent and the same for every
    instruction set.
    """
    lib, (outputs, inner) = library(), weight_NK.shape
    assert lib is not None and inner <= MAX_INNER
    q_NF, scale_N = quantize(weight_NK, scale_N)
    if blob is None:
        blob = torch.empty(packed_bytes(outputs, inner), dtype=torch.uint8)
    assert blob.data_ptr() % ALIGNMENT == 0 and blob.numel() == packed_bytes(outputs, inner)
    lib.calls.tpserve_pack_int8(
        ctypes.c_int64(outputs), ctypes.c_int64(inner), ctypes.c_void_p(q_NF.data_ptr()), ctypes.c_int64(q_NF.stride(0)),
        ctypes.c_void_p(scale_N.data_ptr()), ctypes.c_void_p(blob.data_ptr()), torch.get_num_threads(),
    )  # fmt: skip
    return blob


def quantize(x_TK: torch.Tensor, scale_T: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as int8 [T, F], K filled up with zeros, and their scales, float32 [T]: x is about int8 * scale.

    `x_TK`: float32 or bfloat16. `scale_T`: the scales to use, each at least that of `row_scales`.
    """
    lib = library()
    assert lib is not None
    x_TK = _rows(x_TK)
    out_TF = empty_rows(*x_TK.shape)
    scales_T = torch.empty(len(x_TK)) if scale_T is None else scale_T
    lib.run(Operation.QUANTIZE, quantize_args(x_TK, scales_T, out_TF, given=scale_T is not None))
    return out_TF, scales_T


def row_scales(x_TK: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each row / 127, float32 [T]; 0 where it is below 1e-30 / 127."""
    lib = library()
    assert lib is not None
    x_TK, scale_T = _rows(x_TK), torch.empty(len(x_TK))
    lib.run(Operation.QUANTIZE, quantize_args(x_TK, scale_T, None, given=False))
    return scale_T


def product(
    x_TK: torch.Tensor, blob: torch.Tensor, outputs: int, bias_N: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x @ weight.T + bias with both rounded to int8: [T, N] in `out_dtype`, that of `x` by default.

    `x_TK`: float32 or bfloat16. `blob`: from `pack`. `bias_N`: float32.
    """
    lib = library()
    assert lib is not None
    x_TK = _rows(x_TK)
    out_TN = torch.empty(len(x_TK), outputs, dtype=out_dtype or x_TK.dtype)
    q_TF, scale_T = empty_rows(*x_TK.shape), torch.empty(len(x_TK))
    first, second = quantize_args(x_TK, scale_T, q_TF, given=False), product_int8_args(q_TF, scale_T, blob, bias_N, out_TN)
    lib.run_calls(calls_of((Operation.QUANTIZE, first), (Operation.PRODUCT_INT8, second)))
    return out_TN


def grouped_product(
    x_RK: torch.Tensor, blob_EB: torch.Tensor, outputs: int, ends_E: torch.Tensor, bias_EN: torch.Tensor | None = None
) -> torch.Tensor:
    """Each row times the matrix of its group: [R, N] in the dtype of `x`. Rows from ends_E[-1] on are undefined.

    `blob_EB`: uint8 [E, packed_bytes], from `pack`. `ends_E`: int32, ascending; group e has the rows [ends_E[e - 1], ends_E[e]).
    `bias_EN`: float32. Specification: `product_reference` of each group.
    """
    lib = library()
    assert lib is not None and ends_E.dtype == torch.int32 and ends_E.is_contiguous()
    x_RK = _rows(x_RK)
    out_RN = torch.empty(len(x_RK), outputs, dtype=x_RK.dtype)
    q_RF, scale_R = empty_rows(*x_RK.shape), torch.empty(len(x_RK))
    bias = None if bias_EN is None else bias_EN.data_ptr()
    second = GroupedProductInt8Args(
        blob_EB.data_ptr(), ends_E.data_ptr(), q_RF.data_ptr(), scale_R.data_ptr(), bias, out_RN.data_ptr(), len(blob_EB),
        blob_EB.stride(0), q_RF.stride(0), outputs, DTYPES[x_RK.dtype],
    )  # fmt: skip
    first = quantize_args(x_RK, scale_R, q_RF, given=False)
    lib.run_calls(calls_of((Operation.QUANTIZE, first), (Operation.GROUPED_PRODUCT_INT8, second)))
    return out_RN


def integer_sums(q_TF: torch.Tensor, blob: torch.Tensor, outputs: int) -> torch.Tensor:
    """The sums of a product before any scale: int32 [T, N]. `q_TF`: from `quantize`."""
    lib = library()
    assert lib is not None
    out_TN = torch.empty(len(q_TF), outputs, dtype=torch.int32)
    lib.run(Operation.PRODUCT_INT8, product_int8_args(q_TF, None, blob, None, out_TN))
    return out_TN


def rescale(
    sums_TN: torch.Tensor, scale_T: torch.Tensor, blob: torch.Tensor, out_dtype: torch.dtype, bias_N: torch.Tensor | None = None
) -> torch.Tensor:
    """What the sums of a product stand for: sums * (scale * the weight's scales) + bias, [T, N] in `out_dtype`."""
    lib = library()
    assert lib is not None
    sums_TN, out_TN = sums_TN.contiguous(), torch.empty(sums_TN.shape, dtype=out_dtype)
    lib.run(Operation.RESCALE_INT8, product_int8_args(sums_TN, scale_T, blob, bias_N, out_TN))
    return out_TN


def lookup(ids_T: torch.Tensor, blob: torch.Tensor, inner: int) -> torch.Tensor:
    """Rows of a packed matrix, its int8 numbers times their scales: float32 [T, inner]. `ids_T`: int64, not checked."""
    lib = library()
    assert lib is not None
    ids_T, out_TK = ids_T.contiguous(), torch.empty(len(ids_T), inner)
    lib.calls.tpserve_lookup(
        ctypes.c_void_p(blob.data_ptr()), ctypes.c_void_p(ids_T.data_ptr()), ctypes.c_int64(len(ids_T)),
        ctypes.c_void_p(out_TK.data_ptr()),
    )  # fmt: skip
    return out_TK


def row_scales_reference(x_TK: torch.Tensor) -> torch.Tensor:
    """`row_scales` in plain torch."""
    if not x_TK.shape[1]:
        return x_TK.new_zeros(len(x_TK), dtype=torch.float32)
    most_T = x_TK.float().abs().amax(1)
    return torch.where(most_T < SMALLEST, 0, most_T / MOST)


def quantize_reference(x_TK: torch.Tensor, scale_T: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize` in plain torch, of finite numbers and without the zeros that fill K: int8 [T, K], float32 [T]."""
    scale_T = row_scales_reference(x_TK) if scale_T is None else scale_T
    q_TK = (x_TK.float() / scale_T.unsqueeze(1)).round().clamp(-MOST, MOST)
    return torch.where(scale_T.unsqueeze(1) == 0, 0, q_TK).to(torch.int8), scale_T


def product_reference(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`product` in plain torch, with the matrix as it was before packing."""
    (x_q, x_scale), (w_q, w_scale) = quantize_reference(x_TK), quantize_reference(weight_NK)
    sums_TN = (x_q.double() @ w_q.double().T).float()  # exact: integers below 2^31, then rounded once
    y_TN = sums_TN * (w_scale * x_scale.unsqueeze(1))
    return (y_TN if bias_N is None else y_TN + bias_N).to(out_dtype or x_TK.dtype)


def _rows(x_TK: torch.Tensor) -> torch.Tensor:
    return x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()


def quantize_args(x_TK: torch.Tensor, scale_T: torch.Tensor, out_TF: torch.Tensor | None, *, given: bool) -> QuantizeArgs:
    """The arguments of QUANTIZE for these tensors, which the caller keeps."""
    return QuantizeArgs(
        x_TK.data_ptr(),
        scale_T.data_ptr(),
        None if out_TF is None else out_TF.data_ptr(),
        *x_TK.shape,
        x_TK.stride(0),
        0 if out_TF is None else out_TF.stride(0),
        DTYPES[x_TK.dtype],
        given,
    )


def product_int8_args(
    x: torch.Tensor, scale_T: torch.Tensor | None, blob: torch.Tensor, bias_N: torch.Tensor | None, out_TN: torch.Tensor
) -> ProductInt8Args:
    """The arguments of PRODUCT_INT8 and RESCALE_INT8 for these tensors, which the caller keeps."""
    return ProductInt8Args(
        blob.data_ptr(),
        x.data_ptr(),
        None if scale_T is None else scale_T.data_ptr(),
        None if bias_N is None else bias_N.data_ptr(),
        out_TN.data_ptr(),
        len(x),
        x.stride(0),
        out_TN.stride(0),
        SUM_DTYPES[out_TN.dtype],
    )
