"""The logits of rows, written as float32, from what the LM head gave.

Legend: S rows, V vocabulary ids.
"""

import torch
import triton
import triton.language as tl

from tpserve_kernels.arithmetic import finish, finish_reference
from tpserve_kernels.sampler_types import RawLogits

BLOCK = 2048
"""Logits per program."""


def write_logits(logits: RawLogits) -> torch.Tensor:
    """The logits, float32 [S, V], contiguous: new memory. One launch. A draw reads the same bits without it."""
    values_SV, scale, cap = logits
    rows, width = values_SV.shape
    assert values_SV.stride(1) == 1
    out_SV = torch.empty(rows, width, device=values_SV.device)
    _write_kernel[(rows, triton.cdiv(width, BLOCK))](
        values_SV, out_SV, values_SV.stride(0), width, scale, cap or 0.0, CAPPED=cap is not None, BLOCK=BLOCK, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out_SV


def write_logits_reference(logits: RawLogits) -> torch.Tensor:
    """`write_logits` in torch."""
    return finish_reference(*logits)


@triton.jit
def _write_kernel(values_ptr, out_ptr, values_stride, width, scale, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """One program per BLOCK logits of one row."""
    row = tl.program_id(0).to(tl.int64)
    id = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(values_ptr + row * values_stride + id, mask=id < width, other=0.0)
    tl.store(out_ptr + row * width + id, finish(x, scale, cap, CAPPED), mask=id < width)
