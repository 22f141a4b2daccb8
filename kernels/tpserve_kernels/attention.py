"""Causal attention over a paged KV cache: prefill, chunked prefill and decode are one kernel (`attention_walk`).

Kwon et al., "PagedAttention" (2023), https://arxiv.org/abs/2309.06180, for the block tables; Dao et al., "Flash-Decoding"
(2023), for splitting the context; DeepSeek-AI, "DeepSeek-V2" (2024), https://arxiv.org/abs/2405.04434, for values that are a
part of their keys; Gemma Team, "Gemma 2" (2024), https://arxiv.org/abs/2408.00118, for the cap; Xiao et al., "Efficient
Streaming Language Models with Attention Sinks" (2023), https://arxiv.org/abs/2309.17453, for sinks, here learned scores.

Legend: T rows of the step, R requests, N query heads, K key/value heads, D channels of a key, E of a value, B blocks (in
`tables`: of the widest row), S entries per block, C context segments.

Invariant: the bits of a row depend only on its own query and on the part of its context that it sees: not on the other rows,
the chunking, the page size, or the split of the context over programs. Therefore

  - a context is divided, from position 0, into segments of SEGMENT positions, and a segment into tiles of `Tile.n`;
  - within a segment tiles are processed in order from an empty state; segments are merged in order, only by `_merge`; a tile
    or segment in which a row sees nothing does not change its state;
  - `Tile` is a function of head size and dtype, never of T, R or a length: decode and prefill rows use one tile shape;
  - there are no atomics and no fused multiply-adds, so the same source in two kernels is the same arithmetic.

So the split affects speed only. Without it a program processes all segments of its rows and merges them. With it (few rows, long
context) a program computes one segment, and `merge_kernel` merges them.
"""

import math
from dataclasses import dataclass

import torch
import triton

from tpserve_kernels.attention_walk import attention_kernel, merge_kernel

SEGMENT = 512
"""Positions per segment: long enough that merging is cheap, short enough that one long request fills a GPU."""

MAX_PARTIAL_BYTES = 64 << 20
"""The split stores one float32 vector per (row, head, segment). Above this size there are enough programs without a split."""


@dataclass(frozen=True)
class Tile:
    """The tile of one step of the online softmax, the same for every row of a model."""

    m: int
    """query rows: as many tokens as fit, times the query heads of a key head (or a part of those heads)"""
    n: int
    """context positions; divides SEGMENT"""
    num_warps: int
    num_stages: int


def tile_of(v_dim: int, dtype: torch.dtype) -> Tile:
    """The tile for values of `v_dim` channels. 64 rows feed Hopper's warp-group matrix units and keep decode memory-bound."""
    if dtype == torch.float32:  # exact products, no matrix units: small tiles that stay in registers
        return Tile(m=16, n=32 if v_dim <= 256 else 16, num_warps=8, num_stages=2)
    if v_dim > 256:  # latents: the accumulator takes half the registers, the queries a third of the shared memory
        return Tile(m=64, n=32, num_warps=8, num_stages=2)
    large = v_dim > 128
    return Tile(m=64, n=64, num_warps=8 if large else 4, num_stages=2 if large else 3)


def paged_attention(
    q_TND: torch.Tensor,
    k_cache_BSKD: torch.Tensor,
    v_cache_BSKE: torch.Tensor,
    tables_RB: torch.Tensor,
    query_starts_R1: torch.Tensor,
    context_lens_R: torch.Tensor,
    max_query_len: int,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    sinks_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale q K^T) V for every row, over the positions of its own request up to its own: [T, N, E].

    Request r owns rows [query_starts[r], query_starts[r + 1]), any number of them, none included; its row j is at position
    context_len - query_len + j. Position p lies in block tables[r, p // S], entry p % S; its key and value are already written.

    window: a row at position p sees (p - window, p] only; what no row sees is never read. cap: a score s becomes
    cap tanh(s / cap) first. sinks_N: [N] float32, one more score in each head's softmax, whose value is zero.

    q_TND: [T, N, D]; caches [B, S, K, D] and [B, S, K, E], alike in strides, S a multiple of 16; all float32, float16 or
    bfloat16, channels adjacent and multiples of 16. E is D, up to 256; or the value cache is a view of the first E channels of
    the key cache, E up to 512 and D - E up to 64: then each is read once. N is a multiple of K, and query heads
    [g N / K, (g + 1) N / K) share key head g. tables_RB, query_starts_R1 ([R + 1]) and context_lens_R: int32, contiguous.
    max_query_len: a host number no query length exceeds. scale, window and cap: positive. Returns contiguous values of q's
    dtype, accumulated in float32; rows of no request are undefined. Reads nothing back from the device, so that it can be
    captured in a graph.
    Errors: AssertionError when shapes, dtypes or layouts differ from this.
    """
    _assert_contract(q_TND, k_cache_BSKD, v_cache_BSKE, tables_RB, query_starts_R1, context_lens_R, sinks_N)
    assert scale > 0 and max_query_len >= 1 and (window is None or window > 0) and (cap is None or cap > 0)
    (num_rows, num_heads, k_dim), (_, page, num_kv_heads, v_dim) = q_TND.shape, v_cache_BSKE.shape
    num_requests, table_width = tables_RB.shape
    group = num_heads // num_kv_heads
    tile = tile_of(v_dim, q_TND.dtype)
    parts = triton.cdiv(group, tile.m)
    share = triton.cdiv(group, parts)  # query heads of a tile
    tokens_a_tile = tile.m // share
    one_tile = max_query_len <= tokens_a_tile
    longest = table_width * page if window is None else min(table_width * page, window + max_query_len - 1)
    num_segments = triton.cdiv(longest, SEGMENT) if window is None else (longest + SEGMENT - 2) // SEGMENT + 1
    pairs = (num_rows, num_heads, num_segments)
    split = one_tile and longest > SEGMENT and 4 * math.prod(pairs) * (v_dim + 2) <= MAX_PARTIAL_BYTES

    out_TNE = torch.empty(num_rows, num_heads, v_dim, dtype=q_TND.dtype, device=q_TND.device)
    partial_TNCE = torch.empty(*pairs, v_dim, dtype=torch.float32, device=q_TND.device) if split else out_TNE
    state_TNC2 = torch.empty(*pairs, 2, dtype=torch.float32, device=q_TND.device) if split else out_TNE
    sinks = out_TNE if sinks_N is None else sinks_N
    of_model = {
        "HEADS": num_heads, "HEAD_DIM": v_dim, "BLOCK_D": triton.next_power_of_2(v_dim), "WINDOW": window or 0,
        "SINKS": sinks_N is not None, "SEGMENT": SEGMENT,
    }  # fmt: skip
    # Request r has the tiles [starts[r] // tokens + r, starts[r + 1] // tokens + r + 1): enough for any lengths.
    num_tiles = num_requests if one_tile else num_rows // tokens_a_tile + num_requests
    attention_kernel[(num_tiles, num_kv_heads * parts, num_segments if split else 1)](
        q_TND, k_cache_BSKD, v_cache_BSKE, tables_RB, query_starts_R1, context_lens_R, sinks, out_TNE, partial_TNCE, state_TNC2,
        num_requests, table_width, math.log2(math.e) * scale * (2 / cap if cap else 1), math.log2(math.e) * (cap or 0),
        *q_TND.stride()[:2], *k_cache_BSKD.stride()[:3],
        **of_model, GROUP=group, SHARE=share, TAIL=k_dim - v_dim, BLOCK_TAIL=max(16, triton.next_power_of_2(k_dim - v_dim)),
        V_IN_K=k_cache_BSKD.data_ptr() == v_cache_BSKE.data_ptr(), CAP=cap is not None, PAGE=page,
        BLOCK_M=tile.m, BLOCK_N=tile.n, ONE_TILE=one_tile, SPLIT=split,
        # Triton's interpreter multiplies the bit patterns of bfloat16 as if they were integers.
        WIDEN=q_TND.dtype == torch.bfloat16 and not isinstance(attention_kernel, triton.JITFunction),
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    if split:
        merge_kernel[(num_requests, num_heads, max_query_len)](
            partial_TNCE, state_TNC2, query_starts_R1, context_lens_R, sinks, out_TNE, num_segments,
            **of_model, num_warps=1, num_stages=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out_TNE


def _assert_contract(
    q_TND: torch.Tensor,
    k_cache_BSKD: torch.Tensor,
    v_cache_BSKE: torch.Tensor,
    tables_RB: torch.Tensor,
    query_starts_R1: torch.Tensor,
    context_lens_R: torch.Tensor,
    sinks_N: torch.Tensor | None,
) -> None:
    """AssertionError for inputs that violate the contract of `paged_attention`."""
    _, num_heads, k_dim = q_TND.shape
    _, page, num_kv_heads, v_dim = v_cache_BSKE.shape
    num_requests, _ = tables_RB.shape
    assert k_cache_BSKD.shape == (*v_cache_BSKE.shape[:3], k_dim) and k_cache_BSKD.stride() == v_cache_BSKE.stride()
    if k_cache_BSKD.data_ptr() == v_cache_BSKE.data_ptr():
        assert 16 <= v_dim <= 512 and v_dim <= k_dim <= v_dim + 64
    else:
        assert 16 <= v_dim <= 256 and v_dim == k_dim
    assert k_dim % 16 == v_dim % 16 == 0 and page % 16 == 0 and num_heads % num_kv_heads == 0
    assert q_TND.dtype == k_cache_BSKD.dtype == v_cache_BSKE.dtype
    assert q_TND.stride(2) == k_cache_BSKD.stride(3) == 1
    assert query_starts_R1.shape == (num_requests + 1,) and context_lens_R.shape == (num_requests,)
    assert tables_RB.dtype == query_starts_R1.dtype == context_lens_R.dtype == torch.int32
    assert tables_RB.is_contiguous() and query_starts_R1.is_contiguous() and context_lens_R.is_contiguous()
    if sinks_N is not None:
        assert sinks_N.shape == (num_heads,) and sinks_N.dtype == torch.float32 and sinks_N.is_contiguous()


def paged_attention_reference(
    q_TND: torch.Tensor,
    k_cache_BSKD: torch.Tensor,
    v_cache_BSKE: torch.Tensor,
    tables_RB: torch.Tensor,
    query_starts_R1: torch.Tensor,
    context_lens_R: torch.Tensor,
    max_query_len: int,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    sinks_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """`paged_attention` in plain torch, one request after the other, on any device."""
    (num_rows, num_heads, _), (page, num_kv_heads, v_dim) = q_TND.shape, v_cache_BSKE.shape[1:]
    out_TNE = torch.zeros(num_rows, num_heads, v_dim, dtype=q_TND.dtype, device=q_TND.device)
    starts = query_starts_R1.tolist()
    for table_B, context, start, end in zip(tables_RB, context_lens_R.tolist(), starts[:-1], starts[1:], strict=True):
        assert end - start <= max_query_len
        if start == end:
            continue
        row_J1 = torch.arange(context - (end - start), context, device=q_TND.device)[:, None]
        position_P = torch.arange(max(0, int(row_J1[0]) + 1 - window) if window else 0, context, device=q_TND.device)
        block_P, entry_P = table_B[position_P // page].long(), position_P % page
        k_NPD, v_NPE = (
            cache[block_P, entry_P].transpose(0, 1).repeat_interleave(num_heads // num_kv_heads, dim=0).float()
            for cache in (k_cache_BSKD, v_cache_BSKE)
        )
        scores_NJP = scale * q_TND[start:end].transpose(0, 1).float() @ k_NPD.transpose(1, 2)
        if cap is not None:
            scores_NJP = cap * torch.tanh(scores_NJP / cap)
        hidden_JP = (position_P > row_J1) | (position_P <= row_J1 - (window or context))
        scores_NJP = scores_NJP.masked_fill(hidden_JP, -math.inf)
        if sinks_N is not None:
            scores_NJP = torch.cat([sinks_N[:, None, None].expand(-1, end - start, 1), scores_NJP], dim=-1)
        weights_NJP = scores_NJP.softmax(dim=-1)[..., -len(position_P) :]
        out_TNE[start:end] = (weights_NJP @ v_NPE).transpose(0, 1).to(q_TND.dtype)
    return out_TNE
