"""The launch plan of paged attention: the work items of a step, listed on the device, once for all layers of a cache group.

A *tile* is some rows of one request, computed together. An *item* is what a program does at a time: a tile over its whole
context, or over one segment of it. A program of a fixed grid does items i, i + programs, i + 2 programs, ...

    request 0, 1 row, 128k positions    item 0  item 1  ...  item 255      split: a state each, merged in order afterwards
    request 1, 1 row,   1k positions    item 256                           whole
    request 2, 40 rows, 40 positions    item 257  item 258  item 259       three tiles, whole

A request is split when one of its tiles takes more than `SHARE` of what a program does on average, so that no program works much
longer than the others, and while the states have room. No bit of a result depends on that (`attention`).

The host knows the number of requests and of rows, and nothing of the lengths: a plan can be captured in a graph.

Legend: X rows of the block tables, B blocks of a row, R requests, I items and C states at most.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

SEGMENT = 512
"""Positions per segment: long enough that merging is cheap, short enough that one long request fills a GPU."""

MAX_STATE_BYTES = 64 << 20
"""The split stores one float32 vector per (row, head, segment). Requests for which this is too small are not split."""

SHARE = tl.constexpr(4)
"""A tile stays whole while it takes at most one SHARE-th of an average program's work."""

MERGERS = 8
"""Programs of `merge_kernel`, which are small, for each that a card holds of `attention_kernel`."""

WITHOUT_CARD = 2
"""Multiprocessors where there are none: in Triton's interpreter."""


class PagedRequests(NamedTuple):
    """The requests of a step and where their contexts lie.

    Request r owns rows [query_starts[r], query_starts[r + 1]), any number of them, none included; its row j is at position
    context_len - query_len + j. Position p lies in block tables[table_rows[r], p // S], entry p % S, of S entries a block.
    A request whose context_len is 0 pads a graph: nothing is read for its rows.
    """

    tables_XB: torch.Tensor
    """int32; the blocks of a row are adjacent"""
    table_rows_R: torch.Tensor
    """int32, contiguous"""
    query_starts_R1: torch.Tensor
    """[R + 1] int32, contiguous"""
    context_lens_R: torch.Tensor
    """int32, contiguous"""
    num_rows: int
    """at least query_starts[R]"""
    max_query_len: int
    """a host number that no query length exceeds"""
    window: int | None = None
    """a row at position p sees (p - window, p] only; what no row sees is never read"""


@dataclass(frozen=True)
class Tile:
    """The tile of one step of the online softmax, the same for every row of a model."""

    m: int
    """query rows: as many tokens as fit, times the query heads of a key head (or a part of those heads)"""
    n: int
    """context positions; divides SEGMENT"""
    num_warps: int
    num_stages: int
    per_processor: int
    """programs that a multiprocessor holds at a time"""


def tile_of(v_dim: int, dtype: torch.dtype) -> Tile:
    """The tile for values of `v_dim` channels. 64 rows feed Hopper's warp-group matrix units and keep decode memory-bound."""
    if dtype == torch.float32:  # exact products, no matrix units: small tiles that stay in registers
        return Tile(m=16, n=32 if v_dim <= 256 else 16, num_warps=8, num_stages=2, per_processor=1)
    if v_dim > 256:  # latents: the accumulator takes half the registers, the queries a third of the shared memory
        return Tile(m=64, n=32, num_warps=8, num_stages=2, per_processor=1)
    if v_dim > 128:
        return Tile(m=64, n=64, num_warps=8, num_stages=2, per_processor=1)
    return Tile(m=64, n=64, num_warps=4, num_stages=3, per_processor=2)


@dataclass(frozen=True)
class AttentionPlan:
    """The items of a step. Every layer of the group has the heads, the value size and the dtype that it was made for."""

    requests: PagedRequests
    num_heads: int
    num_kv_heads: int
    v_dim: int
    dtype: torch.dtype
    tile: Tile
    counts_2: torch.Tensor
    """int32: how many items there are, and how many tiles are split"""
    items_I4: torch.Tensor
    """int32 rows (request, tile of the request, segment of the tile or -1 for all, its state if it is split)"""
    split_C4: torch.Tensor
    """int32 rows (request, tile of the request, the state of its first segment, undefined); C is 0 when no context is long"""
    acc: torch.Tensor
    """float32, C x N x tile_tokens x E: the weighted values of each split item, written and read by each layer in turn"""
    state: torch.Tensor
    """float32, C x N x tile_tokens x 2: the largest score and the sum of exponentials"""
    num_programs: int
    num_mergers: int

    @property
    def parts(self) -> int:
        """Tiles that share the query heads of a key head."""
        return int(triton.cdiv(self.num_heads // self.num_kv_heads, self.tile.m))

    @property
    def share(self) -> int:
        """Query heads of a tile."""
        return int(triton.cdiv(self.num_heads // self.num_kv_heads, self.parts))

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile that the step's requests can have."""
        return min(self.tile.m // self.share, self.requests.max_query_len)


def plan_attention(requests: PagedRequests, num_heads: int, v_cache_BSKE: torch.Tensor) -> AttentionPlan:
    """The plan for layers of `num_heads` query heads over caches that are like this one. One launch.

    Reads nothing back from the device; its shapes depend on the host numbers of `requests` and on the width of the tables.
    Errors: AssertionError when shapes, dtypes or layouts are not those of `PagedRequests`.
    """
    tables_XB, table_rows_R, query_starts_R1, context_lens_R, num_rows, max_query_len, window = requests
    num_requests, device = len(context_lens_R), context_lens_R.device
    assert query_starts_R1.shape == (num_requests + 1,) and context_lens_R.shape == table_rows_R.shape == (num_requests,)
    assert all(x.dtype == torch.int32 and x.stride(-1) == 1 for x in requests[:4]) and tables_XB.dim() == 2
    assert max_query_len >= 1 and (window is None or window > 0)
    _, page, num_kv_heads, v_dim = v_cache_BSKE.shape
    assert num_heads % num_kv_heads == 0
    tile = tile_of(v_dim, v_cache_BSKE.dtype)
    group = num_heads // num_kv_heads
    tokens = tile.m // triton.cdiv(group, triton.cdiv(group, tile.m))
    head_blocks = num_kv_heads * triton.cdiv(group, tile.m)
    num_tiles = num_requests if max_query_len <= tokens else num_rows // tokens + num_requests
    segments = min(triton.cdiv(tables_XB.shape[1] * page, SEGMENT), _segments_of_window(window, tokens) or 1 << 30)
    state_floats = num_heads * min(tokens, max_query_len)
    num_states = 0 if segments == 1 else min(num_tiles * segments, MAX_STATE_BYTES // (4 * state_floats * (v_dim + 2)))
    programs = num_processors(device) * tile.per_processor

    integers = torch.empty(4 * (1 + num_tiles + 2 * num_states), dtype=torch.int32, device=device)
    counts_2, items, split = integers.split((4, 4 * (num_tiles + num_states), 4 * num_states))
    acc = torch.empty(num_states * state_floats * v_dim, dtype=torch.float32, device=device)
    state = torch.empty(num_states * state_floats * 2, dtype=torch.float32, device=device)
    plan_kernel[(1,)](
        query_starts_R1, context_lens_R, counts_2, items, split, num_requests, num_states, programs,
        TOKENS=tokens, HEAD_BLOCKS=head_blocks, WINDOW=window or 0, MOST=_segments_of_window(window, tokens) or 0,
        SEGMENT=SEGMENT, BLOCK=64, STEPS=32, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    num_mergers = MERGERS * programs
    if max_query_len > 1:  # outside graphs: as many programs as items may be, dealt by the card as they end
        programs = max(programs, num_tiles * head_blocks)
    return AttentionPlan(
        requests, num_heads, num_kv_heads, v_dim, v_cache_BSKE.dtype, tile, counts_2[:2], items.view(-1, 4), split.view(-1, 4),
        acc, state, programs, num_mergers,
    )  # fmt: skip


def _segments_of_window(window: int | None, tokens: int) -> int | None:
    """The most segments that the rows of a tile of `tokens` rows see."""
    return None if window is None else (window + tokens - 1 + SEGMENT - 2) // SEGMENT + 1


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a card."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return WITHOUT_CARD
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit
def _size(starts_ptr, contexts_ptr, request, num_requests, TOKENS: tl.constexpr, WINDOW: tl.constexpr, MOST: tl.constexpr,
          SEGMENT: tl.constexpr):  # fmt: skip
    """How many tiles a request has, and how many segments each of them at most."""
    real = request < num_requests
    query_len = tl.load(starts_ptr + request + 1, mask=real, other=0) - tl.load(starts_ptr + request, mask=real, other=0)
    context = tl.load(contexts_ptr + request, mask=real, other=0)
    last = tl.maximum(context - 1, 0) // SEGMENT
    segments = last + 1
    if WINDOW:
        segments -= tl.maximum(context - query_len - WINDOW + 1, 0) // SEGMENT
        segments = tl.minimum(segments, MOST)
    return (query_len + TOKENS - 1) // TOKENS, segments


@triton.jit(
    do_not_specialize=["num_requests", "num_states", "num_programs"],
    do_not_specialize_on_alignment=["starts_ptr", "contexts_ptr"],
)
def plan_kernel(
    starts_ptr, contexts_ptr, counts_ptr, items_ptr, split_ptr, num_requests, num_states, num_programs,
    TOKENS: tl.constexpr, HEAD_BLOCKS: tl.constexpr, WINDOW: tl.constexpr, MOST: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program, for BLOCK requests at a time, STEPS items of each at a time."""
    lane = tl.arange(0, BLOCK)
    work = 0
    for start in range(0, num_requests, BLOCK):
        tiles, segments = _size(starts_ptr, contexts_ptr, start + lane, num_requests, TOKENS, WINDOW, MOST, SEGMENT)
        work += tl.sum(tiles * segments, axis=0)
    allowed = tl.maximum(work * HEAD_BLOCKS // (SHARE * num_programs), 1)  # segments of a whole tile

    wanted = 0  # states of the requests so far, had all of them room
    num_items = 0
    num_split = 0
    for start in range(0, num_requests, BLOCK):
        request = start + lane
        tiles, segments = _size(starts_ptr, contexts_ptr, request, num_requests, TOKENS, WINDOW, MOST, SEGMENT)
        states = tl.where(segments > allowed, tiles * segments, 0)
        ends = wanted + tl.cumsum(states, axis=0)
        split = (states > 0) & (ends <= num_states)
        split_tiles = tl.where(split, tiles, 0)
        each = tl.where(split, segments, 1)
        items = tiles * each
        first_item = (num_items + tl.cumsum(items, axis=0) - items)[:, None]
        first_tile = (num_split + tl.cumsum(split_tiles, axis=0) - split_tiles)[:, None]
        first_state = (ends - states)[:, None]
        wanted += tl.sum(states, axis=0)
        num_items += tl.sum(items, axis=0)
        num_split += tl.sum(split_tiles, axis=0)
        for step in range(0, tl.max(items, axis=0), STEPS):
            item = step + tl.arange(0, STEPS)[None, :]
            tile = item // each[:, None]
            segment = tl.where(split[:, None], item % each[:, None], -1)
            item_ptr = items_ptr + 4 * (first_item + item)
            written = item < items[:, None]
            tl.store(item_ptr, request[:, None], mask=written)
            tl.store(item_ptr + 1, tile, mask=written)
            tl.store(item_ptr + 2, segment, mask=written)
            tl.store(item_ptr + 3, first_state + item, mask=written)
            tile_ptr = split_ptr + 4 * (first_tile + tile)
            first = written & (segment == 0)
            tl.store(tile_ptr, request[:, None], mask=first)
            tl.store(tile_ptr + 1, tile, mask=first)
            tl.store(tile_ptr + 2, first_state + item, mask=first)
    tl.store(counts_ptr, num_items)
    tl.store(counts_ptr + 1, num_split)


def plan_reference(plan: AttentionPlan) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """The items and the split tiles of a plan, as plain Python makes them from the lengths, without the items' states."""
    _, _, query_starts_R1, context_lens_R, _, _, window = plan.requests
    starts, tokens = query_starts_R1.tolist(), plan.tile.m // plan.share
    most = _segments_of_window(window, tokens)
    sizes: list[tuple[int, int]] = []
    for r, context in enumerate(context_lens_R.tolist()):
        query_len = starts[r + 1] - starts[r]
        first = 0 if window is None else max(0, context - query_len - window + 1) // SEGMENT
        segments = max(context - 1, 0) // SEGMENT + 1 - first
        sizes.append((triton.cdiv(query_len, tokens), segments if most is None else min(segments, most)))
    programs = num_processors(context_lens_R.device) * plan.tile.per_processor
    work = sum(tiles * segments for tiles, segments in sizes) * plan.num_kv_heads * plan.parts
    allowed = max(1, work // (SHARE.value * programs))
    items: list[tuple[int, int, int]] = []
    split: list[tuple[int, int, int]] = []
    wanted = 0
    for r, (tiles, segments) in enumerate(sizes):
        states = tiles * segments if segments > allowed else 0
        if states and wanted + states <= len(plan.split_C4):
            items += [(r, tile, segment) for tile in range(tiles) for segment in range(segments)]
            split += [(r, tile, wanted + tile * segments) for tile in range(tiles)]
        else:
            items += [(r, tile, -1) for tile in range(tiles)]
        wanted += states
    return items, split
