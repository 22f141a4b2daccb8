"""The weighted sum over a token's experts, in one launch.

Legend: T tokens, A experts per token, R rows in the order of experts (`permutation.permute`), H hidden channels.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024
"""Channels per program."""


def combine(
    out_RH: torch.Tensor,
    rows_TA: torch.Tensor,
    weights_TA: torch.Tensor,
    shared_TH: torch.Tensor | None = None,
    gate_T: torch.Tensor | None = None,
    slots_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[t] = sum over a of weights[t, a] out[rows[t, a]] + gate[t] shared[t], summed in float32 in that order, rounded once.

    A pair with a negative row adds nothing. Without `gate_T` the shared expert's term has weight 1.

    out_RH: [R, H] float32, float16 or bfloat16, contiguous. rows_TA: int32 [T, A], each below R. weights_TA: float32 [T, A].
    shared_TH: [T, H], the dtype of `out`, contiguous, None for no such term. gate_T: float32 [T]. slots_T: integers [T],
    contiguous; where they are negative the row is padding, and zero in the result whatever else it has; None: no padding.
    Returns [T, H] in the dtype of `out`.
    Errors: AssertionError when shapes, dtypes or layouts differ from this.
    """
    (num_tokens, num_active), hidden = rows_TA.shape, out_RH.shape[1]
    assert rows_TA.dtype == torch.int32 and rows_TA.is_contiguous() and out_RH.is_contiguous()
    assert weights_TA.shape == rows_TA.shape and weights_TA.dtype == torch.float32 and weights_TA.is_contiguous()
    assert shared_TH is not None or gate_T is None
    if shared_TH is not None:
        assert shared_TH.shape == (num_tokens, hidden) and shared_TH.dtype == out_RH.dtype and shared_TH.is_contiguous()
    assert gate_T is None or (gate_T.shape == (num_tokens,) and gate_T.dtype == torch.float32 and gate_T.is_contiguous())
    assert slots_T is None or (slots_T.shape == (num_tokens,) and slots_T.is_contiguous() and not slots_T.is_floating_point())
    y_TH = torch.empty(num_tokens, hidden, dtype=out_RH.dtype, device=out_RH.device)
    _combine_kernel[(num_tokens, triton.cdiv(hidden, BLOCK))](
        out_RH, rows_TA, weights_TA, y_TH if shared_TH is None else shared_TH, weights_TA if gate_T is None else gate_T,
        rows_TA if slots_T is None else slots_T, y_TH, HIDDEN=hidden, ACTIVE=num_active, SHARED=shared_TH is not None,
        GATED=gate_T is not None, PADDED=slots_T is not None, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return y_TH


def combine_reference(
    out_RH: torch.Tensor,
    rows_TA: torch.Tensor,
    weights_TA: torch.Tensor,
    shared_TH: torch.Tensor | None = None,
    gate_T: torch.Tensor | None = None,
    slots_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """`combine` in plain torch, on any device."""
    total_TH = torch.zeros(len(rows_TA), out_RH.shape[1], device=out_RH.device)
    for rows_T, weights_T in zip(rows_TA.T, weights_TA.T, strict=True):
        local_T = rows_T >= 0
        total_TH[local_T] += weights_T[local_T, None] * out_RH[rows_T[local_T]].float()
    if shared_TH is not None:
        total_TH += shared_TH.float() if gate_T is None else gate_T[:, None] * shared_TH.float()
    if slots_T is not None:
        total_TH[slots_T < 0] = 0
    return total_TH.to(out_RH.dtype)


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def _combine_kernel(
    out_ptr, rows_ptr, weights_ptr, shared_ptr, gate_ptr, slots_ptr, y_ptr,
    HIDDEN: tl.constexpr, ACTIVE: tl.constexpr, SHARED: tl.constexpr, GATED: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK channels of one token."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    hidden = HIDDEN
    if PADDED:
        hidden = tl.where(tl.load(slots_ptr + token) >= 0, HIDDEN, 0)  # nothing of a padding row is read
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for a in tl.static_range(ACTIVE):
        row = tl.load(rows_ptr + token * ACTIVE + a)
        weight = tl.load(weights_ptr + token * ACTIVE + a)
        out = tl.load(out_ptr + row.to(tl.int64) * HIDDEN + channel, mask=channel < tl.where(row >= 0, hidden, 0), other=0.0)
        total += tl.where(row >= 0, weight * out.to(tl.float32), 0.0)
    if SHARED:
        shared = tl.load(shared_ptr + token * HIDDEN + channel, mask=channel < hidden, other=0.0).to(tl.float32)
        total += tl.load(gate_ptr + token) * shared if GATED else shared
    total = tl.where(channel < hidden, total, 0.0)
    tl.store(y_ptr + token * HIDDEN + channel, total.to(y_ptr.dtype.element_ty), mask=channel < HIDDEN)
