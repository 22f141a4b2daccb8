"""The gated activation between the two halves of an MLP.

Shazeer, "GLU Variants Improve Transformer" (2020), https://arxiv.org/abs/2002.05202 (there: SwiGLU).

Legend: T rows, I intermediate channels (gate_up rows hold 2 I). Elementwise: no value depends on another row.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024


def silu_mul(gate_up_TI2: torch.Tensor) -> torch.Tensor:
    """y[t, i] = silu(gate_up[t, i]) * gate_up[t, I + i], computed in float32 and rounded once.

    gate_up_TI2: [T, 2 I] float32, float16 or bfloat16; the 2 I values of a row are adjacent. First half gate, second half up.
    Returns [T, I], the same dtype, contiguous.
    Errors: AssertionError when a row's length is odd or its values are not adjacent.
    """
    num_rows, width = gate_up_TI2.shape
    assert width % 2 == 0 and gate_up_TI2.stride(1) == 1
    intermediate = width // 2
    y_TI = torch.empty(num_rows, intermediate, dtype=gate_up_TI2.dtype, device=gate_up_TI2.device)
    grid = (num_rows, triton.cdiv(intermediate, BLOCK))
    _silu_mul_kernel[grid](
        gate_up_TI2, y_TI, gate_up_TI2.stride(0), INTERMEDIATE=intermediate, BLOCK=BLOCK, enable_fp_fusion=False
    )
    return y_TI


def silu_mul_reference(gate_up_TI2: torch.Tensor) -> torch.Tensor:
    """`silu_mul` in plain torch, on any device."""
    gate_TI, up_TI = gate_up_TI2.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate_TI) * up_TI).to(gate_up_TI2.dtype)


@triton.jit
def _silu_mul_kernel(gate_up_ptr, y_ptr, gate_up_stride, INTERMEDIATE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < INTERMEDIATE
    gate_ptr = gate_up_ptr + row * gate_up_stride + channel
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + INTERMEDIATE, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * INTERMEDIATE + channel, y.to(y_ptr.dtype.element_ty), mask=inside)
