"""Causal attention over a paged KV cache: prefill, chunked prefill and decode are one kernel.

Dao et al., "FlashAttention" (2022), https://arxiv.org/abs/2205.14135, for the online softmax; Kwon et al., "PagedAttention"
(2023), https://arxiv.org/abs/2309.06180, for the block tables; Dao et al., "Flash-Decoding" (2023), for splitting the context.

Legend: T rows of the step, R requests, N query heads, K key/value heads, D channels a head, B blocks (in `tables`: the
widest row), S entries a block, C context segments.

Invariant: a row's bits depend on its own query and its own context only: not on the other rows, on the chunking, on
the page size or on whether the context was split over programs. Hence

  - a request's context is cut, from position 0, into segments of SEGMENT positions and those into tiles of `Tile.n`;
  - within a segment tiles run in order from a fresh state; segments are merged in order, by `_merge` and nothing else;
  - `Tile` is a function of head size and dtype, never of T, R or a length; a decode row rides in the same tile shape as
    a prefill row;
  - no atomics, and multiply-adds are left unfused, so that the same source in two kernels is the same arithmetic.

So the split is a matter of speed alone. Whole: a program walks all segments of its rows, merging as it goes. Split (few
rows, long context): a program takes one segment, and `_merge_kernel` merges what they left.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

SEGMENT = 512
"""Positions a segment: long enough that merging is cheap, short enough that one long request fills a card."""

MAX_PARTIAL_BYTES = 64 << 20
"""The split form leaves one float32 row per (row, head, segment); above this the whole form has programs enough."""


@dataclass(frozen=True)
class Tile:
    """The shape of one step of the online softmax, the same for every row of a model."""

    m: int
    """query rows: as many tokens as fit, times the query heads that share a key head"""
    n: int
    """context positions; divides SEGMENT"""
    num_warps: int
    num_stages: int


def tile_of(head_dim: int, group: int, dtype: torch.dtype) -> Tile:
    """64 rows feed Hopper's warp-group matrix units, and keep a decode row bound by memory: 64 operations a byte."""
    if dtype == torch.float32:  # exact products, no matrix units: small tiles that stay in registers
        return Tile(m=max(16, triton.next_power_of_2(group)), n=32, num_warps=8, num_stages=2)
    large = head_dim > 128
    return Tile(m=max(64, triton.next_power_of_2(group)), n=64, num_warps=8 if large else 4, num_stages=2 if large else 3)


def paged_attention(
    q_TND: torch.Tensor,
    k_cache_BSKD: torch.Tensor,
    v_cache_BSKD: torch.Tensor,
    tables_RB: torch.Tensor,
    query_starts_R1: torch.Tensor,
    context_lens_R: torch.Tensor,
    max_query_len: int,
    scale: float,
) -> torch.Tensor:
    """softmax(scale q K^T) V for every row, over the positions of its own request up to its own.

    Request r owns rows [query_starts[r], query_starts[r + 1]), any number of them, none included; its row j is at position
    context_len - query_len + j. Position p lies in block tables[r, p // S], entry p % S; its key and value are already written.

    q_TND: [T, N, D]; caches [B, S, K, D], alike in strides, S a multiple of 16; all float32, float16 or bfloat16, D adjacent and
    a multiple of 16 up to 256. N is a multiple of K, and query heads [g N / K, (g + 1) N / K) share key head g. tables_RB,
    query_starts_R1 ([R + 1]) and context_lens_R: int32, contiguous. max_query_len: a host number no query length exceeds.
    scale: positive. Returns [T, N, D], contiguous, q's dtype, accumulated in float32; rows of no request are undefined.
    Reads nothing back from the device, so that it can be captured in a graph.
    Errors: AssertionError when shapes, dtypes or layouts differ from this.
    """
    _assert_contract(q_TND, k_cache_BSKD, v_cache_BSKD, tables_RB, query_starts_R1, context_lens_R)
    assert scale > 0 and max_query_len >= 1
    num_rows, num_heads, head_dim = q_TND.shape
    _, page, num_kv_heads, _ = k_cache_BSKD.shape
    num_requests, table_width = tables_RB.shape
    group = num_heads // num_kv_heads
    tile = tile_of(head_dim, group, q_TND.dtype)
    tokens_a_tile = tile.m // group
    one_tile = max_query_len <= tokens_a_tile
    num_segments = triton.cdiv(table_width * page, SEGMENT)
    pairs = (num_rows, num_heads, num_segments)
    split = one_tile and num_segments > 1 and 4 * math.prod(pairs) * (head_dim + 2) <= MAX_PARTIAL_BYTES

    out_TND = torch.empty(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
    partial_TNCD = torch.empty(*pairs, head_dim, dtype=torch.float32, device=q_TND.device) if split else out_TND
    state_TNC2 = torch.empty(*pairs, 2, dtype=torch.float32, device=q_TND.device) if split else out_TND
    # Of many tiles, request r is given [starts[r] // tokens + r, starts[r + 1] // tokens + r + 1): enough for any lengths.
    num_tiles = num_requests if one_tile else num_rows // tokens_a_tile + num_requests
    _attention_kernel[(num_tiles, num_kv_heads, num_segments if split else 1)](
        q_TND, k_cache_BSKD, v_cache_BSKD, tables_RB, query_starts_R1, context_lens_R, out_TND, partial_TNCD, state_TNC2,
        num_requests, table_width, scale * math.log2(math.e), *q_TND.stride()[:2], *k_cache_BSKD.stride()[:3],
        HEADS=num_heads, GROUP=group, HEAD_DIM=head_dim, PAGE=page, SEGMENT=SEGMENT, BLOCK_M=tile.m, BLOCK_N=tile.n,
        BLOCK_D=triton.next_power_of_2(head_dim), ONE_TILE=one_tile, SPLIT=split,
        # Triton's interpreter multiplies the bit patterns of bfloat16 as if they were integers.
        WIDEN=q_TND.dtype == torch.bfloat16 and not isinstance(_attention_kernel, triton.JITFunction),
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    if split:
        _merge_kernel[(num_requests, num_heads, max_query_len)](
            partial_TNCD, state_TNC2, query_starts_R1, context_lens_R, out_TND, num_segments,
            HEADS=num_heads, HEAD_DIM=head_dim, SEGMENT=SEGMENT, BLOCK_D=triton.next_power_of_2(head_dim),
            num_warps=1, num_stages=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out_TND


def _assert_contract(
    q_TND: torch.Tensor,
    k_cache_BSKD: torch.Tensor,
    v_cache_BSKD: torch.Tensor,
    tables_RB: torch.Tensor,
    query_starts_R1: torch.Tensor,
    context_lens_R: torch.Tensor,
) -> None:
    """What `paged_attention` promises to refuse."""
    _, num_heads, head_dim = q_TND.shape
    _, page, num_kv_heads, _ = k_cache_BSKD.shape
    num_requests, _ = tables_RB.shape
    assert k_cache_BSKD.shape == v_cache_BSKD.shape and k_cache_BSKD.stride() == v_cache_BSKD.stride()
    assert k_cache_BSKD.shape[3] == head_dim and q_TND.dtype == k_cache_BSKD.dtype == v_cache_BSKD.dtype
    assert 16 <= head_dim <= 256 and head_dim % 16 == 0 and page % 16 == 0 and num_heads % num_kv_heads == 0
    assert q_TND.stride(2) == k_cache_BSKD.stride(3) == 1
    assert query_starts_R1.shape == (num_requests + 1,) and context_lens_R.shape == (num_requests,)
    assert tables_RB.dtype == query_starts_R1.dtype == context_lens_R.dtype == torch.int32
    assert tables_RB.is_contiguous() and query_starts_R1.is_contiguous() and context_lens_R.is_contiguous()


def paged_attention_reference(
    q_TND: torch.Tensor,
    k_cache_BSKD: torch.Tensor,
    v_cache_BSKD: torch.Tensor,
    tables_RB: torch.Tensor,
    query_starts_R1: torch.Tensor,
    context_lens_R: torch.Tensor,
    max_query_len: int,
    scale: float,
) -> torch.Tensor:
    """`paged_attention` in plain torch, one request after the other, on any device."""
    out_TND = torch.zeros(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
    group = q_TND.shape[1] // k_cache_BSKD.shape[2]
    starts = query_starts_R1.tolist()
    for table_B, context, start, end in zip(tables_RB, context_lens_R.tolist(), starts[:-1], starts[1:], strict=True):
        assert end - start <= max_query_len
        q_NJD = q_TND[start:end].transpose(0, 1).float()
        k_PKD = k_cache_BSKD[table_B.long()].flatten(0, 1)[:context].float()
        v_PKD = v_cache_BSKD[table_B.long()].flatten(0, 1)[:context].float()
        k_NPD = k_PKD.transpose(0, 1).repeat_interleave(group, dim=0)
        v_NPD = v_PKD.transpose(0, 1).repeat_interleave(group, dim=0)
        key_position_P = torch.arange(context, device=q_TND.device)
        row_position_J = key_position_P[context - (end - start) :]
        scores_NJP = scale * q_NJD @ k_NPD.transpose(1, 2)
        scores_NJP = scores_NJP.masked_fill(key_position_P[None, :] > row_position_J[:, None], -math.inf)
        out_TND[start:end] = (scores_NJP.softmax(dim=-1) @ v_NPD).transpose(0, 1).to(q_TND.dtype)
    return out_TND


LOWEST = tl.constexpr(-1e30)  # where a running maximum starts: below every score, yet finite, so that inf - inf never arises


@triton.jit
def _merge(peak_a, total_a, acc_a, peak_b, total_b, acc_b):
    """Two softmax states (largest score, sum of exponentials, weighted values) of adjacent contexts, as one."""
    peak = tl.maximum(peak_a, peak_b)
    weight_a = tl.exp2(peak_a - peak)
    weight_b = tl.exp2(peak_b - peak)
    total = total_a * weight_a + total_b * weight_b
    return peak, total, acc_a * tl.expand_dims(weight_a, -1) + acc_b * tl.expand_dims(weight_b, -1)


@triton.jit
def _segment(
    q, row_position, k_ptr, v_ptr, table_ptr, block_stride, entry_stride, scale_log2, start, stop,
    HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SEGMENT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The softmax state of a tile's rows over positions [start, start + SEGMENT) before `stop`, from a fresh state."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(start, tl.minimum(start + SEGMENT, stop), BLOCK_N):
        position = first + tl.arange(0, BLOCK_N)
        written = position < stop
        block = tl.load(table_ptr + position // PAGE, mask=written, other=0).to(tl.int64)
        value = (block * block_stride + (position % PAGE) * entry_stride)[:, None] + channel
        inside = written[:, None] & (channel < HEAD_DIM)
        k = tl.load(k_ptr + value, mask=inside, other=0.0)
        if WIDEN:
            k = k.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        scores = tl.where(position[None, :] <= row_position[:, None], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        decay = tl.exp2(peak - higher)
        total = total * decay + tl.sum(weights, axis=1)
        v = tl.load(v_ptr + value, mask=inside, other=0.0)
        if WIDEN:
            v = v.to(tl.float32)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        peak = higher
    return peak, total, acc


@triton.jit
def _tile_of_request(query_starts_ptr, num_requests, ONE_TILE: tl.constexpr, TOKENS: tl.constexpr):
    """This program's request, and the first of that request's tokens in this program's tile."""
    tile = tl.program_id(0)
    if ONE_TILE:
        return tile, 0
    low = 0  # search the last request whose first tile, starts[r] // TOKENS + r, is not after this one
    high = num_requests
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_starts_ptr + middle) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle
    return low, (tile - tl.load(query_starts_ptr + low) // TOKENS - low) * TOKENS


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, tables_ptr, query_starts_ptr, context_lens_ptr, out_ptr, partial_ptr, state_ptr,
    num_requests, table_width, scale_log2, q_stride, q_head_stride, block_stride, entry_stride, head_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ONE_TILE: tl.constexpr, SPLIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One tile of one request's rows under one key head: over the whole context, or (SPLIT) over one segment of it."""
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    request, first_token = _tile_of_request(query_starts_ptr, num_requests, ONE_TILE, TOKENS)
    kv_head = tl.program_id(1)
    segment = tl.program_id(2)
    query_start = tl.load(query_starts_ptr + request)
    query_len = tl.load(query_starts_ptr + request + 1) - query_start
    context_before = tl.load(context_lens_ptr + request) - query_len
    stop = context_before + tl.minimum(first_token + TOKENS, query_len)  # no row of this tile sees further
    if (first_token >= query_len) | (segment * SEGMENT >= stop):
        return

    # Tile rows are (token, query head) pairs, heads fastest; rows past the last token compute and are not stored.
    m = tl.arange(0, BLOCK_M)
    token = first_token + m // GROUP
    head = kv_head * GROUP + m % GROUP
    stored = (m < TOKENS * GROUP) & (token < query_len)
    row = (query_start + token).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)[None, :]
    inside = stored[:, None] & (channel < HEAD_DIM)
    q = tl.load(q_ptr + (row * q_stride + head * q_head_stride)[:, None] + channel, mask=inside, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    row_position = context_before + token
    k_ptr += kv_head * head_stride
    v_ptr += kv_head * head_stride
    table_ptr = tables_ptr + tl.cast(request, tl.int64) * table_width

    if SPLIT:
        peak, total, acc = _segment(
            q, row_position, k_ptr, v_ptr, table_ptr, block_stride, entry_stride, scale_log2, segment * SEGMENT, stop,
            HEAD_DIM, PAGE, BLOCK_M, BLOCK_N, BLOCK_D, SEGMENT, WIDEN,
        )  # fmt: skip
        place = (row * HEADS + head) * tl.num_programs(2) + segment
        tl.store(partial_ptr + place[:, None] * HEAD_DIM + channel, acc, mask=inside)
        tl.store(state_ptr + place * 2, peak, mask=stored)
        tl.store(state_ptr + place * 2 + 1, total, mask=stored)
    else:
        peak = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, stop, SEGMENT):
            peak_b, total_b, acc_b = _segment(
                q, row_position, k_ptr, v_ptr, table_ptr, block_stride, entry_stride, scale_log2, start, stop,
                HEAD_DIM, PAGE, BLOCK_M, BLOCK_N, BLOCK_D, SEGMENT, WIDEN,
            )  # fmt: skip
            peak, total, acc = _merge(peak, total, acc, peak_b, total_b, acc_b)
        out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + ((row * HEADS + head) * HEAD_DIM)[:, None] + channel, out, mask=inside)


@triton.jit
def _merge_kernel(
    partial_ptr, state_ptr, query_starts_ptr, context_lens_ptr, out_ptr, num_segments,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One (row, head): its segments in order, as `_attention_kernel` merges them when it walks them all."""
    request = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.program_id(2)
    query_start = tl.load(query_starts_ptr + request)
    query_len = tl.load(query_starts_ptr + request + 1) - query_start
    if token >= query_len:
        return
    row_position = tl.load(context_lens_ptr + request) - query_len + token
    channel = tl.arange(0, BLOCK_D)[None, :]
    inside = channel < HEAD_DIM
    one = tl.arange(0, 1)
    peak = tl.full([1], LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_D], tl.float32)
    pair = (query_start + token).to(tl.int64) * HEADS + head
    for segment in range(row_position // SEGMENT + 1):
        place = pair * num_segments + segment
        peak_b = tl.load(state_ptr + place * 2 + one)
        total_b = tl.load(state_ptr + place * 2 + 1 + one)
        acc_b = tl.load(partial_ptr + place * HEAD_DIM + channel, mask=inside, other=0.0)
        peak, total, acc = _merge(peak, total, acc, peak_b, total_b, acc_b)
    out = (acc / tl.expand_dims(total, -1)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + pair * HEAD_DIM + channel, out, mask=inside)
