"""Paged attention on the CPU over fixed context tiles: a softmax per tile, then a merge of the tiles, as in FlashAttention's
online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135).

Invariant: a row's bits depend only on its own query and on the keys and values that it sees: not on the other rows, the
chunking of the prompt, padding, or the number of threads (docs/numerics.md). The reasons:
    - tiles start at multiples of the tile size and are summed in order; a tile that a row does not see changes none of its bits
    - all arithmetic is float32; matrix products have a multiple of four rows, padded
    - a cache entry that no row sees never enters a product, not even times zero: it may hold anything

Legend: n sequences of a group with C rows each, P pairs of sequence and tile (`cpu_plan.py`), p pairs of a chunk, a = p K,
K key/value heads, G query heads for each, M = C G rows of a head (padded), D channels of a key, E of a value, S block size,
X positions of a tile.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from tpserve.attention.cpu_plan import ROW_UNIT, TILE, KVChunk, TileGroup

LOWEST = -1e30
"""The peak of a tile in which a row sees nothing: below every score, yet finite."""


def attend(
    q_TND: torch.Tensor,
    k_cache_BSKD: torch.Tensor,
    v_cache_BSKE: torch.Tensor,
    groups: Sequence[TileGroup],
    scale: float,
    cap: float | None,
    sinks_N: torch.Tensor | None,
) -> torch.Tensor:
    """softmax(scale q K^T) V for the rows of each group: [T, N, E] in the dtype of `q`. See `AttentionParams` for the last three.

    The cache already holds the keys and values of the rows. Values that are a view of the keys are not read again.
    Rows of `q` in no group give zeros.
    """
    (_, num_heads, _), num_kv = q_TND.shape, k_cache_BSKD.shape[2]
    out_TNE = q_TND.new_zeros((*q_TND.shape[:2], v_cache_BSKE.shape[3]))
    for group in groups:
        q_nKMD = _by_head(q_TND[group.rows], group.count, num_kv).mul_(scale)
        peak_PKM1, weight_PKM1, out_PKME = _tiles(q_nKMD, k_cache_BSKD, v_cache_BSKE, group, cap)
        sinks_KM1 = None if sinks_N is None else _by_head(sinks_N.expand(group.count, -1).unsqueeze(2), group.count, num_kv)[0]
        out_nKME = _merge_tiles(peak_PKM1, weight_PKM1, out_PKME, group, sinks_KM1)
        out_TNE.index_copy_(0, group.rows, _by_row(out_nKME, group.count, num_heads).to(q_TND.dtype))
    return out_TNE


def products(q_TD: torch.Tensor, v_dim: int) -> torch.Tensor:
    """The two matrix products of a tile with random keys and values, for the self-test: float32 [T, D] -> [T, X + E].

    As in a step, more rows come with more matrices.
    """
    rows, count = len(q_TD), 1 + len(q_TD) // 32
    generator = torch.Generator().manual_seed(0)
    k_XD, v_XE = (torch.randn(TILE, dim, generator=generator) for dim in (q_TD.shape[1], v_dim))
    q_aMD = F.pad(q_TD, (0, 0, 0, -rows % ROW_UNIT)).repeat(count, 1, 1)
    scores_aMX = torch.bmm(q_aMD, k_XD.repeat(count, 1, 1).transpose(1, 2))
    out_aME = torch.bmm(scores_aMX, v_XE.repeat(count, 1, 1))
    return torch.cat((scores_aMX, out_aME), dim=2)[-1, :rows]


def _by_head(x_rND: torch.Tensor, count: int, num_kv: int) -> torch.Tensor:
    """The r = n C rows of a group, by key/value head and padded: [n, K, M, D] float32, a copy. `count`: C."""
    rows, num_heads, dim = x_rND.shape
    x_nCKGD = x_rND.reshape(rows // count, count, num_kv, num_heads // num_kv, dim)
    x_nKMD = x_nCKGD.transpose(1, 2).to(torch.float32, copy=True).reshape(rows // count, num_kv, -1, dim)
    padding = -x_nKMD.shape[2] % ROW_UNIT
    return F.pad(x_nKMD, (0, 0, 0, padding)) if padding else x_nKMD


def _by_row(x_nKME: torch.Tensor, count: int, num_heads: int) -> torch.Tensor:
    """The inverse of `_by_head`, without the padding: [r, N, E]."""
    n, num_kv, _, dim = x_nKME.shape
    ratio = num_heads // num_kv
    x_nKCGE = x_nKME[:, :, : count * ratio].view(n, num_kv, count, ratio, dim)
    return x_nKCGE.transpose(1, 2).reshape(n * count, num_heads, dim)


def _tiles(
    q_nKMD: torch.Tensor, k_cache_BSKD: torch.Tensor, v_cache_BSKE: torch.Tensor, group: TileGroup, cap: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The softmax state of each pair: the largest score and the sum of exponentials (both [P, K, M, 1]), the weighted values."""
    (_, num_kv, width, k_dim), v_dim = q_nKMD.shape, v_cache_BSKE.shape[3]
    peak_PKM1 = torch.empty((len(group.owners), num_kv, width, 1))
    weight_PKM1 = torch.empty_like(peak_PKM1)
    out_PKME = torch.empty((len(group.owners), num_kv, width, v_dim))
    v_in_k = v_cache_BSKE.data_ptr() == k_cache_BSKD.data_ptr()
    buffer = torch.empty(max(len(chunk.entries) for chunk in group.chunks) * num_kv * max(k_dim, v_dim))
    for chunk in group.chunks:
        k_aXD = _gather(k_cache_BSKD, chunk, buffer)
        q_pKMD = q_nKMD.expand(len(chunk.owners), -1, -1, -1) if len(q_nKMD) == 1 else q_nKMD[chunk.owners]
        scores_aMX = torch.bmm(q_pKMD.flatten(0, 1), k_aXD.transpose(1, 2))
        scores_pKMX, peak_pKM1 = scores_aMX.view(-1, num_kv, width, TILE), peak_PKM1[chunk.pairs]
        if cap is not None:
            _cap(scores_pKMX, cap)
        if chunk.mask is not None:
            scores_pKMX += chunk.mask
        torch.amax(scores_pKMX, 3, keepdim=True, out=peak_pKM1)
        if chunk.mask is not None:
            peak_pKM1.clamp_min_(LOWEST)
        scores_pKMX.sub_(peak_pKM1).exp_()
        torch.sum(scores_pKMX, 3, keepdim=True, out=weight_PKM1[chunk.pairs])
        v_aXE = k_aXD[:, :, :v_dim] if v_in_k else _gather(v_cache_BSKE, chunk, buffer)
        torch.bmm(scores_aMX, v_aXE, out=out_PKME[chunk.pairs].flatten(0, 1))
    return peak_PKM1, weight_PKM1, out_PKME


def _merge_tiles(
    peak_PKM1: torch.Tensor, weight_PKM1: torch.Tensor, out_PKME: torch.Tensor, group: TileGroup, sinks_KM1: torch.Tensor | None
) -> torch.Tensor:
    """Merge the tiles of each sequence, and the sinks, into one softmax: [n, K, M, E]. Overwrites its inputs."""
    peak_nKM1 = _fold(peak_PKM1.clone(), group.seqs_per_tile, torch.maximum)
    if sinks_KM1 is not None:
        torch.maximum(peak_nKM1, sinks_KM1, out=peak_nKM1)
    factor_PKM1 = peak_PKM1.sub_(peak_nKM1[group.owners]).exp_()
    total_nKM1 = _fold(weight_PKM1.mul_(factor_PKM1), group.seqs_per_tile, torch.add)
    if sinks_KM1 is not None:
        total_nKM1 += (sinks_KM1 - peak_nKM1).exp_()
    return _fold(out_PKME.mul_(factor_PKM1.div_(total_nKM1[group.owners])), group.seqs_per_tile, torch.add)


def _cap(scores: torch.Tensor, cap: float) -> None:
    """cap tanh(scores / cap), in place: cap - 2 cap / (exp(2 scores / cap) + 1), three times as fast as torch.tanh."""
    scores.mul_(2 / cap).exp_().add_(1).reciprocal_().mul_(-2 * cap).add_(cap)


def _gather(cache_BSKD: torch.Tensor, chunk: KVChunk, buffer: torch.Tensor) -> torch.Tensor:
    """The cache entries of a chunk, copied into `buffer`: [a, X, D] float32."""
    num_kv, dim = cache_BSKD.shape[2:]
    entries_pXKD = cache_BSKD.flatten(0, 1).index_select(0, chunk.entries).view(-1, TILE, num_kv, dim)
    out_pKXD = buffer[: entries_pXKD.numel()].view(-1, num_kv, TILE, dim)
    return out_pKXD.copy_(entries_pXKD.transpose(1, 2)).flatten(0, 1)


def _fold(parts_P: torch.Tensor, seqs_per_tile: Sequence[int], operation: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Reduce the parts of each sequence in tile order: [n, ...]. In place."""
    total_n, start = parts_P[: seqs_per_tile[0]], seqs_per_tile[0]
    for active in seqs_per_tile[1:]:
        operation(total_n[:active], parts_P[start : start + active], out=total_n[:active])
        start += active
    return total_n
