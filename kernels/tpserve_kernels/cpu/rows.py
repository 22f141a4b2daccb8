"""What a step does to rows between its products: kernels/cpu/rows.h. Norms and activations here, heads in `qkv_heads`.

Tensors are float32 or bfloat16 (`is_native` says whether a tensor can be taken) and the numbers of a row are adjacent; sums are
float32. Each operation has the plain torch form beside it.

Legend: T rows, H channels of a row, I channels of an activation.
"""

import ctypes
import math
from enum import IntEnum

import torch
import torch.nn.functional as F

from tpserve_kernels.cpu.int8 import QuantizeArgs
from tpserve_kernels.cpu.library import DTYPES, Operation, library


class NormArgs(ctypes.Structure):
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


class ActivationArgs(ctypes.Structure):
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


def is_adjacent(x: torch.Tensor) -> bool:
    """Whether the numbers of the last dim lie side by side."""
    return x.is_contiguous() or x.stride(-1) == 1


def adjacent(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a copy whose numbers do so."""
    return x if is_adjacent(x) else x.contiguous()


def empty(x: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of this shape and dtype."""
    return torch.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)


def norm_args(
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
) -> NormArgs:
    """The arguments of Operation.NORM on these tensors, which must outlive the call.

    `quantize`: to do afterwards with each row; its `x` is `out_TH`. `rows` of the result counts for both.
    """
    shape, dtype = x_TH.shape, x_TH.dtype
    addresses, strides = [], []
    for each in (x_TH, residual_TH, sum_TH, out_TH):
        assert each is None or (each.shape == shape and each.dtype == dtype and is_adjacent(each))
        addresses.append(None if each is None else each.data_ptr())
        strides.append(0 if each is None else each.stride(0))
    for weight in (weight_H, bias_H):
        assert weight is None or (weight.shape == shape[1:] and weight.dtype == dtype and weight.is_contiguous())
        addresses.append(None if weight is None else weight.data_ptr())
    return NormArgs(*addresses, *shape, *strides, _pointer(quantize, out_TH), eps, offset, DTYPES[dtype], kind)


def _pointer(quantize: QuantizeArgs | None, out: torch.Tensor) -> "ctypes._Pointer[QuantizeArgs] | None":
    """What an operation does afterwards with the rows of `out`."""
    assert quantize is None or (quantize.x, quantize.inner) == (out.data_ptr(), out.shape[1])
    return None if quantize is None else ctypes.pointer(quantize)


def _norm(
    x_TH: torch.Tensor, weight_H: torch.Tensor | None, bias_H: torch.Tensor | None, eps: float, offset: float, kind: NormKind
) -> torch.Tensor:
    lib, out_TH = library(), empty(x_TH)
    assert lib is not None
    lib.run(Operation.NORM, norm_args(adjacent(x_TH), out_TH, weight_H, bias_H, eps, offset, kind))
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
    lib, out_TH, sum_TH = library(), empty(x_TH), empty(x_TH)
    assert lib is not None
    x_TH, residual_TH = adjacent(x_TH), adjacent(residual_TH)
    lib.run(Operation.NORM, norm_args(x_TH, out_TH, weight_H, bias_H, eps, offset, kind, residual_TH, sum_TH))
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


def activation_args(
    x: torch.Tensor, out_TI: torch.Tensor, kind: ActivationKind, alpha: float = 0.0, limit: float = 0.0,
    quantize: QuantizeArgs | None = None,
) -> ActivationArgs:  # fmt: skip
    """The arguments of Operation.ACTIVATION on [T, I], or with a gate [T, 2 I]; the tensors must outlive the call.

    `quantize`: as of `norm_args`.
    """
    width = out_TI.shape[1]
    assert len(x) == len(out_TI) and x.shape[1] == (2 * width if kind <= ActivationKind.CLAMPED_SWIGLU else width)
    assert is_adjacent(x) and is_adjacent(out_TI) and x.dtype == out_TI.dtype
    sizes = len(x), width, x.stride(0), out_TI.stride(0)
    return ActivationArgs(
        x.data_ptr(), out_TI.data_ptr(), *sizes, _pointer(quantize, out_TI), alpha, limit, DTYPES[x.dtype], kind
    )  # fmt: skip


def activation(x: torch.Tensor, kind: ActivationKind, alpha: float = 0.0, limit: float = 0.0) -> torch.Tensor:
    """The activation of [T, I], or with a gate of [T, 2 I], the gate first: [T, I], contiguous, rounded once.

    All dims before the last are rows.
    `alpha`, `limit`: of CLAMPED_SWIGLU. The error of GELU's normal distribution function is below 3e-7.
    """
    lib, width = library(), x.shape[-1]
    assert lib is not None
    x_TI = adjacent(x.reshape(-1, width))
    if kind <= ActivationKind.CLAMPED_SWIGLU:
        assert width % 2 == 0
        width //= 2
    out_TI = torch.empty(len(x_TI), width, dtype=x.dtype)
    lib.run(Operation.ACTIVATION, activation_args(x_TI, out_TI, kind, alpha, limit))
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
