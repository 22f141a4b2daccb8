"""Causal attention over a paged KV cache: prefill, chunked prefill and decode are one kernel (`attention_walk`).

Kwon et al., "PagedAttention" (2023), https://arxiv.org/abs/2309.06180, for the block tables; Dao et al., "Flash-Decoding"
(2023), for splitting the context; DeepSeek-AI, "DeepSeek-V2" (2024), https://arxiv.org/abs/2405.04434, for values that are a
part of their keys; Gemma Team, "Gemma 2" (2024), https://arxiv.org/abs/2408.00118, for the cap; Xiao et al., "Efficient
Streaming Language Models with Attention Sinks" (2023), https://arxiv.org/abs/2309.17453, for sinks, here learned scores.

Legend: T rows of the step, N query heads, K key/value heads, D channels of a key, E of a value, B blocks, S entries per block.

Invariant: the bits of a row depend only on its own query and on the part of its context that it sees: not on the other rows,
the chunking, the page size, or the split of the context over programs. Therefore

  - a context is divided, from position 0, into segments of SEGMENT positions, and a segment into tiles of `Tile.n`;
  - within a segment tiles are processed in order from an empty state; segments are merged in order, only by `_merge`; a tile
    or segment in which a row sees nothing does not change its state;
  - `Tile` is a function of head size and dtype, never of T, R or a length: decode and prefill rows use one tile shape;
  - there are no atomics and no fused multiply-adds, so the same source in two kernels is the same arithmetic.

So the split affects speed only. `attention_plan` decides it: a program walks all segments of a tile of rows and merges them, or
it computes one segment, and `merge_kernel` merges them.
"""

import math

import torch
import triton

from tpserve_kernels.attention_plan import SEGMENT, AttentionPlan, PagedRequests
from tpserve_kernels.attention_walk import attention_kernel, merge_kernel


def paged_attention(
    q_TND: torch.Tensor,
    k_cache_BSKD: torch.Tensor,
    v_cache_BSKE: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    cap: float | None = None,
    sinks_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale q K^T) V for every row, over the positions of its own request up to its own: [T, N, E].

    `plan`: the requests of the step, whose keys and values are already written, and how to divide the work; from
    `plan_attention`, on whose memory calls write one after the other. cap: a score s becomes cap tanh(s / cap) first. sinks_N:
    [N] float32, one more score in each head's softmax, whose value is zero.

    q_TND: [T, N, D]; caches [B, S, K, D] and [B, S, K, E], alike in strides, S a multiple of 16; all float32, float16 or
    bfloat16, channels adjacent and multiples of 16. E is D, up to 256; or the value cache is a view of the first E channels of
    the key cache, E up to 512 and D - E up to 64: then each is read once. N is a multiple of K, and query heads
    [g N / K, (g + 1) N / K) share key head g. scale and cap: positive. Returns contiguous values of q's dtype, accumulated in
    float32; zeros for requests without a context; rows of no request are undefined. Reads nothing back from the device, so that
    it can be captured in a graph, and launches one kernel, or two where a context may be split.
    Errors: AssertionError when shapes, dtypes or layouts differ from this.
    """
    _assert_contract(q_TND, k_cache_BSKD, v_cache_BSKE, plan, sinks_N)
    assert scale > 0 and (cap is None or cap > 0)
    requests, tile = plan.requests, plan.tile
    num_rows, num_heads, k_dim = q_TND.shape
    _, page, num_kv_heads, v_dim = v_cache_BSKE.shape
    out_TNE = torch.empty(num_rows, num_heads, v_dim, dtype=q_TND.dtype, device=q_TND.device)
    sinks = out_TNE if sinks_N is None else sinks_N
    of_model = {
        "HEADS": num_heads, "HEAD_DIM": v_dim, "BLOCK_D": triton.next_power_of_2(v_dim), "WINDOW": requests.window or 0,
        "SINKS": sinks_N is not None, "SEGMENT": SEGMENT,
    }  # fmt: skip
    attention_kernel[(plan.num_programs,)](
        q_TND, k_cache_BSKD, v_cache_BSKE, plan.counts_2, plan.items_I4, *requests[:4], sinks, out_TNE, plan.acc, plan.state,
        plan.tile_tokens, requests.tables_XB.stride(0),
        math.log2(math.e) * scale * (2 / cap if cap else 1), math.log2(math.e) * (cap or 0),
        *q_TND.stride()[:2], *k_cache_BSKD.stride()[:3],
        **of_model, GROUP=num_heads // num_kv_heads, SHARE=plan.share,
        TAIL=k_dim - v_dim, BLOCK_TAIL=max(16, triton.next_power_of_2(k_dim - v_dim)),
        V_IN_K=k_cache_BSKD.data_ptr() == v_cache_BSKE.data_ptr(), CAP=cap is not None, PAGE=page,
        BLOCK_M=tile.m, BLOCK_N=tile.n,
        # Triton's interpreter multiplies the bit patterns of bfloat16 as if they were integers.
        WIDEN=q_TND.dtype == torch.bfloat16 and not isinstance(attention_kernel, triton.JITFunction),
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    if len(plan.split_C4):
        merge_kernel[(plan.num_mergers,)](
            plan.acc, plan.state, plan.counts_2, plan.split_C4, requests.query_starts_R1, requests.context_lens_R, sinks, out_TNE,
            plan.tile_tokens, **of_model, TOKENS=tile.m // plan.share, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return out_TNE


def _assert_contract(
    q_TND: torch.Tensor,
    k_cache_BSKD: torch.Tensor,
    v_cache_BSKE: torch.Tensor,
    plan: AttentionPlan,
    sinks_N: torch.Tensor | None,
) -> None:
    """AssertionError for inputs that violate the contract of `paged_attention`."""
    num_rows, num_heads, k_dim = q_TND.shape
    _, page, num_kv_heads, v_dim = v_cache_BSKE.shape
    assert (num_heads, num_kv_heads, v_dim, q_TND.dtype) == (plan.num_heads, plan.num_kv_heads, plan.v_dim, plan.dtype)
    assert num_rows <= plan.requests.num_rows
    assert k_cache_BSKD.shape == (*v_cache_BSKE.shape[:3], k_dim) and k_cache_BSKD.stride() == v_cache_BSKE.stride()
    if k_cache_BSKD.data_ptr() == v_cache_BSKE.data_ptr():
        assert 16 <= v_dim <= 512 and v_dim <= k_dim <= v_dim + 64
    else:
        assert 16 <= v_dim <= 256 and v_dim == k_dim
    assert k_dim % 16 == v_dim % 16 == 0 and page % 16 == 0
    assert q_TND.dtype == k_cache_BSKD.dtype == v_cache_BSKE.dtype
    assert q_TND.stride(2) == k_cache_BSKD.stride(3) == 1
    if sinks_N is not None:
        assert sinks_N.shape == (num_heads,) and sinks_N.dtype == torch.float32 and sinks_N.is_contiguous()


def paged_attention_reference(
    q_TND: torch.Tensor,
    k_cache_BSKD: torch.Tensor,
    v_cache_BSKE: torch.Tensor,
    requests: PagedRequests,
    scale: float,
    cap: float | None = None,
    sinks_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """`paged_attention` in plain torch, one request after the other, on any device."""
    (num_rows, num_heads, _), (page, num_kv_heads, v_dim) = q_TND.shape, v_cache_BSKE.shape[1:]
    tables_RB, window = requests.tables_XB[requests.table_rows_R.long()], requests.window
    out_TNE = torch.zeros(num_rows, num_heads, v_dim, dtype=q_TND.dtype, device=q_TND.device)
    starts, contexts = requests.query_starts_R1.tolist(), requests.context_lens_R.tolist()
    for table_B, context, start, end in zip(tables_RB, contexts, starts[:-1], starts[1:], strict=True):
        assert end - start <= requests.max_query_len
        if start == end or context == 0:
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
