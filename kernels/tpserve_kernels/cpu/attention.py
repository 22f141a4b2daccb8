"""Paged attention: kernels/cpu/attention.h. Prefill, chunked prefill and decode are one operation; its contract is that of
`tpserve_kernels.attention`, except that channels and block sizes are any numbers.

Legend: T rows of the step, R requests, N query heads, K key/value heads, D channels of a key, E of a value, S entries of a block,
B blocks of a table.
"""

import ctypes
import functools
import math
from typing import NamedTuple

import torch

from tpserve_kernels.cpu.kv_int8 import SCALE_BYTES, dequantize_heads_reference
from tpserve_kernels.cpu.library import DTYPES, INT8, Operation, library

WORKSPACE_BYTES = 8 << 20
"""For the parts of contexts that are divided among threads; what does not fit is not divided."""


class AttentionArgs(ctypes.Structure):
    """`Attention` of kernels/cpu/api.h."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("query_starts", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("requests", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("k_dim", ctypes.c_int64),
        ("v_dim", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("q_strides", ctypes.c_int64 * 2),
        ("out_strides", ctypes.c_int64 * 2),
        ("k_strides", ctypes.c_int64 * 3),
        ("v_strides", ctypes.c_int64 * 3),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("kv_dtype", ctypes.c_int32),
        ("k_scale", ctypes.c_int64),
        ("v_scale", ctypes.c_int64),
    )


@functools.cache
def workspace() -> torch.Tensor:
    """One for all calls of this process, which come one after the other."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8)


def value_channels(k_cache_BSKD: torch.Tensor, v_cache_BSKE: torch.Tensor) -> int:
    """E. In int8 a head has its scale after its numbers; values that are a view of the keys have the keys' scale."""
    own_scale = v_cache_BSKE.dtype == torch.int8 and v_cache_BSKE.data_ptr() != k_cache_BSKD.data_ptr()
    return v_cache_BSKE.shape[3] - (SCALE_BYTES if own_scale else 0)


class AttentionInputs(NamedTuple):
    """What `paged_attention` computes with.

    Request r owns rows [query_starts[r], query_starts[r + 1]), none or more; its row j is at position context_len - query_len +
    j. Position p lies in block tables[r, p // S], entry p % S; its key and value are already written. window: a row at position
    p sees (p - window, p]; what no row sees is never read. cap: a score s becomes cap tanh(s / cap) first. sinks_N: float32
    [N], one more score in each head's softmax, whose value is zero.

    q_TND: [T, N, D]; caches [B, S, K, D] and [B, S, K, E], the value cache may be a view of the key cache; all float32 or
    bfloat16, values of a head adjacent. Or caches of int8, whose heads have four more bytes (`kv_int8`). N is a multiple of K,
    and query heads [g N / K, (g + 1) N / K) share key head g.
    tables_RB (rows of any stride), query_starts_R1 ([R + 1]) and context_lens_R: int32. scale, window and cap: positive.
    """

    q_TND: torch.Tensor
    k_cache_BSKD: torch.Tensor
    v_cache_BSKE: torch.Tensor
    tables_RB: torch.Tensor
    query_starts_R1: torch.Tensor
    context_lens_R: torch.Tensor
    scale: float
    window: int | None = None
    cap: float | None = None
    sinks_N: torch.Tensor | None = None


def attention_args(inputs: AttentionInputs, out_TNE: torch.Tensor) -> AttentionArgs:
    """The operation's arguments, which name the tensors' memory: they must outlive the call.

    AssertionError when shapes, dtypes or layouts differ from what `AttentionInputs` says.
    """
    q_TND, k_cache_BSKD, v_cache_BSKE, tables_RB, query_starts_R1, context_lens_R, scale, window, cap, sinks_N = inputs
    (rows, heads, k_dim), (_, block_size, kv_heads, _) = q_TND.shape, v_cache_BSKE.shape
    requests, v_dim, int8 = len(context_lens_R), value_channels(k_cache_BSKD, v_cache_BSKE), k_cache_BSKD.dtype == torch.int8
    assert k_cache_BSKD.shape == (*v_cache_BSKE.shape[:3], k_dim + (SCALE_BYTES if int8 else 0))
    assert heads % kv_heads == 0 and len(query_starts_R1) == requests + 1 and len(tables_RB) == requests
    assert q_TND.dtype == out_TNE.dtype and out_TNE.shape == (rows, heads, v_dim)
    assert k_cache_BSKD.dtype == v_cache_BSKE.dtype and (int8 or k_cache_BSKD.dtype == q_TND.dtype)
    assert all(
        t.stride(-1) == 1 for t in (q_TND, k_cache_BSKD, v_cache_BSKE, out_TNE, tables_RB, query_starts_R1, context_lens_R)
    )
    assert tables_RB.dtype == query_starts_R1.dtype == context_lens_R.dtype == torch.int32
    assert scale > 0 and (window is None or window > 0) and (cap is None or cap > 0)
    if sinks_N is not None:
        assert sinks_N.shape == (heads,) and sinks_N.dtype == torch.float32 and sinks_N.is_contiguous()
    return AttentionArgs(
        q_TND.data_ptr(), k_cache_BSKD.data_ptr(), v_cache_BSKE.data_ptr(), out_TNE.data_ptr(),
        None if sinks_N is None else sinks_N.data_ptr(), query_starts_R1.data_ptr(), context_lens_R.data_ptr(),
        tables_RB.data_ptr(), workspace().data_ptr(), WORKSPACE_BYTES, rows, requests, tables_RB.stride(0),
        heads, kv_heads, k_dim, v_dim, block_size, window or 0,
        (ctypes.c_int64 * 2)(*q_TND.stride()[:2]), (ctypes.c_int64 * 2)(*out_TNE.stride()[:2]),
        (ctypes.c_int64 * 3)(*k_cache_BSKD.stride()[:3]), (ctypes.c_int64 * 3)(*v_cache_BSKE.stride()[:3]), scale, cap or 0.0,
        DTYPES[q_TND.dtype], INT8 if int8 else DTYPES[q_TND.dtype], k_dim,
        k_dim if k_cache_BSKD.data_ptr() == v_cache_BSKE.data_ptr() else v_dim,
    )  # fmt: skip


def paged_attention(inputs: AttentionInputs) -> torch.Tensor:
    """softmax(scale q K^T) V for every row, over the positions of its own request up to its own: [T, N, E] in q's dtype.

    Sums are float32, rounded once; rows of no request are zero. A row's bits depend on its query and on the keys and values that
    it sees only. AssertionError as of `attention_args`.
    """
    lib, (rows, heads, _) = library(), inputs.q_TND.shape
    assert lib is not None
    v_dim = value_channels(inputs.k_cache_BSKD, inputs.v_cache_BSKE)
    out_TNE = torch.empty(rows, heads, v_dim, dtype=inputs.q_TND.dtype)
    lib.run(Operation.ATTENTION, attention_args(inputs, out_TNE))
    return out_TNE


def paged_attention_reference(inputs: AttentionInputs, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`paged_attention` in plain torch, one request after the other: computed, and returned, in `dtype`."""
    q_TND, k_cache_BSKD, v_cache_BSKE, tables_RB, query_starts_R1, context_lens_R, scale, window, cap, sinks_N = inputs
    v_dim = value_channels(k_cache_BSKD, v_cache_BSKE)
    if k_cache_BSKD.dtype == torch.int8:
        v_in_k = k_cache_BSKD.data_ptr() == v_cache_BSKE.data_ptr()
        k_cache_BSKD = dequantize_heads_reference(k_cache_BSKD)
        v_cache_BSKE = k_cache_BSKD[..., :v_dim] if v_in_k else dequantize_heads_reference(v_cache_BSKE)
    (rows, heads, _), (_, block_size, kv_heads, _) = q_TND.shape, v_cache_BSKE.shape
    out_TNE = torch.zeros(rows, heads, v_dim, dtype=dtype)
    starts = query_starts_R1.tolist()
    for table_B, context, start, end in zip(tables_RB, context_lens_R.tolist(), starts[:-1], starts[1:], strict=True):
        row_J1 = torch.arange(context - (end - start), context)[:, None]
        position_P = torch.arange(max(0, context - (end - start) + 1 - (window or context)), context)
        entry_P = table_B[position_P // block_size].long() * block_size + position_P % block_size
        k_NPD, v_NPE = (
            cache.flatten(0, 1)[entry_P].to(dtype).transpose(0, 1).repeat_interleave(heads // kv_heads, 0)
            for cache in (k_cache_BSKD, v_cache_BSKE)
        )
        scores_NJP = scale * q_TND[start:end].to(dtype).transpose(0, 1) @ k_NPD.transpose(1, 2)
        if cap is not None:
            scores_NJP = cap * torch.tanh(scores_NJP / cap)
        hidden_JP = (position_P > row_J1) | (position_P <= row_J1 - (window or context))
        scores_NJP = scores_NJP.masked_fill(hidden_JP, -math.inf)
        if sinks_N is not None:
            scores_NJP = torch.cat([sinks_N.to(dtype)[:, None, None].expand(-1, end - start, 1), scores_NJP], 2)
        weights_NJP = scores_NJP.softmax(2)[:, :, -len(position_P) :]
        out_TNE[start:end] = (weights_NJP @ v_NPE).transpose(0, 1)
    return out_TNE
