"""Rotary position embedding of queries and keys, in the half-rotation layout (channel e rotates with channel E + e).

Su et al., "RoFormer" (2021), https://arxiv.org/abs/2104.09864; the layout is that of GPT-NeoX and of Llama checkpoints.

Legend: T rows, N query heads, K key heads, D channels of a head, E angles (2 E <= D), P positions in the table.
One program computes one row; no value depends on another row.
"""

import torch
import triton
import triton.language as tl


def apply_rope(
    q_TND: torch.Tensor, k_TKD: torch.Tensor, cos_PE: torch.Tensor, sin_PE: torch.Tensor, positions_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first 2 E channels of every head by the angles of the row's position; copy the other channels.

    q_TND: [T, N, D], k_TKD: [T, K, D], one dtype of float32, float16 or bfloat16; D adjacent, the rest may be strided
    (slices of a packed projection are fine). cos_PE, sin_PE: [P, E] float32, contiguous. positions_T: [T] int64 or int32
    in [0, P), not checked. Returns new contiguous tensors, computed in float32 and rounded once.
    Errors: AssertionError when shapes, dtypes or layouts differ from this.
    """
    num_rows, num_q_heads, head_dim = q_TND.shape
    num_k_heads, num_angles = k_TKD.shape[1], cos_PE.shape[1]
    assert k_TKD.shape == (num_rows, num_k_heads, head_dim) and positions_T.shape == (num_rows,)
    assert q_TND.dtype == k_TKD.dtype and q_TND.stride(2) == k_TKD.stride(2) == 1 and 2 * num_angles <= head_dim
    assert cos_PE.shape == sin_PE.shape and cos_PE.dtype == sin_PE.dtype == torch.float32
    assert cos_PE.is_contiguous() and sin_PE.is_contiguous() and positions_T.stride(0) == 1
    q_out_TND = torch.empty(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
    k_out_TKD = torch.empty(k_TKD.shape, dtype=k_TKD.dtype, device=k_TKD.device)
    _rope_kernel[(num_rows,)](
        q_TND, k_TKD, q_out_TND, k_out_TKD, cos_PE, sin_PE, positions_T, *q_TND.stride()[:2], *k_TKD.stride()[:2],
        Q_HEADS=num_q_heads, K_HEADS=num_k_heads, HEAD_DIM=head_dim, ANGLES=num_angles,
        BLOCK_Q=triton.next_power_of_2(num_q_heads), BLOCK_K=triton.next_power_of_2(num_k_heads),
        BLOCK_E=triton.next_power_of_2(num_angles), BLOCK_REST=triton.next_power_of_2(max(1, head_dim - 2 * num_angles)),
        enable_fp_fusion=False,
    )  # fmt: skip
    return q_out_TND, k_out_TKD


def apply_rope_reference(
    q_TND: torch.Tensor, k_TKD: torch.Tensor, cos_PE: torch.Tensor, sin_PE: torch.Tensor, positions_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply_rope` in plain torch, on any device."""
    num_angles = cos_PE.shape[1]
    cos_T1E, sin_T1E = cos_PE[positions_T].unsqueeze(1), sin_PE[positions_T].unsqueeze(1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second, rest = x.float().split([num_angles, num_angles, x.shape[-1] - 2 * num_angles], dim=-1)
        rotated = [first * cos_T1E - second * sin_T1E, second * cos_T1E + first * sin_T1E, rest]
        return torch.cat(rotated, dim=-1).to(x.dtype)

    return rotate(q_TND), rotate(k_TKD)


@triton.jit
def _rotate(
    x_ptr, out_ptr, head_stride, cos, sin, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ANGLES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Rotate all heads of one row. `x_ptr` and `out_ptr` point to its first value."""
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    angle = tl.arange(0, BLOCK_E)[None, :]
    inside = (head < HEADS) & (angle < ANGLES)
    first_ptr = x_ptr + head * head_stride + angle
    first = tl.load(first_ptr, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(first_ptr + ANGLES, mask=inside, other=0.0).to(tl.float32)
    rotated_ptr = out_ptr + head * HEAD_DIM + angle
    tl.store(rotated_ptr, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(rotated_ptr + ANGLES, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=inside)
    if 2 * ANGLES < HEAD_DIM:
        channel = 2 * ANGLES + tl.arange(0, BLOCK_REST)[None, :]
        inside = (head < HEADS) & (channel < HEAD_DIM)
        rest = tl.load(x_ptr + head * head_stride + channel, mask=inside, other=0.0)
        tl.store(out_ptr + head * HEAD_DIM + channel, rest, mask=inside)


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, positions_ptr, q_stride, q_head_stride, k_stride, k_head_stride,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ANGLES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    angle = tl.arange(0, BLOCK_E)[None, :]
    table = tl.load(positions_ptr + row).to(tl.int64) * ANGLES + angle
    cos = tl.load(cos_ptr + table, mask=angle < ANGLES, other=0.0)
    sin = tl.load(sin_ptr + table, mask=angle < ANGLES, other=0.0)
    q_row_ptr, q_out_row_ptr = q_ptr + row * q_stride, q_out_ptr + row * (Q_HEADS * HEAD_DIM)
    k_row_ptr, k_out_row_ptr = k_ptr + row * k_stride, k_out_ptr + row * (K_HEADS * HEAD_DIM)
    _rotate(q_row_ptr, q_out_row_ptr, q_head_stride, cos, sin, Q_HEADS, HEAD_DIM, ANGLES, BLOCK_Q, BLOCK_E, BLOCK_REST)
    _rotate(k_row_ptr, k_out_row_ptr, k_head_stride, cos, sin, K_HEADS, HEAD_DIM, ANGLES, BLOCK_K, BLOCK_E, BLOCK_REST)
