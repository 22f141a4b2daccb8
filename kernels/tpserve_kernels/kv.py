"""Where a step's new keys and values go: the paged KV cache.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023),
https://arxiv.org/abs/2309.06180.

Legend: T rows, B blocks, S entries a block, K key/value heads, D channels a head. A slot is block * S + entry.
"""

import torch
import triton
import triton.language as tl


def write_kv(
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    k_cache_BSKD: torch.Tensor,
    v_cache_BSKD: torch.Tensor,
    write_slots_T: torch.Tensor,
) -> None:
    """Copy row t into slot write_slots_T[t] of both caches, in place; a negative slot is skipped.

    k_TKD, v_TKD: [T, K, D], the caches' dtype; the K D values of a row are adjacent, rows may be apart.
    k_cache_BSKD, v_cache_BSKD: [B, S, K, D], contiguous. write_slots_T: [T] int64, each below
    B S (not checked), no slot twice.
    Errors: AssertionError when shapes, dtypes or layouts differ from this.
    """
    num_rows, num_heads, head_dim = k_TKD.shape
    width = num_heads * head_dim
    assert v_TKD.shape == k_TKD.shape and write_slots_T.shape == (num_rows,) and write_slots_T.stride(0) == 1
    assert k_cache_BSKD.shape == v_cache_BSKD.shape and k_cache_BSKD.shape[2:] == (num_heads, head_dim)
    assert k_cache_BSKD.is_contiguous() and v_cache_BSKD.is_contiguous()
    assert k_TKD.dtype == v_TKD.dtype == k_cache_BSKD.dtype == v_cache_BSKD.dtype
    assert k_TKD.stride()[1:] == v_TKD.stride()[1:] == (head_dim, 1)
    block = triton.next_power_of_2(width)
    _write_kv_kernel[(num_rows,)](
        k_TKD, v_TKD, k_cache_BSKD, v_cache_BSKD, write_slots_T, k_TKD.stride(0), v_TKD.stride(0),
        WIDTH=width, BLOCK=block, num_warps=min(8, max(1, block // 256)), enable_fp_fusion=False,
    )  # fmt: skip


def write_kv_reference(
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    k_cache_BSKD: torch.Tensor,
    v_cache_BSKD: torch.Tensor,
    write_slots_T: torch.Tensor,
) -> None:
    """`write_kv` in plain torch, on any device."""
    rows = write_slots_T >= 0
    k_cache_BSKD.flatten(0, 1)[write_slots_T[rows]] = k_TKD[rows]
    v_cache_BSKD.flatten(0, 1)[write_slots_T[rows]] = v_TKD[rows]


@triton.jit
def _write_kv_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, k_stride, v_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot >= 0:
        value = tl.arange(0, BLOCK)
        inside = value < WIDTH
        k = tl.load(k_ptr + row * k_stride + value, mask=inside)
        v = tl.load(v_ptr + row * v_stride + value, mask=inside)
        tl.store(k_cache_ptr + slot * WIDTH + value, k, mask=inside)
        tl.store(v_cache_ptr + slot * WIDTH + value, v, mask=inside)
