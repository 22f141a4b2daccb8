"""What attention on the CPU must know of a step, worked out once for all layers of a cache group: which rows go together,
which cache entries they read, what is masked. Host tensors only; owns no arithmetic of attention itself.

A context is read in tiles of `TILE` positions, which start at multiples of `TILE`; with a window only in those that it
touches. A *pair* is a tile and a sequence that reads it. Each sequence counts its tiles from the first that it reads, pairs
are in order of that count, and sequences of most tiles come first, so that those with a t-th tile are a prefix of the group:

    tile 0: sequences 0 1 2 3 | tile 1: sequences 0 1 2 | tile 2: sequence 0        seqs_per_tile = (4, 3, 1)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F

ROW_UNIT = 4
"""The products of attention have a multiple of so many rows."""
TILE = 128
"""Positions of a tile: small enough that short contexts do not pay for empty positions."""
GATHER_BYTES = 1 << 20
"""Bytes of float32 keys taken out of the cache at a time; more leaves the CPU's caches and costs page faults."""
PART_BYTES = 1 << 23
"""Bytes of float32 results of a group's pairs, unless a single sequence or `FEW_QUERIES` rows of one have more."""
QUERIES = 64
"""Rows of a chunk taken together, so that keys taken out of the cache serve many."""
FEW_QUERIES = 8
"""Rows of a chunk taken together at least."""


class HeadShape(NamedTuple):
    """What a layer's heads look like on this rank. `ratio`: query heads of a key/value head."""

    num_kv: int
    ratio: int
    k_dim: int
    v_dim: int


@dataclass(frozen=True)
class KVChunk:
    """Pairs that are taken out of the cache together. P pairs, M query rows of a head (padded), X positions of a tile."""

    pairs: slice
    """of the group's pairs"""
    owners: torch.Tensor
    """[P] int64: the sequences of the pairs"""
    entries: torch.Tensor
    """[P X] int64: cache entries (block * block_size + place); positions that no row sees stand on the sequence's last"""
    mask: torch.Tensor | None
    """[P, 1, M or 1, X] float32, 0 where a row sees a position and -inf where not; None when every row sees all"""


@dataclass(frozen=True)
class TileGroup:
    """n sequences with C rows each, P pairs."""

    rows: torch.Tensor
    """[n C] int64: rows of the step"""
    count: int
    """C"""
    seqs_per_tile: tuple[int, ...]
    """for each count of tiles, how many sequences have so many and one more"""
    owners: torch.Tensor
    """[P] int64: the sequences of the pairs"""
    chunks: tuple[KVChunk, ...]


class QuerySpan(NamedTuple):
    """Rows [row, row + num_rows) of the step, a part of chunk `chunk`; the last of them is at position `context` - 1."""

    chunk: int
    row: int
    num_rows: int
    context: int

    def tiles(self, window: int | None) -> range:
        """Those that its rows see something of."""
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
    """Groups that hold every row of the step once. R chunks, B blocks of a table."""
    starts = list(accumulate(lens, initial=0))
    room = PART_BYTES // (4 * heads.num_kv * heads.v_dim)  # rows of a head, each as often as it has tiles
    singles = [QuerySpan(r, starts[r], 1, contexts[r]) for r, count in enumerate(lens) if count == 1]
    singles.sort(key=lambda span: -len(span.tiles(window)))
    groups, at = [], 0
    while at < len(singles):
        most = max(1, room // (_padded(heads.ratio) * len(singles[at].tiles(window))))
        groups.append(_group(singles[at : at + most], tables_RB, block_size, heads, window))
        at += most
    for r, count in enumerate(lens):
        if count > 1:
            widest = QuerySpan(r, starts[r], min(QUERIES, count), contexts[r])
            most = min(QUERIES, max(FEW_QUERIES, room // (heads.ratio * len(widest.tiles(window)))))
            for first in range(0, count, most):
                num_rows = min(most, count - first)
                span = QuerySpan(r, starts[r] + first, num_rows, contexts[r] - count + first + num_rows)
                groups.append(_group([span], tables_RB, block_size, heads, window))
    return tuple(groups)


def _padded(rows: int) -> int:
    return -(-rows // ROW_UNIT) * ROW_UNIT


def _group(spans: list[QuerySpan], tables_RB: torch.Tensor, block_size: int, heads: HeadShape, window: int | None) -> TileGroup:
    """Spans of equal row counts, those of most tiles first."""
    count, tiles_n = spans[0].num_rows, [span.tiles(window) for span in spans]
    seqs_per_tile = tuple(sum(t < len(tiles) for tiles in tiles_n) for t in range(len(tiles_n[0])))
    owner_P = torch.cat([torch.arange(n) for n in seqs_per_tile])
    turn_P = torch.repeat_interleave(torch.arange(len(seqs_per_tile)), torch.tensor(seqs_per_tile))
    first_P = (turn_P + torch.tensor([tiles.start for tiles in tiles_n])[owner_P]) * TILE
    context_P1 = torch.tensor([span.context for span in spans])[owner_P, None]
    position_PX = first_P[:, None] + torch.arange(TILE)
    end_PC = context_P1 - count + 1 + torch.arange(count)  # a row sees positions [begin, end)
    begin_PC = torch.zeros_like(end_PC) if window is None else (end_PC - window).clamp_min_(0)
    seen_PX = (position_PX >= begin_PC[:, :1]) & (position_PX < context_P1)
    from_PX = torch.where(seen_PX, position_PX, context_P1 - 1)
    table_n = torch.tensor([span.chunk for span in spans])
    entry_PX = tables_RB[table_n[owner_P, None], from_PX // block_size].long() * block_size + from_PX % block_size
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
    """Row c sees positions [begin[c], end[c]). Padding sees everything, and a single row is the same for all its heads."""
    position_P1X = position_PX[:, None]
    hidden_PCX = (position_P1X < begin_PC[:, :, None]) | (position_P1X >= end_PC[:, :, None])
    mask_PCX = torch.zeros(hidden_PCX.shape).masked_fill_(hidden_PCX, -torch.inf)
    if mask_PCX.shape[1] > 1:
        mask_PCX = mask_PCX.repeat_interleave(ratio, dim=1)
        mask_PCX = F.pad(mask_PCX, (0, 0, 0, _padded(mask_PCX.shape[1]) - mask_PCX.shape[1]))
    return mask_PCX.unsqueeze(1)
