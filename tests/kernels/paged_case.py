"""Inputs of `paged_attention` for any mix of requests, with NaN wherever nothing may be read."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from tpserve_kernels.attention import paged_attention
from tpserve_kernels.attention_plan import AttentionPlan, PagedRequests, plan_attention

PagedArguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, PagedRequests]
NOBODY = 1 << 28
"""A block that there is not: in rows of the tables that are no request's, and behind what a request has."""


@dataclass(frozen=True)
class PagedCase:
    """Requests as (query length, context length) pairs, and the model's shape. `latent`: values are so many channels of keys."""

    requests: tuple[tuple[int, int], ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    page: int = 16
    dtype: torch.dtype = torch.float32
    latent: int | None = None
    window: int | None = None
    cap: float | None = None
    sinks: bool = False

    def arguments(self, device: str, seed: int = 0) -> PagedArguments:
        """q, k_cache, v_cache, requests. Blocks are dealt at random; block 0 is nobody's, nor are two rows of the tables."""
        generator = torch.Generator().manual_seed(seed)
        query_lens, context_lens = zip(*self.requests, strict=True)
        num_blocks = [-(-context // self.page) for context in context_lens]
        tables_XB = torch.full((len(num_blocks) + 2, max(num_blocks) + 1), NOBODY, dtype=torch.int32)
        table_rows = torch.randperm(len(num_blocks) + 2, generator=generator)[: len(num_blocks)].int()
        shuffled = (1 + torch.randperm(sum(num_blocks), generator=generator)).int()
        for row, blocks in zip(table_rows, shuffled.split(num_blocks), strict=True):
            tables_XB[row, : len(blocks)] = blocks
        shape = (sum(num_blocks) + 1, self.page, self.num_kv_heads, self.head_dim)
        caches = [torch.full(shape, float("nan")) for _ in range(2)]
        for cache_BSKD in caches:
            for row, (count, context) in zip(table_rows, self.requests, strict=True):
                values = torch.randn(context, *shape[2:], generator=generator)
                position_P = torch.arange(max(0, context - count + 1 - self.window) if self.window else 0, context)
                cache_BSKD[tables_XB[row, position_P // self.page].long(), position_P % self.page] = values[position_P]
        q_TND = torch.randn(sum(query_lens), self.num_heads, self.head_dim, generator=generator)
        q, k, v = (x.to(device, self.dtype) for x in (q_TND, *caches))
        requests = paged_requests(tables_XB.to(device), table_rows.to(device), query_lens, context_lens, self.window)
        return q, k, v if self.latent is None else k[..., : self.latent], requests

    def scoring(self, device: str) -> dict[str, Any]:
        """What `paged_attention` is told of the cap and sinks."""
        sinks = torch.linspace(-1, 5, self.num_heads, device=device) if self.sinks else None
        return {"cap": self.cap, "sinks_N": sinks}


def paged_requests(
    tables_XB: torch.Tensor,
    table_rows_R: torch.Tensor,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    window: int | None = None,
) -> PagedRequests:
    """Requests of these lengths, on the tables' device."""
    lens = list(accumulate(query_lens, initial=0)), list(context_lens)
    starts, contexts = (torch.tensor(x, dtype=torch.int32, device=tables_XB.device) for x in lens)
    return PagedRequests(tables_XB, table_rows_R, starts, contexts, sum(query_lens), max(query_lens), window)


def attend(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, requests: PagedRequests, scale: float = 0.25, **scoring: Any
) -> torch.Tensor:
    """Attention under a plan of its own."""
    plan = plan_attention(requests, q.shape[1], v_cache)
    return paged_attention(q, k_cache, v_cache, plan, scale, **scoring)


def listed(plan: AttentionPlan) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The items and the split tiles, as `plan_reference` lists them."""
    counts = plan.counts_2.tolist()
    items, split = (
        [tuple(row[:3]) for row in rows[:count].tolist()]
        for rows, count in zip((plan.items_I4, plan.split_C4), counts, strict=True)
    )
    return items, split
