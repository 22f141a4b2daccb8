"""The grouped matrix product of a mixture of experts: rows sorted by expert, each times the matrix of its expert.

Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts" (2022), https://arxiv.org/abs/2211.15841.

Legend: T tokens, R rows sorted by expert, E experts of this rank, K inner, N outputs. A tile is BLOCK_M rows of one expert by
BLOCK_N outputs. Its shape depends on the dtype alone and the sum over K has one order, so the bits of a row do not depend on the
number of rows of an expert.
"""

import torch
import triton
import triton.language as tl


def grouped_matmul(
    x_TK: torch.Tensor,
    weight_ENK: torch.Tensor,
    ends_E: torch.Tensor,
    bias_EN: torch.Tensor | None = None,
    tokens_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[r] = x[tokens[r]] @ weight[e].T + bias[e] for ends_E[e - 1] <= r < ends_E[e], summed in float32 and rounded once.

    x_TK: [T, K] float32, float16 or bfloat16; the K values of a row are adjacent.
    weight_ENK: [E, N, K], the same dtype, contiguous.
    ends_E: [E] int32, ascending, the last one at most R (not checked); an expert may have no rows.
    bias_EN: [E, N], contiguous, any of these dtypes; None for none.
    tokens_R: [R] int32, contiguous, below T before ends_E[-1] (not checked); None: row r of x, and R is T.
    Returns [R, N], the same dtype, contiguous; rows from ends_E[-1] on are left as they were allocated.
    The host needs to know nothing but shapes, so that it can be captured in a graph.
    Errors: AssertionError when shapes, dtypes or layouts differ from this.
    """
    inner, (num_experts, outputs, weight_inner) = x_TK.shape[1], weight_ENK.shape
    assert weight_inner == inner and x_TK.dtype == weight_ENK.dtype
    assert x_TK.stride(1) == 1 and weight_ENK.is_contiguous()
    assert tokens_R is None or (tokens_R.dim() == 1 and tokens_R.dtype == torch.int32 and tokens_R.is_contiguous())
    assert ends_E.shape == (num_experts,) and ends_E.dtype == torch.int32 and ends_E.is_contiguous()
    assert bias_EN is None or (bias_EN.shape == (num_experts, outputs) and bias_EN.is_contiguous())
    num_rows = len(x_TK if tokens_R is None else tokens_R)
    y_RN = torch.empty(num_rows, outputs, dtype=x_TK.dtype, device=x_TK.device)
    single = x_TK.dtype == torch.float32
    block_m, block_n, block_k = (16, 64, 32) if single else (64, 128, 64)
    # The host does not know the rows per expert: each expert with rows wastes less than one tile.
    most_tiles = num_rows // block_m + min(num_experts, num_rows)
    _grouped_kernel[(triton.cdiv(outputs, block_n), most_tiles)](
        x_TK, weight_ENK, ends_E, weight_ENK if bias_EN is None else bias_EN, ends_E if tokens_R is None else tokens_R, y_RN,
        x_TK.stride(0), outputs, inner, BIASED=bias_EN is not None, GATHER=tokens_R is not None, NUM_EXPERTS=num_experts,
        EXPERTS_BLOCK=triton.next_power_of_2(num_experts), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=4, num_stages=2 if single else 4, enable_fp_fusion=False,
        # Triton's interpreter multiplies the bit patterns of bfloat16 as if they were integers.
        WIDEN=x_TK.dtype == torch.bfloat16 and not isinstance(_grouped_kernel, triton.JITFunction),
    )  # fmt: skip
    return y_RN


def grouped_matmul_reference(
    x_TK: torch.Tensor,
    weight_ENK: torch.Tensor,
    ends_E: torch.Tensor,
    bias_EN: torch.Tensor | None = None,
    tokens_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """`grouped_matmul` in plain torch, on any device; rows from ends_E[-1] on are zero."""
    y_RN = x_TK.new_zeros(len(x_TK if tokens_R is None else tokens_R), weight_ENK.shape[1])
    start = 0
    for e, (weight_NK, end) in enumerate(zip(weight_ENK, ends_E.tolist(), strict=True)):
        bias_N = 0.0 if bias_EN is None else bias_EN[e].float()
        x_K = x_TK[start:end] if tokens_R is None else x_TK[tokens_R[start:end]]
        y_RN[start:end] = (x_K.float() @ weight_NK.float().T + bias_N).to(x_TK.dtype)
        start = end
    return y_RN


@triton.jit
def _grouped_kernel(
    x_ptr, weight_ptr, ends_ptr, bias_ptr, tokens_ptr, y_ptr, x_stride, outputs, inner,
    BIASED: tl.constexpr, GATHER: tl.constexpr, NUM_EXPERTS: tl.constexpr, EXPERTS_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One program per tile. Tiles are numbered expert by expert; those past the last tile do nothing."""
    # Find the expert of this tile: `tile_ends` is the running count of tiles, each expert's included.
    tile = tl.program_id(1)
    experts = tl.arange(0, EXPERTS_BLOCK)
    known = experts < NUM_EXPERTS
    starts = tl.load(ends_ptr + experts - 1, mask=known & (experts > 0), other=0)
    ends = tl.load(ends_ptr + experts, mask=known, other=0)
    tiles = tl.where(known, (ends - starts + BLOCK_M - 1) // BLOCK_M, 0)
    tile_ends = tl.cumsum(tiles, 0)
    expert = tl.sum((tile_ends <= tile).to(tl.int32), 0)
    if expert < NUM_EXPERTS:
        selected = experts == expert
        first_tile = tl.sum(tl.where(selected, tile_ends - tiles, 0), 0)
        start = tl.sum(tl.where(selected, starts, 0), 0)
        end = tl.sum(tl.where(selected, ends, 0), 0)
        row = start + (tile - first_tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        row_inside, output_inside = row < end, output < outputs
        source = tl.load(tokens_ptr + row, mask=row_inside, other=0) if GATHER else row
        x_row_ptr = x_ptr + source.to(tl.int64)[:, None] * x_stride
        weight_row_ptr = weight_ptr + (expert.to(tl.int64) * outputs + output)[None, :] * inner
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for at in range(0, inner, BLOCK_K):
            k = at + tl.arange(0, BLOCK_K)
            x = tl.load(x_row_ptr + k[None, :], mask=row_inside[:, None] & (k < inner)[None, :], other=0.0)
            weight = tl.load(weight_row_ptr + k[:, None], mask=output_inside[None, :] & (k < inner)[:, None], other=0.0)
            if WIDEN:
                x, weight = x.to(tl.float32), weight.to(tl.float32)
            total = tl.dot(x, weight, total, input_precision="ieee")
        if BIASED:
            bias = tl.load(bias_ptr + expert.to(tl.int64) * outputs + output, mask=output_inside, other=0.0).to(tl.float32)
            total += bias[None, :]
        y = total.to(y_ptr.dtype.element_ty)
        tl.store(
            y_ptr + row.to(tl.int64)[:, None] * outputs + output[None, :], y, mask=row_inside[:, None] & output_inside[None, :]
        )
