"""Activations of an MLP, gated and plain.

Shazeer, "GLU Variants Improve Transformer" (2020), https://arxiv.org/abs/2002.05202 (there: SwiGLU, GEGLU). The clamped form is
that of the gpt-oss model card (2025), https://arxiv.org/abs/2508.10925. GELU: Hendrycks and Gimpel (2016),
https://arxiv.org/abs/1606.08415.

Legend: T rows, I intermediate channels (gate_up rows hold 2 I). Elementwise: no value depends on another row.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

BLOCK = 1024
"""Channels per program."""


def silu_mul(gate_up_TI2: torch.Tensor, num_rows: torch.Tensor | None = None) -> torch.Tensor:
    """y[t, i] = silu(gate_up[t, i]) * gate_up[t, I + i], computed in float32 and rounded once.

    gate_up_TI2: [T, 2 I] float32, float16 or bfloat16; the 2 I values of a row are adjacent. First half gate, second half up.
    num_rows: int32 [1] on the device, the rows that count, None for all; the others are neither read nor written.
    Returns [T, I], the same dtype, contiguous.
    Errors: AssertionError when a row's length is odd or its values are not adjacent, or `num_rows` is not as above.
    """
    return _gated(gate_up_TI2, "silu", num_rows)


def silu_mul_reference(gate_up_TI2: torch.Tensor) -> torch.Tensor:
    """`silu_mul` in plain torch, on any device."""
    gate_TI, up_TI = gate_up_TI2.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate_TI) * up_TI).to(gate_up_TI2.dtype)


def gelu_tanh_mul(gate_up_TI2: torch.Tensor, num_rows: torch.Tensor | None = None) -> torch.Tensor:
    """y[t, i] = gelu(gate_up[t, i]) * gate_up[t, I + i], GELU in its approximation by tanh; the rest as for `silu_mul`."""
    return _gated(gate_up_TI2, "gelu_tanh", num_rows)


def gelu_tanh_mul_reference(gate_up_TI2: torch.Tensor) -> torch.Tensor:
    """`gelu_tanh_mul` in plain torch, on any device."""
    gate_TI, up_TI = gate_up_TI2.float().chunk(2, dim=-1)
    return (torch.nn.functional.gelu(gate_TI, approximate="tanh") * up_TI).to(gate_up_TI2.dtype)


def clamped_swiglu(gate_up_TI2: torch.Tensor, alpha: float, limit: float, num_rows: torch.Tensor | None = None) -> torch.Tensor:
    """y[t, i] = gate * sigmoid(alpha * gate) * (up + 1) with gate = min(gate_up[t, i], limit) and up = gate_up[t, I + i]
    clamped to [-limit, limit]; the rest as for `silu_mul`.
    """
    return _gated(gate_up_TI2, "clamped", num_rows, alpha, limit)


def clamped_swiglu_reference(gate_up_TI2: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """`clamped_swiglu` in plain torch, on any device."""
    gate_TI, up_TI = gate_up_TI2.float().chunk(2, dim=-1)
    gate_TI, up_TI = gate_TI.clamp(max=limit), up_TI.clamp(-limit, limit)
    y_TI: torch.Tensor = gate_TI * torch.sigmoid(alpha * gate_TI) * (up_TI + 1)
    return y_TI.to(gate_up_TI2.dtype)


def plain(x_TI: torch.Tensor, kind: str) -> torch.Tensor:
    """y[t, i] = f(x[t, i]) with f "silu", "gelu", "gelu_tanh" or "relu", computed in float32 and rounded once.

    x_TI: [T, I] float32, float16 or bfloat16, contiguous. Returns the same. AssertionError when it is not contiguous.
    """
    assert x_TI.is_contiguous()
    y_TI = torch.empty_like(x_TI)
    rows, width = x_TI.shape
    _plain_kernel[(rows, triton.cdiv(width, BLOCK))](x_TI, y_TI, WIDTH=width, KIND=kind, BLOCK=BLOCK, enable_fp_fusion=False)
    return y_TI


def plain_reference(x_TI: torch.Tensor, kind: str) -> torch.Tensor:
    """`plain` in plain torch, on any device."""
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu,
    }  # fmt: skip
    return functions[kind](x_TI.float()).to(x_TI.dtype)


def _gated(
    gate_up_TI2: torch.Tensor, kind: str, num_rows: torch.Tensor | None, alpha: float = 0.0, limit: float = 0.0
) -> torch.Tensor:
    """Launch the kernel. `alpha` and `limit` are for "clamped" only."""
    rows, width = gate_up_TI2.shape
    assert width % 2 == 0 and gate_up_TI2.stride(1) == 1
    assert num_rows is None or (num_rows.numel() == 1 and num_rows.dtype == torch.int32)
    intermediate = width // 2
    y_TI = torch.empty(rows, intermediate, dtype=gate_up_TI2.dtype, device=gate_up_TI2.device)
    _gated_kernel[(rows, triton.cdiv(intermediate, BLOCK))](
        gate_up_TI2, y_TI, y_TI if num_rows is None else num_rows, gate_up_TI2.stride(0), alpha, limit,
        INTERMEDIATE=intermediate, KIND=kind, PARTIAL=num_rows is not None, BLOCK=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    return y_TI


@triton.jit(do_not_specialize_on_alignment=["num_rows_ptr"])
def _gated_kernel(
    gate_up_ptr, y_ptr, num_rows_ptr, gate_up_stride, alpha, limit,
    INTERMEDIATE: tl.constexpr, KIND: tl.constexpr, PARTIAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK channels of one row."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    intermediate = INTERMEDIATE
    if PARTIAL:
        intermediate = tl.where(row < tl.load(num_rows_ptr), INTERMEDIATE, 0)
    inside = channel < intermediate
    gate_ptr = gate_up_ptr + row * gate_up_stride + channel
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + INTERMEDIATE, mask=inside, other=0.0).to(tl.float32)
    if KIND == "silu":
        y = gate * tl.sigmoid(gate) * up
    elif KIND == "gelu_tanh":  # (1 + tanh(u)) / 2 is the logistic function of 2 u
        y = gate * tl.sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)) * up
    else:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        y = gate * tl.sigmoid(alpha * gate) * (up + 1.0)
    tl.store(y_ptr + row * INTERMEDIATE + channel, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _plain_kernel(x_ptr, y_ptr, WIDTH: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """One program per BLOCK channels of one row."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < WIDTH
    x = tl.load(x_ptr + row * WIDTH + channel, mask=inside, other=0.0).to(tl.float32)
    if KIND == "silu":
        y = x * tl.sigmoid(x)
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))
    elif KIND == "gelu_tanh":
        y = x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    else:
        y = tl.maximum(x, 0.0)
    tl.store(y_ptr + row * WIDTH + channel, y.to(y_ptr.dtype.element_ty), mask=inside)
