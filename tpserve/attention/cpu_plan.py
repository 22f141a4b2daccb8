"""The plan of a step's attention on the CPU, made once for all layers of a cache group: which rows are computed together,
which cache entries they read, what is masked. Host tensors only; attention itself is in `cpu_attention.py`.

A context is read in tiles of `TILE` positions, which start at multiples of `TILE`; with a window, only tiles inside it are
read. A *pair* is a sequence and a tile that it reads. Each sequence numbers its tiles from 0. Pairs are sorted by tile
number, and the sequences with most tiles come first, so that the sequences with a tile t are a prefix of the group:

    tile 0: sequences 0 1 2 3 | tile 1: sequences 0 1 2 | tile 2: sequence 0        seqs_per_tile = (4, 3, 1)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F

ROW_UNIT = 4
"""The number of rows of a matrix product is a multiple of this."""
TILE = 128
"""Positions of a tile: small enough that short contexts do not pay for empty positions."""
GATHER_BYTES = 1 << 20
"""Bytes of float32 keys read from the cache at a time; more would not fit the CPU's caches and cost page faults."""
PART_BYTES = 1 << 23
"""Maximum bytes of the float32 results of a group's pairs; a single sequence or `FEW_QUERIES` rows of one may exceed it."""
QUERIES = 64
"""Maximum rows of a request computed together, so that keys read from the cache serve many rows."""
FEW_QUERIES = 8
"""Minimum rows of a request computed together."""


class HeadShape(NamedTuple):
    """The heads of a layer on this rank. `ratio`: query heads per key/value head (GQA). `k_dim`, `v_dim`: channels of a head."""

    num_kv: int
    ratio: int
    k_dim: int
    v_dim: int


@dataclass(frozen=True)
class KVChunk:
    """Pairs whose keys and values are read from the cache together.

    Legend: p pairs, M query rows of a head (padded), X positions of a tile.
    """

    pairs: slice
    """which pairs of the group"""
    owners: torch.Tensor
    """[p] int64: the sequence of each pair"""
    entries: torch.Tensor
    """[p X] int64: cache entries (block * block_size + offset); for positions that no row sees, the sequence's last entry"""
    mask: torch.Tensor | None
    """[p, 1, M or 1, X] float32, 0 where a row sees a position, else -inf; None when every row sees all positions"""


@dataclass(frozen=True)
class TileGroup:
    """Sequences computed together: n sequences with C rows each, P pairs."""

    rows: torch.Tensor
    """[n C] int64: rows of the step"""
    count: int
    """C"""
    seqs_per_tile: tuple[int, ...]
    """entry t: how many sequences have a tile t"""
    owners: torch.Tensor
    """[P] int64: the sequence of each pair"""
    chunks: tuple[KVChunk, ...]


class QuerySpan(NamedTuple):
    """Rows [row, row + num_rows) of the step, a part of chunk `chunk`; the last of them is at position `context` - 1."""

    chunk: int
    row: int
    num_rows: int
    context: int

    def tiles(self, window: int | None) -> range:
        """The tiles in which its rows see a position. `window` as in AttentionMetadata."""
        first = 0 if window is None else max(0, self.context - self.num_rows + 1 - window)
        return range(first // TILE, -(-self.context // TILE))


def plan(
    lens: Sequence[int],
    contexts: Sequence[int],
    tables_RB: torch.Tensor,
    block_size: int,
    heads: HeadShape,
    window: int | None,
) -> tuple[TileGroup, ...]:
    """Groups that contain every row of the step once.

    `lens`, `contexts`: query and context length of each of R chunks. `tables_RB`: int32 block tables, B blocks each.
    """
    starts = list(accumulate(lens, initial=0))
    max_rows = PART_BYTES // (4 * heads.num_kv * heads.v_dim)  # of a head, each counted once per tile
    singles = [QuerySpan(r, starts[r], 1, contexts[r]) for r, count in enumerate(lens) if count == 1]
    singles.sort(key=lambda span: -len(span.tiles(window)))
    groups, start = [], 0
    while start < len(singles):
        num_seqs = max(1, max_rows // (_padded(heads.ratio) * len(singles[start].tiles(window))))
        groups.append(_group(singles[start : start + num_seqs], tables_RB, block_size, heads, window))
        start += num_seqs
    for r, count in enumerate(lens):
        if count > 1:
            widest = QuerySpan(r, starts[r], min(QUERIES, count), contexts[r])
            step = min(QUERIES, max(FEW_QUERIES, max_rows // (heads.ratio * len(widest.tiles(window)))))
            for first in range(0, count, step):
                num_rows = min(step, count - first)
                span = QuerySpan(r, starts[r] + first, num_rows, contexts[r] - count + first + num_rows)
                groups.append(_group([span], tables_RB, block_size, heads, window))
    return tuple(groups)


def _padded(rows: int) -> int:
    return -(-rows // ROW_UNIT) * ROW_UNIT


def _group(spans: list[QuerySpan], tables_RB: torch.Tensor, block_size: int, heads: HeadShape, window: int | None) -> TileGroup:
    """The group of spans with equal row counts, sorted by descending number of tiles."""
    count, tiles_n = spans[0].num_rows, [span.tiles(window) for span in spans]
    seqs_per_tile = tuple(sum(t < len(tiles) for tiles in tiles_n) for t in range(len(tiles_n[0])))
    owner_P = torch.cat([torch.arange(n) for n in seqs_per_tile])
    tile_P = torch.repeat_interleave(torch.arange(len(seqs_per_tile)), torch.tensor(seqs_per_tile))
    first_P = (tile_P + torch.tensor([tiles.start for tiles in tiles_n])[owner_P]) * TILE
    context_P1 = torch.tensor([span.context for span in spans])[owner_P, None]
    position_PX = first_P[:, None] + torch.arange(TILE)
    end_PC = context_P1 - count + 1 + torch.arange(count)  # a row sees positions [begin, end)
    begin_PC = torch.zeros_like(end_PC) if window is None else (end_PC - window).clamp_min_(0)
    seen_PX = (position_PX >= begin_PC[:, :1]) & (position_PX < context_P1)
    read_PX = torch.where(seen_PX, position_PX, context_P1 - 1)
    table_n = torch.tensor([span.chunk for span in spans])
    entry_PX = tables_RB[table_n[owner_P, None], read_PX // block_size].long() * block_size + read_PX % block_size
    partial = ((end_PC[:, 0] < first_P + TILE) | (begin_PC[:, -1] > first_P)).tolist()
    step = max(1, GATHER_BYTES // (4 * TILE * heads.num_kv * heads.k_dim * max(1, count * heads.ratio // 64)))
    chunks = []
    for start in range(0, len(partial), step):
        pairs = slice(start, min(start + step, len(partial)))
        mask = _mask(position_PX[pairs], begin_PC[pairs], end_PC[pairs], heads.ratio) if any(partial[pairs]) else None
        chunks.append(KVChunk(pairs, owner_P[pairs], entry_PX[pairs].flatten(), mask))
    rows = torch.cat([torch.arange(span.row, span.row + count) for span in spans])
    return TileGroup(rows, count, seqs_per_tile, owner_P, tuple(chunks))


def _mask(position_PX: torch.Tensor, begin_PC: torch.Tensor, end_PC: torch.Tensor, ratio: int) -> torch.Tensor:
    """The mask of rows that see positions [begin[c], end[c]): [P, 1, M or 1, X] float32. Padding rows see everything."""
    position_P1X = position_PX[:, None]
    hidden_PCX = (position_P1X < begin_PC[:, :, None]) | (position_P1X >= end_PC[:, :, None])
    mask_PCX = torch.zeros(hidden_PCX.shape).masked_fill_(hidden_PCX, -torch.inf)
    if mask_PCX.shape[1] > 1:
        mask_PCX = mask_PCX.repeat_interleave(ratio, dim=1)
        mask_PCX = F.pad(mask_PCX, (0, 0, 0, _padded(mask_PCX.shape[1]) - mask_PCX.shape[1]))
    return mask_PCX.unsqueeze(1)
