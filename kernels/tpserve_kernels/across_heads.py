"""Root-mean-square norm over all query heads together, and over all key heads together, heads of other ranks included.

Groeneveld et al., "OLMo 2" (2024), https://arxiv.org/abs/2501.00656. Two launches: the sums of squares, which the caller adds up
over ranks, and the scaling.

Legend: T rows, Q channels of this rank's query heads, K of its key heads. One program computes one side of one row.
"""

import torch
import triton
import triton.language as tl


def squares(q_TQ: torch.Tensor, k_TK: torch.Tensor) -> torch.Tensor:
    """The sums of squares of each row of `q` and of `k`: float32 [T, 2].

    q_TQ: [T, Q], k_TK: [T, K], one dtype of float32, float16 or bfloat16; channels adjacent, rows may be strided.
    Errors: AssertionError when shapes, dtypes or layouts differ from this.
    """
    block = _block(q_TQ, k_TK)
    sums_T2 = torch.empty(len(q_TQ), 2, dtype=torch.float32, device=q_TQ.device)
    _squares_kernel[(len(q_TQ), 2)](
        q_TQ, k_TK, sums_T2, q_TQ.stride(0), k_TK.stride(0), Q_WIDTH=q_TQ.shape[1], K_WIDTH=k_TK.shape[1], BLOCK=block,
        num_warps=min(16, max(1, block // 512)), enable_fp_fusion=False,
    )  # fmt: skip
    return sums_T2


def squares_reference(q_TQ: torch.Tensor, k_TK: torch.Tensor) -> torch.Tensor:
    """`squares` in plain torch, on any device."""
    return torch.stack((q_TQ.float().square().sum(1), k_TK.float().square().sum(1)), dim=1)


def scale(
    q_TQ: torch.Tensor,
    k_TK: torch.Tensor,
    sums_T2: torch.Tensor,
    q_weight_Q: torch.Tensor,
    k_weight_K: torch.Tensor,
    counts: tuple[int, int],
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x / sqrt(sum / count + eps) * weight of both, computed in float32 and rounded once: contiguous, in their dtype.

    q_TQ, k_TK: as for `squares`. sums_T2: float32 [T, 2], contiguous. `counts`: the channels that the sums are over. The weights:
    [Q] and [K], contiguous.
    Errors: AssertionError when shapes, dtypes or layouts differ from this.
    """
    block = _block(q_TQ, k_TK)
    assert sums_T2.shape == (len(q_TQ), 2) and sums_T2.is_contiguous() and sums_T2.dtype == torch.float32
    assert q_weight_Q.shape == q_TQ.shape[1:] and k_weight_K.shape == k_TK.shape[1:]
    q_out_TQ, k_out_TK = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_TQ, k_TK))
    _scale_kernel[(len(q_TQ), 2)](
        q_TQ, k_TK, sums_T2, q_weight_Q, k_weight_K, q_out_TQ, k_out_TK, q_TQ.stride(0), k_TK.stride(0), eps,
        Q_WIDTH=q_TQ.shape[1], K_WIDTH=k_TK.shape[1], Q_COUNT=counts[0], K_COUNT=counts[1], BLOCK=block,
        num_warps=min(16, max(1, block // 512)), enable_fp_fusion=False,
    )  # fmt: skip
    return q_out_TQ, k_out_TK


def scale_reference(
    q_TQ: torch.Tensor,
    k_TK: torch.Tensor,
    sums_T2: torch.Tensor,
    q_weight_Q: torch.Tensor,
    k_weight_K: torch.Tensor,
    counts: tuple[int, int],
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scale` in plain torch, on any device."""
    q, k = (
        (x.float() * (sums_T2[:, side] / count + eps).rsqrt()[:, None] * weight.float()).to(x.dtype)
        for side, (x, weight, count) in enumerate(zip((q_TQ, k_TK), (q_weight_Q, k_weight_K), counts, strict=True))
    )
    return q, k


def _block(q_TQ: torch.Tensor, k_TK: torch.Tensor) -> int:
    assert len(q_TQ) == len(k_TK) and q_TQ.dtype == k_TK.dtype and q_TQ.stride(1) == k_TK.stride(1) == 1
    return int(triton.next_power_of_2(max(q_TQ.shape[1], k_TK.shape[1])))


@triton.jit
def _squares_kernel(
    q_ptr, k_ptr, sums_ptr, q_stride, k_stride, Q_WIDTH: tl.constexpr, K_WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of squares of one side of one row."""
    row, side = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, BLOCK)
    if side == 0:
        x = tl.load(q_ptr + row * q_stride + channel, mask=channel < Q_WIDTH, other=0.0).to(tl.float32)
        tl.store(sums_ptr + row * 2, tl.sum(x * x, axis=0))
    else:
        x = tl.load(k_ptr + row * k_stride + channel, mask=channel < K_WIDTH, other=0.0).to(tl.float32)
        tl.store(sums_ptr + row * 2 + 1, tl.sum(x * x, axis=0))


@triton.jit
def _scaled(x_ptr, weight_ptr, y_ptr, sum_of_squares, eps, WIDTH: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Scale one row."""
    channel = tl.arange(0, BLOCK)
    inside = channel < WIDTH
    x = tl.load(x_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(sum_of_squares / COUNT + eps) * weight
    tl.store(y_ptr + channel, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scale_kernel(
    q_ptr, k_ptr, sums_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr, q_stride, k_stride, eps,
    Q_WIDTH: tl.constexpr, K_WIDTH: tl.constexpr, Q_COUNT: tl.constexpr, K_COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One side of one row."""
    row, side = tl.program_id(0).to(tl.int64), tl.program_id(1)
    total = tl.load(sums_ptr + row * 2 + side)
    if side == 0:
        _scaled(q_ptr + row * q_stride, q_weight_ptr, q_out_ptr + row * Q_WIDTH, total, eps, Q_WIDTH, Q_COUNT, BLOCK)
    else:
        _scaled(k_ptr + row * k_stride, k_weight_ptr, k_out_ptr + row * K_WIDTH, total, eps, K_WIDTH, K_COUNT, BLOCK)
