"""Writes of a step's new keys and values to the paged KV cache.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023),
https://arxiv.org/abs/2309.06180.

Legend: T rows, B blocks, S entries per block, K key/value heads, D channels of a key, E of a value. A slot is block * S + entry.
"""

import torch
import triton
import triton.language as tl


def write_kv(
    k_TKD: torch.Tensor,
    v_TKE: torch.Tensor | None,
    k_cache_BSKD: torch.Tensor,
    v_cache_BSKE: torch.Tensor,
    write_slots_T: torch.Tensor,
) -> None:
    """Copy row t to slot write_slots_T[t] of both caches, in place. Negative slots are skipped.

    k_TKD: [T, K, D] and v_TKE: [T, K, E], the dtype of the caches; the values of a row are adjacent, rows may be strided.
    v_TKE is None when the value cache is a view of the key cache: only keys are written.
    k_cache_BSKD: [B, S, K, D] and (unless v_TKE is None) v_cache_BSKE: [B, S, K, E], contiguous.
    write_slots_T: [T] int64, each below B S (not checked), no slot twice.
    Errors: AssertionError when shapes, dtypes or layouts differ from this.
    """
    num_rows = len(k_TKD)
    assert write_slots_T.shape == (num_rows,) and write_slots_T.stride(0) == 1
    sides = [(k_TKD, k_cache_BSKD)] if v_TKE is None else [(k_TKD, k_cache_BSKD), (v_TKE, v_cache_BSKE)]
    for rows, cache in sides:
        assert rows.shape == (num_rows, *cache.shape[2:]) and rows.stride()[1:] == (cache.shape[3], 1)
        assert cache.is_contiguous() and cache.shape[:3] == k_cache_BSKD.shape[:3] and rows.dtype == cache.dtype == k_TKD.dtype
    k_width, v_width = (cache.shape[2] * cache.shape[3] for cache in (k_cache_BSKD, v_cache_BSKE))
    block = triton.next_power_of_2(max(k_width, v_width))
    v = k_TKD if v_TKE is None else v_TKE
    _write_kv_kernel[(num_rows,)](
        k_TKD, v, k_cache_BSKD, v_cache_BSKE, write_slots_T, k_TKD.stride(0), v.stride(0), K_WIDTH=k_width, V_WIDTH=v_width,
        V_IN_K=v_TKE is None, BLOCK=block, num_warps=min(8, max(1, block // 256)), enable_fp_fusion=False,
    )  # fmt: skip


def write_kv_reference(
    k_TKD: torch.Tensor,
    v_TKE: torch.Tensor | None,
    k_cache_BSKD: torch.Tensor,
    v_cache_BSKE: torch.Tensor,
    write_slots_T: torch.Tensor,
) -> None:
    """`write_kv` in plain torch, on any device."""
    rows = write_slots_T >= 0
    k_cache_BSKD.flatten(0, 1)[write_slots_T[rows]] = k_TKD[rows]
    if v_TKE is not None:
        v_cache_BSKE.flatten(0, 1)[write_slots_T[rows]] = v_TKE[rows]


@triton.jit
def _write_kv_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, k_stride, v_stride,
    K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, V_IN_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot >= 0:
        value = tl.arange(0, BLOCK)
        k = tl.load(k_ptr + row * k_stride + value, mask=value < K_WIDTH)
        if not V_IN_K:
            v = tl.load(v_ptr + row * v_stride + value, mask=value < V_WIDTH)
            tl.store(v_cache_ptr + slot * V_WIDTH + value, v, mask=value < V_WIDTH)
        tl.store(k_cache_ptr + slot * K_WIDTH + value, k, mask=value < K_WIDTH)
