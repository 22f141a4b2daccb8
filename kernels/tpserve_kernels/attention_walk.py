"""The kernels of `attention`, which defines what they compute and why it is invariant.

Source: the online softmax of FlashAttention (Dao et al. 2022), https://arxiv.org/abs/2205.14135. Scores are base-2 logarithms.
Windows, the cap, sinks and tails of keys are compile-time options: they cost nothing when unused.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # initial running maximum: below every score, yet finite, so that inf - inf never occurs
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _merge(peak_a, total_a, acc_a, peak_b, total_b, acc_b):
    """Merge the softmax states (largest score, sum of exponentials, weighted values) of two adjacent contexts."""
    peak = tl.maximum(peak_a, peak_b)
    weight_a = tl.exp2(peak_a - peak)
    weight_b = tl.exp2(peak_b - peak)
    total = total_a * weight_a + total_b * weight_b
    return peak, total, acc_a * tl.expand_dims(weight_a, -1) + acc_b * tl.expand_dims(weight_b, -1)


@triton.jit
def _output(peak, total, acc, sinks_ptr, head, HEADS: tl.constexpr, SINKS: tl.constexpr):
    """The attention output of a softmax state, after the head's sink is added to the sum."""
    if SINKS:
        sink = tl.load(sinks_ptr + head, mask=head < HEADS, other=0.0) * LOG2_E
        higher = tl.maximum(peak, sink)
        decay = tl.exp2(peak - higher)
        total = total * decay + tl.exp2(sink - higher)
        acc = acc * tl.expand_dims(decay, -1)
    return tl.where(tl.expand_dims(total, -1) > 0, acc / tl.expand_dims(total, -1), 0.0)  # nothing seen: zeros


@triton.jit
def _first_seen(position, WINDOW: tl.constexpr):
    """The first position that the row at `position` sees."""
    return tl.maximum(position - WINDOW + 1, 0) if WINDOW else 0


@triton.jit
def _segment(
    q, q_tail, row_position, k_ptr, v_ptr, table_ptr, block_stride, entry_stride, scale_log2, cap_log2, start, begin, stop,
    HEAD_DIM: tl.constexpr, TAIL: tl.constexpr, V_IN_K: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
    SEGMENT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The softmax state of a tile's rows over the positions [start, start + SEGMENT) in [begin, stop), from an empty state."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    tail = tl.arange(0, BLOCK_TAIL)[None, :]
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first_tile = tl.maximum(start, begin // BLOCK_N * BLOCK_N) if WINDOW else start
    for first in range(first_tile, tl.minimum(start + SEGMENT, stop), BLOCK_N):
        position = first + tl.arange(0, BLOCK_N)
        seen = position < stop
        if WINDOW:
            seen &= position >= begin
        block = tl.load(table_ptr + position // PAGE, mask=seen, other=0).to(tl.int64)
        value = (block * block_stride + (position % PAGE) * entry_stride)[:, None]
        inside = seen[:, None] & (channel < HEAD_DIM)
        k = tl.load(k_ptr + value + channel, mask=inside, other=0.0)
        if WIDEN:
            k = k.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if TAIL:
            k_tail = tl.load(k_ptr + value + HEAD_DIM + tail, mask=seen[:, None] & (tail < TAIL), other=0.0)
            if WIDEN:
                k_tail = k_tail.to(tl.float32)
            scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision="ieee")
        scores = scores * scale_log2
        if CAP:  # cap tanh(s / cap) is cap - 2 cap / (exp(2 s / cap) + 1); scale_log2 holds the 2 / cap
            scores = cap_log2 - 2 * cap_log2 / (tl.exp2(scores) + 1)
        visible = position[None, :] <= row_position[:, None]
        if WINDOW:
            visible &= position[None, :] > row_position[:, None] - WINDOW
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        decay = tl.exp2(peak - higher)
        total = total * decay + tl.sum(weights, axis=1)
        if V_IN_K:
            v = k
        else:
            v = tl.load(v_ptr + value + channel, mask=inside, other=0.0)
            if WIDEN:
                v = v.to(tl.float32)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        peak = higher
    return peak, total, acc


@triton.jit(
    do_not_specialize=["tile_tokens", "table_stride"],
    do_not_specialize_on_alignment=["tables_ptr", "table_rows_ptr", "query_starts_ptr", "context_lens_ptr"],
)
def attention_kernel(
    q_ptr, k_ptr, v_ptr, counts_ptr, items_ptr, tables_ptr, table_rows_ptr, query_starts_ptr, context_lens_ptr, sinks_ptr,
    out_ptr, acc_ptr, state_ptr, tile_tokens, table_stride, scale_log2, cap_log2,
    q_stride, q_head_stride, block_stride, entry_stride, head_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr, HEAD_DIM: tl.constexpr, TAIL: tl.constexpr,
    V_IN_K: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, SINKS: tl.constexpr, PAGE: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """The plan's items with each key head, in turn: a tile's rows over their whole context, or over one segment of it.

    The GROUP query heads of a key head are split over several tiles if necessary, SHARE heads in each.
    """
    TOKENS: tl.constexpr = BLOCK_M // SHARE
    PARTS: tl.constexpr = (GROUP + SHARE - 1) // SHARE
    HEAD_BLOCKS: tl.constexpr = HEADS // GROUP * PARTS
    m = tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_D)[None, :]
    tail = tl.arange(0, BLOCK_TAIL)[None, :]
    for work in range(tl.program_id(0), tl.load(counts_ptr) * HEAD_BLOCKS, tl.num_programs(0)):
        item = work // HEAD_BLOCKS
        head_block = work % HEAD_BLOCKS
        request = tl.load(items_ptr + 4 * item)
        first_token = tl.load(items_ptr + 4 * item + 1) * TOKENS
        segment = tl.load(items_ptr + 4 * item + 2)
        query_start = tl.load(query_starts_ptr + request)
        query_len = tl.load(query_starts_ptr + request + 1) - query_start
        context_before = tl.load(context_lens_ptr + request) - query_len
        begin = _first_seen(context_before + first_token, WINDOW)  # no row of this tile sees a position before this
        stop = context_before + tl.minimum(first_token + TOKENS, query_len)  # nor from this one on

        # Tile rows are (token, query head) pairs, heads fastest; rows past the last token or head are computed but not stored.
        kv_head = head_block // PARTS
        token = first_token + m // SHARE
        of_group = head_block % PARTS * SHARE + m % SHARE
        head = kv_head * GROUP + of_group
        stored = (m < TOKENS * SHARE) & (token < query_len) & (of_group < GROUP)
        row = (query_start + token).to(tl.int64)
        inside = stored[:, None] & (channel < HEAD_DIM)
        q_row_ptr = q_ptr + (row * q_stride + head * q_head_stride)[:, None]
        q = tl.load(q_row_ptr + channel, mask=inside, other=0.0)
        q_tail = q
        if TAIL:
            q_tail = tl.load(q_row_ptr + HEAD_DIM + tail, mask=stored[:, None] & (tail < TAIL), other=0.0)
        if WIDEN:
            q = q.to(tl.float32)
            q_tail = q_tail.to(tl.float32)
        row_position = context_before + token
        table_ptr = tables_ptr + tl.load(table_rows_ptr + request).to(tl.int64) * table_stride

        walk = (begin // SEGMENT + tl.maximum(segment, 0)) * SEGMENT
        end = tl.where(segment < 0, stop, tl.minimum(walk + SEGMENT, stop))
        peak = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(walk, end, SEGMENT):
            peak_b, total_b, acc_b = _segment(
                q, q_tail, row_position, k_ptr + kv_head * head_stride, v_ptr + kv_head * head_stride, table_ptr, block_stride,
                entry_stride, scale_log2, cap_log2, start, begin, stop, HEAD_DIM, TAIL, V_IN_K, WINDOW, CAP, PAGE, BLOCK_M,
                BLOCK_N, BLOCK_D, BLOCK_TAIL, SEGMENT, WIDEN,
            )  # fmt: skip
            if segment >= 0:
                place = (tl.load(items_ptr + 4 * item + 3) * HEADS + head) * tile_tokens + m // SHARE
                tl.store(acc_ptr + place[:, None] * HEAD_DIM + channel, acc_b, mask=inside)
                tl.store(state_ptr + place * 2, peak_b, mask=stored)
                tl.store(state_ptr + place * 2 + 1, total_b, mask=stored)
            else:
                peak, total, acc = _merge(peak, total, acc, peak_b, total_b, acc_b)
        if segment < 0:
            out = _output(peak, total, acc, sinks_ptr, head, HEADS, SINKS).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + ((row * HEADS + head) * HEAD_DIM)[:, None] + channel, out, mask=inside)


@triton.jit(do_not_specialize=["tile_tokens"], do_not_specialize_on_alignment=["query_starts_ptr", "context_lens_ptr"])
def merge_kernel(
    acc_ptr, state_ptr, counts_ptr, split_ptr, query_starts_ptr, context_lens_ptr, sinks_ptr, out_ptr, tile_tokens,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The outputs of split tiles: each program merges the segments of some (row, head) pairs in order, as `attention_kernel`."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    inside = channel < HEAD_DIM
    one = tl.arange(0, 1)
    for work in range(tl.program_id(0), tl.load(counts_ptr + 1) * tile_tokens * HEADS, tl.num_programs(0)):
        head = work % HEADS
        of_tile = work // HEADS % tile_tokens
        tile_ptr = split_ptr + work // HEADS // tile_tokens * 4
        request = tl.load(tile_ptr)
        first_token = tl.load(tile_ptr + 1) * TOKENS
        first_state = tl.load(tile_ptr + 2)
        query_start = tl.load(query_starts_ptr + request)
        query_len = tl.load(query_starts_ptr + request + 1) - query_start
        context_before = tl.load(context_lens_ptr + request) - query_len
        token = first_token + of_tile
        if token < query_len:
            first = _first_seen(context_before + first_token, WINDOW) // SEGMENT
            num_segments = (context_before + token) // SEGMENT + 1 - first
            peak = tl.full([1], LOWEST, tl.float32)
            total = tl.zeros([1], tl.float32)
            acc = tl.zeros([1, BLOCK_D], tl.float32)
            for segment in tl.range(num_segments, num_stages=4):
                place = ((first_state + segment) * HEADS + head) * tile_tokens + of_tile
                peak_b = tl.load(state_ptr + place * 2 + one)
                total_b = tl.load(state_ptr + place * 2 + 1 + one)
                acc_b = tl.load(acc_ptr + place * HEAD_DIM + channel, mask=inside, other=0.0)
                peak, total, acc = _merge(peak, total, acc, peak_b, total_b, acc_b)
            out = _output(peak, total, acc, sinks_ptr, head + one, HEADS, SINKS).to(out_ptr.dtype.element_ty)
            pair = (query_start + token).to(tl.int64) * HEADS + head
            tl.store(out_ptr + pair * HEAD_DIM + channel, out, mask=inside)
