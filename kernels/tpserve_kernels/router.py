"""The router's product of a mixture of experts, in float32 whatever the dtype of the activations.

Shazeer et al., "Outrageously Large Neural Networks" (2017), https://arxiv.org/abs/1701.06538.

Legend: T rows, H hidden channels, C segments of SEGMENT channels, N outputs (experts, then the shared expert's gate if any).

Few rows leave a GPU idle, so a program sums up one segment of the channels; whoever reads the logits (`routing.route`) adds up
the segments in order. Tiles, segments and the order of the sums follow from H and N alone, so a row's bits are its own.
"""

import torch
import triton
import triton.language as tl

SEGMENT = 512
"""Channels per program."""


def router_logits(x_TH: torch.Tensor, weight_NH: torch.Tensor) -> torch.Tensor:
    """The terms of x @ weight.T of each segment of channels: float32 [C, T, N]; their sum over C, in order, is the product.

    Products are exact where the numbers of the weight have at most 22 significant bits (those of 16-bit checkpoints have),
    else within 2^-22 of their size; sums are float32.

    x_TH: [T, H] float32, float16 or bfloat16; the H values of a row are adjacent. weight_NH: [N, H] float32, contiguous.
    Errors: AssertionError when shapes, dtypes or layouts differ from this.
    """
    (num_rows, hidden), outputs = x_TH.shape, len(weight_NH)
    assert weight_NH.shape == (outputs, hidden) and weight_NH.dtype == torch.float32 and weight_NH.is_contiguous()
    assert x_TH.stride(1) == 1
    num_segments = triton.cdiv(hidden, SEGMENT)
    terms_CTN = torch.empty(num_segments, num_rows, outputs, dtype=torch.float32, device=x_TH.device)
    block_m, block_n = 32, 16
    _router_kernel[(triton.cdiv(outputs, block_n), triton.cdiv(num_rows, block_m), num_segments)](
        x_TH, weight_NH, terms_CTN, num_rows, x_TH.stride(0), outputs, HIDDEN=hidden, SEGMENT=min(SEGMENT, hidden),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=64, num_warps=4, num_stages=4, enable_fp_fusion=False,
    )  # fmt: skip
    return terms_CTN


def router_logits_reference(x_TH: torch.Tensor, weight_NH: torch.Tensor) -> torch.Tensor:
    """`router_logits` in plain torch, on any device."""
    segments = zip(x_TH.float().split(SEGMENT, dim=1), weight_NH.split(SEGMENT, dim=1), strict=True)
    return torch.stack([x_TK @ weight_NK.T for x_TK, weight_NK in segments])


@triton.jit(do_not_specialize=["num_rows"])
def _router_kernel(
    x_ptr, weight_ptr, terms_ptr, num_rows, x_stride, outputs,
    HIDDEN: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_M rows, BLOCK_N outputs and segment."""
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    segment = tl.program_id(2)
    row_inside, output_inside = row < num_rows, output < outputs
    x_row_ptr = x_ptr + row.to(tl.int64)[:, None] * x_stride
    weight_row_ptr = weight_ptr + output[None, :] * HIDDEN
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for at in range(0, SEGMENT, BLOCK_K):
        k = segment * SEGMENT + at + tl.arange(0, BLOCK_K)
        inside = k < HIDDEN
        x = tl.load(x_row_ptr + k[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0).to(tl.float32)
        weight = tl.load(weight_row_ptr + k[:, None], mask=output_inside[None, :] & inside[:, None], other=0.0)
        # On matrix units: a number of 16 bits is one of TF32 already, a weight is split into two.
        total = tl.dot(x, weight, total, input_precision="tf32x3")
    terms_row_ptr = terms_ptr + (segment.to(tl.int64) * num_rows + row)[:, None] * outputs
    tl.store(terms_row_ptr + output[None, :], total, mask=row_inside[:, None] & output_inside[None, :])
