"""Paged attention on the CPU: online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867) over fixed context tiles.

Invariant: a row's bits depend on its own query and on the keys and values it sees, on nothing else: not on the other
rows, on how a prompt is chunked, on padding, or on the number of threads (docs/numerics.md). What holds it:
    - tiles start at multiples of the tile size and are taken in order; a tile a row does not see changes no bit of it
    - all arithmetic is float32; matrix products have a multiple of four rows, the rest of the rows is padding
    - a cache entry past a sequence's context is never let into a product, not even times zero: it may hold anything

n sequences of equal query length, K key/value heads, G query heads for each, M = query length x G rows of a head
(padded), D channels, S block size, B blocks of a table, X positions of a tile.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F

from tpserve.attention.batch import AttentionBatch

TILE = 128
"""Positions of a tile (a multiple of the block size): small enough that short contexts do not pay for empty positions."""
ROW_UNIT = 4
GATHER_BYTES = 1 << 20
"""Bytes of keys taken out of the cache at a time; more leaves the CPU's caches and costs page faults."""


def attend(
    q_TND: torch.Tensor, k_cache_BSKD: torch.Tensor, v_cache_BSKD: torch.Tensor, batch: AttentionBatch, scale: float
) -> torch.Tensor:
    """Causal attention of each chunk's rows over its sequence; the rows' own keys and values are already in the cache."""
    lens, contexts = batch.query_lens_host, batch.context_lens_host
    starts = list(accumulate(lens, initial=0))
    out_TND = torch.empty_like(q_TND)
    # One-row chunks go together, longest context first, so that the sequences that reach a tile are a prefix.
    singles = sorted((r for r, count in enumerate(lens) if count == 1), key=lambda r: -contexts[r])
    step = max(1, GATHER_BYTES // (4 * TILE * k_cache_BSKD.shape[2] * k_cache_BSKD.shape[3]))
    for at in range(0, len(singles), step):
        some = singles[at : at + step]
        rows = torch.tensor([starts[r] for r in some])
        tables = batch.tables[torch.tensor(some)]
        visible_nM = torch.tensor([contexts[r] for r in some]).unsqueeze(1)
        out_TND[rows] = _group(q_TND[rows].unsqueeze(1), k_cache_BSKD, v_cache_BSKD, tables, visible_nM, scale).squeeze(1)
    for r, count in enumerate(lens):
        if count > 1:
            rows_r = slice(starts[r], starts[r + 1])
            visible_nM = torch.arange(contexts[r] - count + 1, contexts[r] + 1).unsqueeze(0)
            tables = batch.tables[r : r + 1]
            out_TND[rows_r] = _group(q_TND[None, rows_r], k_cache_BSKD, v_cache_BSKD, tables, visible_nM, scale).squeeze(0)
    return out_TND


def _group(
    q_nCND: torch.Tensor,
    k_cache_BSKD: torch.Tensor,
    v_cache_BSKD: torch.Tensor,
    tables_nB: torch.Tensor,
    visible_nC: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of n sequences with C query rows each; row c of sequence i sees positions [0, visible[i, c])."""
    (n, count, num_heads, dim), num_kv = q_nCND.shape, k_cache_BSKD.shape[2]
    ratio = num_heads // num_kv
    padding = -(count * ratio) % ROW_UNIT
    q_nKMD = q_nCND.view(n, count, num_kv, ratio, dim).transpose(1, 2).reshape(n, num_kv, count * ratio, dim).float() * scale
    visible_nM = visible_nC.repeat_interleave(ratio, dim=1)
    if padding:
        q_nKMD = F.pad(q_nKMD, (0, 0, 0, padding))
        visible_nM = F.pad(visible_nM.unsqueeze(0), (0, padding), mode="replicate").squeeze(0)
    out_nKMD = _tiles(q_nKMD, k_cache_BSKD, v_cache_BSKD, tables_nB, visible_nM)
    out_nKMD = out_nKMD[:, :, : count * ratio].view(n, num_kv, count, ratio, dim)
    return out_nKMD.transpose(1, 2).reshape(n, count, num_heads, dim).to(q_nCND.dtype)


def _tiles(
    q_nKMD: torch.Tensor,
    k_cache_BSKD: torch.Tensor,
    v_cache_BSKD: torch.Tensor,
    tables_nB: torch.Tensor,
    visible_nM: torch.Tensor,
) -> torch.Tensor:
    """The loop over tiles. Sequences come longest first; of a single sequence, rows come earliest first."""
    block_size = k_cache_BSKD.shape[1]
    blocks = max(1, TILE // block_size)
    tile = blocks * block_size
    contexts: Sequence[int] = visible_nM[:, -1].tolist()
    num_tiles = -(-contexts[0] // tile)
    tables_nB = F.pad(tables_nB, (0, max(0, num_tiles * blocks - tables_nB.shape[1])))
    peak_nKM1 = torch.full((*q_nKMD.shape[:3], 1), -torch.inf)
    weight_nKM1 = torch.zeros_like(peak_nKM1)
    out_nKMD = torch.zeros_like(q_nKMD)
    for t in range(num_tiles):
        begin = t * tile
        active = sum(context > begin for context in contexts)
        first = 0
        if len(contexts) == 1:  # a chunk's earlier rows may not reach this tile
            first = int(torch.searchsorted(visible_nM[0], begin, right=True)) // ROW_UNIT * ROW_UNIT
        here = (slice(0, active), slice(None), slice(first, None))
        ids = tables_nB[:active, t * blocks : (t + 1) * blocks].reshape(-1)
        k_aKXD = _gather(k_cache_BSKD, ids, active)
        v_aKXD = _gather(v_cache_BSKD, ids, active)
        scores_aKMX = _product(q_nKMD[here], k_aKXD.transpose(2, 3))
        visible_aM = visible_nM[:active, first:]
        if int(visible_aM.min()) < begin + tile:
            position_X = torch.arange(begin, begin + tile)
            scores_aKMX.masked_fill_((position_X >= visible_aM.unsqueeze(2)).unsqueeze(1), -torch.inf)
            v_aKXD.masked_fill_((position_X >= visible_aM[:, -1:]).view(active, 1, tile, 1), 0)
        peak_aKM1 = torch.maximum(peak_nKM1[here], scores_aKMX.amax(3, keepdim=True))
        share_aKMX = scores_aKMX.sub_(peak_aKM1).exp_()
        shrink_aKM1 = (peak_nKM1[here] - peak_aKM1).exp_()
        weight_nKM1[here] = weight_nKM1[here] * shrink_aKM1 + share_aKMX.sum(3, keepdim=True)
        out_nKMD[here] = out_nKMD[here] * shrink_aKM1 + _product(share_aKMX, v_aKXD)
        peak_nKM1[here] = peak_aKM1
    return out_nKMD / weight_nKM1


def _gather(cache_BSKD: torch.Tensor, ids: torch.Tensor, n: int) -> torch.Tensor:
    """The tile's entries of n sequences, a copy: [n, K, X, D] float32."""
    picked_nXKD = cache_BSKD.index_select(0, ids).view(n, -1, *cache_BSKD.shape[2:])
    return picked_nXKD.transpose(1, 2).to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _product(a_nKMI: torch.Tensor, b_nKIJ: torch.Tensor) -> torch.Tensor:
    """Batched matrix product over the first two dims."""
    n, num_kv = a_nKMI.shape[:2]
    return torch.bmm(a_nKMI.reshape(n * num_kv, *a_nKMI.shape[2:]), b_nKIJ.flatten(0, 1)).view(n, num_kv, a_nKMI.shape[2], -1)
