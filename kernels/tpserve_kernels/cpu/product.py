"""Matrix products with packed weights: kernels/cpu/product.h. One packed form for every instruction set.

Legend: T rows, K inner channels, N outputs.
"""

import ctypes

import torch

from tpserve_kernels.cpu.library import ALIGNMENT, DTYPES, Operation, library


class ProductArgs(ctypes.Structure):
    """`Product` of kernels/cpu/api.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("out_dtype", ctypes.c_int32),
    )


class GroupedProductArgs(ctypes.Structure):
    """`GroupedProduct` of kernels/cpu/api.h."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("weight_bytes", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("x_group", ctypes.c_int64),
        ("out_group", ctypes.c_int64),
        ("out_dtype", ctypes.c_int32),
    )


def packed_bytes(dtype: torch.dtype, outputs: int, inner: int) -> int:
    """Bytes of a packed matrix [outputs, inner], its head included. No library is needed to know them."""
    row = -(-inner // 32) * 32 * 2 if dtype == torch.bfloat16 else inner * 4
    return ALIGNMENT + -(-outputs // 16) * 16 * row


def pack(weight_NK: torch.Tensor, blob: torch.Tensor | None = None) -> torch.Tensor:
    """The packed form of a float32 or bfloat16 matrix: uint8 [packed_bytes], in `blob` if given, 64-byte aligned.

    Position-independent and the same for every instruction set, so that it can lie in shared memory.
    """
    lib, (outputs, inner) = library(), weight_NK.shape
    assert lib is not None and weight_NK.stride(1) == 1
    if blob is None:
        blob = torch.empty(packed_bytes(weight_NK.dtype, outputs, inner), dtype=torch.uint8)
    assert blob.data_ptr() % ALIGNMENT == 0 and blob.numel() == packed_bytes(weight_NK.dtype, outputs, inner)
    lib.calls.tpserve_pack(
        DTYPES[weight_NK.dtype], ctypes.c_int64(outputs), ctypes.c_int64(inner), ctypes.c_void_p(weight_NK.data_ptr()),
        ctypes.c_int64(weight_NK.stride(0)), ctypes.c_void_p(blob.data_ptr()), torch.get_num_threads(),
    )  # fmt: skip
    return blob


def product_args(x_TK: torch.Tensor, blob: torch.Tensor, bias_N: torch.Tensor | None, out_TN: torch.Tensor) -> ProductArgs:
    """The arguments of Operation.PRODUCT on these tensors, which must outlive the call. See `product`."""
    assert x_TK.stride(1) == out_TN.stride(1) == 1 and len(x_TK) == len(out_TN)
    assert bias_N is None or (bias_N.dtype == torch.float32 and bias_N.is_contiguous())
    bias = None if bias_N is None else bias_N.data_ptr()
    return ProductArgs(
        blob.data_ptr(), x_TK.data_ptr(), bias, out_TN.data_ptr(), len(x_TK), x_TK.stride(0), out_TN.stride(0),
        DTYPES[out_TN.dtype],
    )  # fmt: skip


def product(
    x_TK: torch.Tensor,
    blob: torch.Tensor,
    outputs: int,
    bias_N: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias: [T, N] in `out_dtype`, that of `x` by default; summed in float32, rounded once.

    `x_TK`: float32 or bfloat16, of the weight's dtype, values of a row adjacent. `blob`: from `pack`. `bias_N`: float32.
    """
    lib = library()
    assert lib is not None
    if x_TK.stride(1) != 1:
        x_TK = x_TK.contiguous()
    out_TN = torch.empty(len(x_TK), outputs, dtype=out_dtype or x_TK.dtype)
    lib.run(Operation.PRODUCT, product_args(x_TK, blob, bias_N, out_TN))
    return out_TN


def product_reference(
    x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """`product` in plain torch, with the matrix as it was before packing."""
    y_TN = x_TK.float() @ weight_NK.float().T
    return (y_TN if bias_N is None else y_TN + bias_N).to(out_dtype or x_TK.dtype)


def lookup(ids_T: torch.Tensor, blob: torch.Tensor, inner: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a packed matrix, unpacked: [T, inner] of `dtype`. `ids_T`: int64, contiguous, not checked."""
    lib = library()
    assert lib is not None
    out_TK = torch.empty(len(ids_T), inner, dtype=dtype)
    lib.calls.tpserve_lookup(
        ctypes.c_void_p(blob.data_ptr()), ctypes.c_void_p(ids_T.data_ptr()), ctypes.c_int64(len(ids_T)),
        ctypes.c_void_p(out_TK.data_ptr()),
    )  # fmt: skip
    return out_TK


def grouped_product(
    x_RK: torch.Tensor, blob_EB: torch.Tensor, outputs: int, ends_E: torch.Tensor, bias_EN: torch.Tensor | None = None
) -> torch.Tensor:
    """Each row times the matrix of its group: [R, N] in the dtype of `x`. Rows from ends_E[-1] on are undefined.

    `blob_EB`: uint8 [E, packed_bytes], from `pack`. `ends_E`: int32, ascending; group e has the rows [ends_E[e - 1], ends_E[e]).
    `bias_EN`: float32. Specification: `product_reference` of each group.
    """
    lib = library()
    assert lib is not None and ends_E.dtype == torch.int32 and ends_E.is_contiguous()
    x_RK, out_RN = x_RK.contiguous(), torch.empty(len(x_RK), outputs, dtype=x_RK.dtype)
    bias = None if bias_EN is None else bias_EN.data_ptr()
    call = GroupedProductArgs(
        blob_EB.data_ptr(), ends_E.data_ptr(), x_RK.data_ptr(), bias, out_RN.data_ptr(), len(blob_EB), blob_EB.stride(0), 0,
        x_RK.stride(0), outputs, 0, 0, DTYPES[x_RK.dtype],
    )  # fmt: skip
    lib.run(Operation.GROUPED_PRODUCT, call)
    return out_RN


def product_of_heads(x_TEK: torch.Tensor, blob_EB: torch.Tensor, outputs: int) -> torch.Tensor:
    """x[t, e] times matrix e: [T, E, N] in the dtype of `x`. `blob_EB`: uint8 [E, packed_bytes], from `pack`.

    Specification: `product_reference` of each head.
    """
    lib = library()
    assert lib is not None
    if x_TEK.stride(2) != 1:
        x_TEK = x_TEK.contiguous()
    rows, heads, _ = x_TEK.shape
    out_TEN = torch.empty(rows, heads, outputs, dtype=x_TEK.dtype)
    call = GroupedProductArgs(
        blob_EB.data_ptr(), None, x_TEK.data_ptr(), None, out_TEN.data_ptr(), heads, blob_EB.stride(0), rows,
        x_TEK.stride(0), heads * outputs, x_TEK.stride(1), outputs, DTYPES[x_TEK.dtype],
    )  # fmt: skip
    lib.run(Operation.GROUPED_PRODUCT, call)
    return out_TEN
