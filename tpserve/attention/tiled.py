"""Paged attention on the CPU, over fixed context tiles, in two passes: all scores, then the softmax and the values.

Invariant: a row's bits depend on its own query and on the keys and values it sees, on nothing else: not on the other
rows, on how a prompt is chunked, on padding, or on the number of threads (docs/numerics.md). What holds it:
    - tiles start at multiples of the tile size and are added up in order; a tile a row does not see changes no bit of it
    - all arithmetic is float32; matrix products have a multiple of four rows, the rest of the rows is padding
    - a cache entry past a sequence's context is never let into a product, not even times zero: it may hold anything

n sequences of a group with C rows each, P pairs of sequence and tile (`tiles.py`), K key/value heads, G query heads for
each, M = C x G rows of a head (padded), D channels, S block size, X positions of a tile.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from tpserve.attention.tiles import ROW_UNIT, TILE, Group, Piece


def attend(
    q_TND: torch.Tensor, k_cache_BSKD: torch.Tensor, v_cache_BSKD: torch.Tensor, groups: Sequence[Group], scale: float
) -> torch.Tensor:
    """Causal attention of each group's rows over their sequences; the rows' own keys and values are already in the cache.

    Rows of `q` that no group holds come out as zeros.
    """
    out_TND = torch.zeros_like(q_TND)
    for group in groups:
        out_TND.index_copy_(0, group.rows, _attend_group(q_TND[group.rows], k_cache_BSKD, v_cache_BSKD, group, scale))
    return out_TND


def _attend_group(
    q_rND: torch.Tensor, k_cache_BSKD: torch.Tensor, v_cache_BSKD: torch.Tensor, group: Group, scale: float
) -> torch.Tensor:
    """The rows of a group, r = n C of them."""
    (rows, num_heads, dim), num_kv, count = q_rND.shape, k_cache_BSKD.shape[2], group.count
    n, ratio = rows // count, num_heads // num_kv
    q_nKMD = q_rND.view(n, count, num_kv, ratio, dim).transpose(1, 2).float().reshape(n, num_kv, count * ratio, dim).mul_(scale)
    if padding := -(count * ratio) % ROW_UNIT:
        q_nKMD = F.pad(q_nKMD, (0, 0, 0, padding))
    out_nKMD = _softmax_values(_scores(q_nKMD, k_cache_BSKD, group), v_cache_BSKD, group)
    out_nKCGD = out_nKMD[:, :, : count * ratio].view(n, num_kv, count, ratio, dim)
    return out_nKCGD.transpose(1, 2).reshape(rows, num_heads, dim).to(q_rND.dtype)


def _scores(q_nKMD: torch.Tensor, k_cache_BSKD: torch.Tensor, group: Group) -> torch.Tensor:
    """Masked scores of all pairs: [P, K, M, X]."""
    n, num_kv, width, _ = q_nKMD.shape
    scores_PKMX = torch.empty((sum(group.reach), num_kv, width, TILE))
    for piece in group.pieces:
        here_pKMX = scores_PKMX[piece.pairs]
        q_pKMD = q_nKMD.expand(len(here_pKMX), -1, -1, -1) if n == 1 else q_nKMD[piece.owners]
        torch.bmm(q_pKMD.flatten(0, 1), _gather(k_cache_BSKD, piece).transpose(1, 2), out=here_pKMX.flatten(0, 1))
        if piece.mask is not None:
            here_pKMX += piece.mask
    return scores_PKMX


def _softmax_values(scores_PKMX: torch.Tensor, v_cache_BSKD: torch.Tensor, group: Group) -> torch.Tensor:
    """Softmax over each row's tiles, times the values: [n, K, M, D]. Overwrites the scores."""
    peak_nKM1 = _fold(scores_PKMX.amax(3, keepdim=True), group.reach, torch.maximum)
    weight_PKM1 = torch.empty((*scores_PKMX.shape[:3], 1))
    out_PKMD = torch.empty((*scores_PKMX.shape[:3], v_cache_BSKD.shape[3]))
    for piece in group.pieces:
        here_pKMX = scores_PKMX[piece.pairs]
        here_pKMX.sub_(peak_nKM1[piece.owners]).exp_()
        torch.sum(here_pKMX, 3, keepdim=True, out=weight_PKM1[piece.pairs])
        torch.bmm(here_pKMX.flatten(0, 1), _gather(v_cache_BSKD, piece), out=out_PKMD[piece.pairs].flatten(0, 1))
    return _fold(out_PKMD, group.reach, torch.add).div_(_fold(weight_PKM1, group.reach, torch.add))


def _gather(cache_BSKD: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The piece's entries, a copy: [P K, X, D] float32."""
    picked_PXKD = cache_BSKD.flatten(0, 1).index_select(0, piece.entries).view(-1, TILE, *cache_BSKD.shape[2:])
    return picked_PXKD.transpose(1, 2).to(torch.float32, copy=True, memory_format=torch.contiguous_format).flatten(0, 1)


def _fold(parts_P: torch.Tensor, reach: Sequence[int], operation: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Join each sequence's parts in order of tiles: [n, ...]. In place."""
    total_n, at = parts_P[: reach[0]], reach[0]
    for active in reach[1:]:
        operation(total_n[:active], parts_P[at : at + active], out=total_n[:active])
        at += active
    return total_n
