"""What a step does to rows between its products: kernels/cpu/rows.h. Norms, heads with their rotation and cache, activations.

Tensors are float32 or bfloat16 (`is_native` says whether a tensor can be taken) and the numbers of a row are adjacent; sums are
float32. Each operation has the plain torch form beside it.

Legend: T rows, H channels of a row, N query heads, K key/value heads, D channels of a head, of which 2 E rotate, P positions,
S slots of a cache, I channels of an activation.
"""

import ctypes
import math
from enum import IntEnum
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tpserve_kernels.cpu.int8 import QuantizeArgs
from tpserve_kernels.cpu.kv_int8 import SCALE_BYTES, quantize_heads_reference
from tpserve_kernels.cpu.library import DTYPES, INT8, Operation, library


class Norm(ctypes.Structure):
    """`Norm` of kernels/cpu/api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "residual", "sum", "out", "weight", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "x_stride", "residual_stride", "sum_stride", "out_stride")),
        ("quantize", ctypes.POINTER(QuantizeArgs)),
        ("eps", ctypes.c_float),
        ("offset", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("kind", ctypes.c_int32),
    )


class Heads(ctypes.Structure):
    """`Heads` of kernels/cpu/api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("from_", "to", "norm")),
        *((name, ctypes.c_int64) for name in ("count", "dim", "from_stride", "from_head_stride", "to_stride", "to_head_stride")),
    )


class Qkv(ctypes.Structure):
    """`Qkv` of kernels/cpu/api.h."""

    _fields_ = (
        *((name, Heads) for name in ("q", "k", "v")),
        *((name, ctypes.c_void_p) for name in ("positions", "cos", "sin", "slots")),
        *((name, ctypes.c_int64) for name in ("rows", "written", "frequencies")),
        ("eps", ctypes.c_float),
        ("offset", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("interleaved", ctypes.c_int32),
        ("cache_dtype", ctypes.c_int32),
    )


class Activation(ctypes.Structure):
    """`Activation` of kernels/cpu/api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "x_stride", "out_stride")),
        ("quantize", ctypes.POINTER(QuantizeArgs)),
        ("alpha", ctypes.c_float),
        ("limit", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("kind", ctypes.c_int32),
    )


class NormKind(IntEnum):
    """`NormKind` of kernels/cpu/api.h."""

    RMS_NORM = 0
    LAYER_NORM = 1


class ActivationKind(IntEnum):
    """`ActivationKind` of kernels/cpu/api.h. Those up to CLAMPED_SWIGLU are gated."""

    SILU_MUL = 0
    GELU_TANH_MUL = 1
    CLAMPED_SWIGLU = 2
    SILU = 3
    GELU = 4
    GELU_TANH = 5
    RELU = 6


class HeadNorms(NamedTuple):
    """RMS norms of query and key heads: weights [D], to which `offset` is added in float32."""

    q_D: torch.Tensor
    k_D: torch.Tensor
    eps: float
    offset: float = 0.0


class Rotation(NamedTuple):
    """Positions of rows, int64 [T] in [0, P), not checked, and the tables of all positions, float32 [P, E], contiguous.

    `interleaved`: channels 2 c and 2 c + 1 rotate, and come out as c and c + E; else c and c + E do.
    """

    positions_T: torch.Tensor
    cos_PE: torch.Tensor
    sin_PE: torch.Tensor
    interleaved: bool = False


def _is_adjacent(x: torch.Tensor) -> bool:
    """Whether the numbers of the last dim lie side by side."""
    return x.is_contiguous() or x.stride(-1) == 1


def _adjacent(x: torch.Tensor) -> torch.Tensor:
    return x if _is_adjacent(x) else x.contiguous()


def _empty(x: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of this shape and dtype."""
    return torch.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)


def _address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def norm_arguments(
    x_TH: torch.Tensor,
    out_TH: torch.Tensor,
    weight_H: torch.Tensor | None,
    bias_H: torch.Tensor | None,
    eps: float,
    offset: float,
    kind: NormKind,
    residual_TH: torch.Tensor | None = None,
    sum_TH: torch.Tensor | None = None,
    quantize: QuantizeArgs | None = None,
) -> Norm:
    """The arguments of Operation.NORM on these tensors, which must outlive the call.

    `quantize`: to do afterwards with each row; its `x` is `out_TH`. `rows` of the result counts for both.
    """
    shape, dtype = x_TH.shape, x_TH.dtype
    addresses, strides = [], []
    for each in (x_TH, residual_TH, sum_TH, out_TH):
        assert each is None or (each.shape == shape and each.dtype == dtype and _is_adjacent(each))
        addresses.append(None if each is None else each.data_ptr())
        strides.append(0 if each is None else each.stride(0))
    for weight in (weight_H, bias_H):
        assert weight is None or (weight.shape == shape[1:] and weight.dtype == dtype and weight.is_contiguous())
        addresses.append(None if weight is None else weight.data_ptr())
    return Norm(*addresses, *shape, *strides, _pointer(quantize, out_TH), eps, offset, DTYPES[dtype], kind)


def _pointer(quantize: QuantizeArgs | None, out: torch.Tensor) -> "ctypes._Pointer[QuantizeArgs] | None":
    """What an operation does afterwards with the rows of `out`."""
    assert quantize is None or (quantize.x, quantize.inner) == (out.data_ptr(), out.shape[1])
    return None if quantize is None else ctypes.pointer(quantize)


def _norm(
    x_TH: torch.Tensor, weight_H: torch.Tensor | None, bias_H: torch.Tensor | None, eps: float, offset: float, kind: NormKind
) -> torch.Tensor:
    lib, out_TH = library(), _empty(x_TH)
    assert lib is not None
    lib.run(Operation.NORM, norm_arguments(_adjacent(x_TH), out_TH, weight_H, bias_H, eps, offset, kind))
    return out_TH


def _add_norm(
    x_TH: torch.Tensor,
    residual_TH: torch.Tensor,
    weight_H: torch.Tensor | None,
    bias_H: torch.Tensor | None,
    eps: float,
    offset: float,
    kind: NormKind,
) -> tuple[torch.Tensor, torch.Tensor]:
    lib, out_TH, sum_TH = library(), _empty(x_TH), _empty(x_TH)
    assert lib is not None
    x_TH, residual_TH = _adjacent(x_TH), _adjacent(residual_TH)
    lib.run(Operation.NORM, norm_arguments(x_TH, out_TH, weight_H, bias_H, eps, offset, kind, residual_TH, sum_TH))
    return out_TH, sum_TH


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """Each row of `x` divided by sqrt(mean(x^2) + eps), times `offset + weight`, rounded once: [T, H]."""
    return _norm(x_TH, weight_H, None, eps, offset, NormKind.RMS_NORM)


def rms_norm_reference(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """`rms_norm` in plain torch."""
    x = x_TH.float()
    return (x * (x.square().mean(1, keepdim=True) + eps).rsqrt() * (weight_H.float() + offset)).to(x_TH.dtype)


def add_rms_norm(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), both [T, H]; the sum is rounded before the norm."""
    return _add_norm(x_TH, residual_TH, weight_H, None, eps, offset, NormKind.RMS_NORM)


def layer_norm(x_TH: torch.Tensor, weight_H: torch.Tensor | None, bias_H: torch.Tensor | None, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias of each row, rounded once: [T, H]."""
    return _norm(x_TH, weight_H, bias_H, eps, 0.0, NormKind.LAYER_NORM)


def layer_norm_reference(
    x_TH: torch.Tensor, weight_H: torch.Tensor | None, bias_H: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """`layer_norm` in plain torch."""
    weight, bias = (None if each is None else each.float() for each in (weight_H, bias_H))
    return F.layer_norm(x_TH.float(), x_TH.shape[-1:], weight, bias, eps).to(x_TH.dtype)


def add_layer_norm(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor | None, bias_H: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer_norm(x + residual), x + residual), both [T, H]; the sum is rounded before the norm."""
    return _add_norm(x_TH, residual_TH, weight_H, bias_H, eps, 0.0, NormKind.LAYER_NORM)


NO_HEADS = Heads()


def heads_of(from_THD: torch.Tensor, to_THD: torch.Tensor, norm_D: torch.Tensor | None = None) -> Heads:
    """The argument `Heads` for heads that go from one tensor to another, [T, heads, D] or [S, heads, D], channels adjacent.

    Or to a cache of int8, [S, heads, D + 4] (`kv_int8`).
    """
    _, count, dim = from_THD.shape
    assert to_THD.shape[1:] == (count, dim + SCALE_BYTES if to_THD.dtype == torch.int8 else dim)
    assert to_THD.dtype in (from_THD.dtype, torch.int8) and _is_adjacent(from_THD) and _is_adjacent(to_THD)
    assert norm_D is None or (norm_D.shape == (dim,) and norm_D.dtype == from_THD.dtype and norm_D.is_contiguous())
    return Heads(
        from_THD.data_ptr(), to_THD.data_ptr(), _address(norm_D), count, dim,
        from_THD.stride(0), from_THD.stride(1), to_THD.stride(0), to_THD.stride(1),
    )  # fmt: skip


def qkv_arguments(
    q: Heads, k: Heads, v: Heads, rows: int, dtype: torch.dtype, *, norms: HeadNorms | None = None,
    rotation: Rotation | None = None, slots_T: torch.Tensor | None = None, cache_int8: bool = False,
) -> Qkv:  # fmt: skip
    """The arguments of Operation.QKV; the tensors must outlive the call. The norms' weights are in `q` and `k` already.

    `cache_int8`: keys and values go to tensors of int8.
    """
    written, frequencies = 0, 0
    tables: list[int | None] = [None, None, None]
    if slots_T is not None:
        assert slots_T.dtype == torch.int64 and slots_T.is_contiguous()
        written = len(slots_T)
    if rotation is not None:
        positions_T, cos_PE, sin_PE, interleaved = rotation
        frequencies = cos_PE.shape[1]
        assert positions_T.shape == (rows,) and positions_T.dtype == torch.int64 and positions_T.is_contiguous()
        for table in (cos_PE, sin_PE):
            assert table.shape == cos_PE.shape and table.dtype == torch.float32 and table.is_contiguous()
        for side in (q, k):
            assert not side.count or side.dim >= 2 * frequencies
            assert not side.count or not interleaved or side.dim == 2 * frequencies
        tables = [positions_T.data_ptr(), cos_PE.data_ptr(), sin_PE.data_ptr()]
    return Qkv(
        q, k, v, *tables, _address(slots_T), rows, written, frequencies, 0.0 if norms is None else norms.eps,
        0.0 if norms is None else norms.offset, DTYPES[dtype], rotation is not None and rotation.interleaved,
        INT8 if cache_int8 else DTYPES[dtype],
    )  # fmt: skip


def place_heads(
    q_TND: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKE: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKE: torch.Tensor,
    slots_T: torch.Tensor,
    norms: HeadNorms | None = None,
    rotation: Rotation | None = None,
) -> torch.Tensor:
    """Norm and rotate the heads of queries and keys, and write keys and values to their slots of the caches.

    Queries change in place, [T, N, D] is returned. `slots_T`: int64; rows past its end, and those with a negative slot, are
    written nowhere; the others are not checked. Caches have the dtype of the rows, or are of int8 (`kv_int8`).
    """
    lib = library()
    assert lib is not None
    q = heads_of(q_TND, q_TND, None if norms is None else norms.q_D)
    k = heads_of(k_TKD, k_cache_SKD, None if norms is None else norms.k_D)
    v = heads_of(v_TKE, v_cache_SKE)
    int8 = k_cache_SKD.dtype == torch.int8
    arguments = qkv_arguments(q, k, v, len(q_TND), q_TND.dtype, norms=norms, rotation=rotation, slots_T=slots_T, cache_int8=int8)
    lib.run(Operation.QKV, arguments)
    return q_TND


def place_heads_reference(
    q_TND: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKE: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKE: torch.Tensor,
    slots_T: torch.Tensor,
    norms: HeadNorms | None = None,
    rotation: Rotation | None = None,
) -> torch.Tensor:
    """`place_heads` in plain torch; queries do not change in place."""
    if norms is not None:
        q_TND, k_TKD = (
            rms_norm_reference(x.reshape(-1, x.shape[2]), weight_D, norms.eps, norms.offset).view(x.shape)
            for x, weight_D in ((q_TND, norms.q_D), (k_TKD, norms.k_D))
        )
    if rotation is not None:
        q_TND, k_TKD = rotate_reference(q_TND, k_TKD, rotation)
    write_kv_reference(k_TKD, v_TKE, k_cache_SKD, v_cache_SKE, slots_T)
    return q_TND


def rotate(q_TND: torch.Tensor, k_TKD: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated queries and keys, new tensors; products and sums in float32, rounded once."""
    lib, (q_TND, k_TKD) = library(), (_adjacent(q_TND), _adjacent(k_TKD))
    assert lib is not None
    out = _empty(q_TND), _empty(k_TKD)
    sides = heads_of(q_TND, out[0]), heads_of(k_TKD, out[1]), NO_HEADS
    lib.run(Operation.QKV, qkv_arguments(*sides, len(q_TND), q_TND.dtype, rotation=rotation))
    return out


def rotate_reference(q_TND: torch.Tensor, k_TKD: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
    """`rotate` in plain torch, with equal bits."""
    cos_T1E, sin_T1E = (table_PE[rotation.positions_T].unsqueeze(1) for table_PE in (rotation.cos_PE, rotation.sin_PE))

    def turned(x: torch.Tensor) -> torch.Tensor:
        if rotation.interleaved:
            x = torch.cat((x[..., ::2], x[..., 1::2]), dim=2)
        low, high, rest = x.float().tensor_split((cos_T1E.shape[2], 2 * cos_T1E.shape[2]), dim=2)
        return torch.cat((low * cos_T1E + high * -sin_T1E, high * cos_T1E + low * sin_T1E, rest), dim=2).to(x.dtype)

    return turned(q_TND), turned(k_TKD)


def write_kv(
    k_TKD: torch.Tensor,
    v_TKE: torch.Tensor | None,
    k_cache_SKD: torch.Tensor,
    v_cache_SKE: torch.Tensor | None,
    slots_T: torch.Tensor,
) -> None:
    """Write keys and values (None: keys only) to their slots, as `place_heads` does."""
    lib, k_TKD = library(), _adjacent(k_TKD)
    assert lib is not None
    v = NO_HEADS if v_TKE is None or v_cache_SKE is None else heads_of(_adjacent(v_TKE), v_cache_SKE)
    k, int8 = heads_of(k_TKD, k_cache_SKD), k_cache_SKD.dtype == torch.int8
    arguments = qkv_arguments(NO_HEADS, k, v, len(k_TKD), k_TKD.dtype, slots_T=slots_T, cache_int8=int8)
    lib.run(Operation.QKV, arguments)


def write_kv_reference(
    k_TKD: torch.Tensor,
    v_TKE: torch.Tensor | None,
    k_cache_SKD: torch.Tensor,
    v_cache_SKE: torch.Tensor | None,
    slots_T: torch.Tensor,
) -> None:
    """`write_kv` in plain torch."""
    rows = (slots_T >= 0).nonzero().squeeze(1)
    for heads, cache in ((k_TKD, k_cache_SKD), (v_TKE, v_cache_SKE)):
        if heads is not None and cache is not None:
            cache[slots_T[rows]] = quantize_heads_reference(heads[rows]) if cache.dtype == torch.int8 else heads[rows]


def activation_arguments(
    x: torch.Tensor, out_TI: torch.Tensor, kind: ActivationKind, alpha: float = 0.0, limit: float = 0.0,
    quantize: QuantizeArgs | None = None,
) -> Activation:  # fmt: skip
    """The arguments of Operation.ACTIVATION on [T, I], or with a gate [T, 2 I]; the tensors must outlive the call.

    `quantize`: as of `norm_arguments`.
    """
    width = out_TI.shape[1]
    assert len(x) == len(out_TI) and x.shape[1] == (2 * width if kind <= ActivationKind.CLAMPED_SWIGLU else width)
    assert _is_adjacent(x) and _is_adjacent(out_TI) and x.dtype == out_TI.dtype
    sizes = len(x), width, x.stride(0), out_TI.stride(0)
    return Activation(
        x.data_ptr(), out_TI.data_ptr(), *sizes, _pointer(quantize, out_TI), alpha, limit, DTYPES[x.dtype], kind
    )  # fmt: skip


def activation(x: torch.Tensor, kind: ActivationKind, alpha: float = 0.0, limit: float = 0.0) -> torch.Tensor:
    """The activation of [T, I], or with a gate of [T, 2 I], the gate first: [T, I], contiguous, rounded once.

    All dims before the last are rows.
    `alpha`, `limit`: of CLAMPED_SWIGLU. The error of GELU's normal distribution function is below 3e-7.
    """
    lib, width = library(), x.shape[-1]
    assert lib is not None
    x_TI = _adjacent(x.reshape(-1, width))
    if kind <= ActivationKind.CLAMPED_SWIGLU:
        assert width % 2 == 0
        width //= 2
    out_TI = torch.empty(len(x_TI), width, dtype=x.dtype)
    lib.run(Operation.ACTIVATION, activation_arguments(x_TI, out_TI, kind, alpha, limit))
    return out_TI.view(*x.shape[:-1], width)


def activation_reference(x: torch.Tensor, kind: ActivationKind, alpha: float = 0.0, limit: float = 0.0) -> torch.Tensor:
    """`activation` in plain torch."""
    gate, up = x.float().chunk(2, dim=1) if kind <= ActivationKind.CLAMPED_SWIGLU else (x.float(), torch.ones(()))
    if kind == ActivationKind.CLAMPED_SWIGLU:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1
        y = gate / (1 + torch.exp(-alpha * gate))
    elif kind == ActivationKind.RELU:
        y = gate.relu()
    elif kind == ActivationKind.GELU:
        y = gate * 0.5 * (1 + (gate * math.sqrt(0.5)).erf())
    elif kind in (ActivationKind.GELU_TANH, ActivationKind.GELU_TANH_MUL):
        y = gate / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * gate * (1 + 0.044715 * gate * gate)))
    else:
        y = gate / (1 + torch.exp(-gate))
    return (y * up).to(x.dtype)
