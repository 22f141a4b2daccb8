"""Root-mean-square norm and layer norm, alone and fused with the residual addition before them.

Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), https://arxiv.org/abs/1910.07467; Ba, Kiros and Hinton, "Layer
Normalization" (2016), https://arxiv.org/abs/1607.06450.

Legend: T rows, H hidden channels. One program owns one row, so a row's bits never depend on the other rows.
"""

import torch
import triton
import triton.language as tl


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """y[t] = x[t] / sqrt(mean(x[t]^2) + eps) * (offset + weight), computed in float32 and rounded once.

    x_TH: [T, H] float32, float16 or bfloat16; the H values of a row are adjacent, rows may be strided (a slice is fine).
    weight_H: [H], any of these dtypes. Returns [T, H], x's dtype, contiguous.
    Errors: AssertionError when a shape or layout is not as above.
    """
    return _norm(x_TH, None, weight_H, eps, offset)[0]


def rms_norm_reference(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """`rms_norm` in plain torch, on any device."""
    x = x_TH.float()
    y = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * (offset + weight_H.float())
    return y.to(x_TH.dtype)


def add_rms_norm(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(sum), sum) where sum = x + residual, rounded to x's dtype before the norm.

    x_TH, residual_TH: [T, H] of one dtype, layouts as for `rms_norm`. Returns two contiguous [T, H] of that dtype; the
    first has the same bits as `rms_norm(x + residual)`.
    Errors: AssertionError when shapes, dtypes or layouts differ from this.
    """
    assert residual_TH.shape == x_TH.shape and residual_TH.dtype == x_TH.dtype and residual_TH.stride(1) == 1
    y_TH, sum_TH = _norm(x_TH, residual_TH, weight_H, eps, offset)
    return y_TH, sum_TH


def add_rms_norm_reference(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` in plain torch, on any device."""
    sum_TH = x_TH + residual_TH
    return rms_norm_reference(sum_TH, weight_H, eps, offset), sum_TH


def norm_add_rms_norm(
    x_TH: torch.Tensor, first_H: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` of rms_norm(x) with the weight `first_H`, both norms with the same eps and offset, in one launch.

    Layouts, results and errors as for `add_rms_norm`; the bits are those of the two launches.
    """
    assert residual_TH.shape == x_TH.shape and residual_TH.dtype == x_TH.dtype and residual_TH.stride(1) == 1
    return _norm(x_TH, residual_TH, weight_H, eps, offset, first_H=first_H)


def norm_add_rms_norm_reference(
    x_TH: torch.Tensor, first_H: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm_add_rms_norm` in plain torch, on any device."""
    return add_rms_norm_reference(rms_norm_reference(x_TH, first_H, eps, offset), residual_TH, weight_H, eps, offset)


def layer_norm(x_TH: torch.Tensor, weight_H: torch.Tensor | None, bias_H: torch.Tensor | None, eps: float) -> torch.Tensor:
    """y[t] = (x[t] - mean(x[t])) / sqrt(variance(x[t]) + eps) * weight + bias, computed in float32 and rounded once.

    x_TH and the result as for `rms_norm`. weight_H, bias_H: [H], any of its dtypes, or None.
    Errors: AssertionError when a shape or layout is not as above.
    """
    return _norm(x_TH, None, weight_H, eps, bias_H=bias_H, center=True)[0]


def layer_norm_reference(
    x_TH: torch.Tensor, weight_H: torch.Tensor | None, bias_H: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """`layer_norm` in plain torch, on any device."""
    weight, bias = (None if w_H is None else w_H.float() for w_H in (weight_H, bias_H))
    return torch.nn.functional.layer_norm(x_TH.float(), x_TH.shape[1:], weight, bias, eps).to(x_TH.dtype)


def add_layer_norm(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor | None, bias_H: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer_norm(sum), sum) where sum = x + residual, as `add_rms_norm`."""
    assert residual_TH.shape == x_TH.shape and residual_TH.dtype == x_TH.dtype and residual_TH.stride(1) == 1
    return _norm(x_TH, residual_TH, weight_H, eps, bias_H=bias_H, center=True)


def add_layer_norm_reference(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor | None, bias_H: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_layer_norm` in plain torch, on any device."""
    sum_TH = x_TH + residual_TH
    return layer_norm_reference(sum_TH, weight_H, bias_H, eps), sum_TH


def _norm(
    x_TH: torch.Tensor,
    residual_TH: torch.Tensor | None,
    weight_H: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    bias_H: torch.Tensor | None = None,
    center: bool = False,
    first_H: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel. Without a residual the second result is x itself. `first_H`: of a norm before the addition."""
    num_rows, hidden = x_TH.shape
    weights = weight_H, bias_H, first_H
    assert x_TH.stride(1) == 1 and all(w is None or (w.shape == (hidden,) and w.stride(0) == 1) for w in weights)
    y_TH = torch.empty(num_rows, hidden, dtype=x_TH.dtype, device=x_TH.device)
    sum_TH = x_TH if residual_TH is None else torch.empty_like(y_TH)
    other_TH = x_TH if residual_TH is None else residual_TH
    block = triton.next_power_of_2(hidden)
    _norm_kernel[(num_rows,)](
        x_TH, other_TH, *(x_TH if w_H is None else w_H for w_H in (first_H, weight_H, bias_H)), y_TH, sum_TH,
        x_TH.stride(0), other_TH.stride(0), eps, offset,
        HIDDEN=hidden, BLOCK=block, ADD=residual_TH is not None, WEIGHT=weight_H is not None, BIAS=bias_H is not None,
        CENTER=center, FIRST=first_H is not None,
        num_warps=min(16, max(1, block // 512)), enable_fp_fusion=False,
    )  # fmt: skip
    return y_TH, sum_TH


@triton.jit
def _norm_kernel(
    x_ptr, residual_ptr, first_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, x_stride, residual_stride, eps, offset,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, CENTER: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < HIDDEN
    x = tl.load(x_ptr + row * x_stride + channel, mask=inside, other=0.0).to(tl.float32)
    if FIRST:
        x = x * tl.rsqrt(tl.sum(x * x, axis=0) / HIDDEN + eps)
        x = x * (offset + tl.load(first_ptr + channel, mask=inside, other=0.0).to(tl.float32))
        x = x.to(y_ptr.dtype.element_ty).to(tl.float32)  # as a launch of its own would store it
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + channel, mask=inside, other=0.0).to(tl.float32)
        total = (x + residual).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * HIDDEN + channel, total, mask=inside)
        x = total.to(tl.float32)  # the rounded sum, as the next layer reads it
    if CENTER:
        x = tl.where(inside, x - tl.sum(x, axis=0) / HIDDEN, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / HIDDEN + eps)
    if WEIGHT:
        y = y * (offset + tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32))
    if BIAS:
        y = y + tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * HIDDEN + channel, y.to(y_ptr.dtype.element_ty), mask=inside)
