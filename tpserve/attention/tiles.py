"""What attention on the CPU must know of a step, worked out once for all layers: which rows go together, which cache
entries they read, what is masked. Host tensors only; owns no arithmetic of attention itself.

A context is read in tiles of `TILE` positions from position 0. A *pair* is a tile and a sequence that reaches it. Pairs
are in order of tiles, and sequences come longest first, so that those that reach a tile are a prefix of the group:

    tile 0: sequences 0 1 2 3 | tile 1: sequences 0 1 2 | tile 2: sequence 0        reach = (4, 3, 1)
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
SCORE_BYTES = 1 << 22
"""Bytes of float32 scores of a group, unless a single sequence has more."""
QUERIES = 64
"""Rows of a chunk taken together."""


class Heads(NamedTuple):
    """What a layer's heads look like on this rank. `ratio`: query heads of a key/value head."""

    num_kv: int
    ratio: int
    dim: int


@dataclass(frozen=True)
class Piece:
    """Pairs that are taken out of the cache together. P pairs, M query rows of a head (padded), X positions of a tile."""

    pairs: slice
    """of the group's pairs"""
    owners: torch.Tensor
    """[P] int64: the sequences of the pairs"""
    entries: torch.Tensor
    """[P X] int64: cache entries (block * block_size + place); positions past the context stand on the sequence's first"""
    mask: torch.Tensor | None
    """[P, 1, M or 1, X] float32, 0 where a row sees a position and -inf where not; None when every row sees all"""


@dataclass(frozen=True)
class Group:
    """n sequences with C rows each."""

    rows: torch.Tensor
    """[n C] int64: rows of the step"""
    count: int
    """C"""
    reach: tuple[int, ...]
    """for each tile, how many sequences reach it"""
    pieces: tuple[Piece, ...]


class Span(NamedTuple):
    """Rows [row, row + num_rows) of the step, a part of chunk `chunk`; the last of them sees positions [0, context)."""

    chunk: int
    row: int
    num_rows: int
    context: int


def plan(
    lens: Sequence[int], contexts: Sequence[int], tables_RB: torch.Tensor, block_size: int, heads: Heads
) -> tuple[Group, ...]:
    """Groups that hold every row of the step once. R chunks, B blocks of a table."""
    starts = list(accumulate(lens, initial=0))
    singles = [Span(r, starts[r], 1, contexts[r]) for r, count in enumerate(lens) if count == 1]
    singles.sort(key=lambda span: -span.context)
    room = max(1, SCORE_BYTES // (4 * TILE * heads.num_kv))
    groups, at = [], 0
    while at < len(singles):
        most = max(1, room // (4 * heads.ratio * _tiles(singles[at])))
        groups.append(_group(singles[at : at + most], tables_RB, block_size, heads))
        at += most
    for r, count in enumerate(lens):
        if count > 1:
            most = min(QUERIES, max(4, room // (heads.ratio * -(-contexts[r] // TILE))))
            for first in range(0, count, most):
                num_rows = min(most, count - first)
                span = Span(r, starts[r] + first, num_rows, contexts[r] - count + first + num_rows)
                groups.append(_group([span], tables_RB, block_size, heads))
    return tuple(groups)


def _tiles(span: Span) -> int:
    return -(-span.context // TILE)


def _group(spans: list[Span], tables_RB: torch.Tensor, block_size: int, heads: Heads) -> Group:
    """Spans of equal row counts, longest context first."""
    count = spans[0].num_rows
    reach = tuple(sum(span.context > t * TILE for span in spans) for t in range(_tiles(spans[0])))
    owner_P = torch.cat([torch.arange(n) for n in reach])
    tile_P = torch.repeat_interleave(torch.arange(len(reach)), torch.tensor(reach))
    context_n = torch.tensor([span.context for span in spans])
    position_PX = tile_P[:, None] * TILE + torch.arange(TILE)
    seen_PX = torch.where(position_PX < context_n[owner_P, None], position_PX, 0)
    table_n = torch.tensor([span.chunk for span in spans])
    entry_PX = tables_RB[table_n[owner_P, None], seen_PX // block_size].long() * block_size + seen_PX % block_size
    visible_PC = context_n[owner_P, None] - count + 1 + torch.arange(count)
    partial = (visible_PC[:, 0] < (tile_P + 1) * TILE).tolist()
    step = max(1, GATHER_BYTES // (4 * TILE * heads.num_kv * heads.dim * max(1, count * heads.ratio // 64)))
    pieces = []
    for begin in range(0, len(partial), step):
        pairs = slice(begin, min(begin + step, len(partial)))
        mask = _mask(position_PX[pairs], visible_PC[pairs], heads.ratio) if any(partial[pairs]) else None
        pieces.append(Piece(pairs, owner_P[pairs], entry_PX[pairs].flatten(), mask))
    rows = torch.cat([torch.arange(span.row, span.row + count) for span in spans])
    return Group(rows, count, reach, tuple(pieces))


def _mask(position_PX: torch.Tensor, visible_PC: torch.Tensor, ratio: int) -> torch.Tensor:
    """Row c sees positions below visible[c]. Padding sees everything, and a single row is the same for all its heads."""
    hidden_PCX = position_PX[:, None] >= visible_PC[:, :, None]
    mask_PCX = torch.zeros(hidden_PCX.shape).masked_fill_(hidden_PCX, -torch.inf)
    if mask_PCX.shape[1] > 1:
        mask_PCX = mask_PCX.repeat_interleave(ratio, dim=1)
        mask_PCX = F.pad(mask_PCX, (0, 0, 0, -mask_PCX.shape[1] % ROW_UNIT))
    return mask_PCX.unsqueeze(1)
