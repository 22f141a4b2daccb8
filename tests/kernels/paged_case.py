"""Inputs of `paged_attention` for any mix of requests, with NaN wherever nothing may be read."""

from dataclasses import dataclass
from typing import Any

import torch

PagedArguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


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
        """q, k_cache, v_cache, tables, query_starts, context_lens. Blocks are dealt at random; block 0 is nobody's."""
        generator = torch.Generator().manual_seed(seed)
        query_lens, context_lens = zip(*self.requests, strict=True)
        num_blocks = [-(-context // self.page) for context in context_lens]
        tables_RB = torch.zeros(len(num_blocks), max(num_blocks) + 1, dtype=torch.int32)
        shuffled = (1 + torch.randperm(sum(num_blocks), generator=generator)).int()
        for row_B, blocks in zip(tables_RB, shuffled.split(num_blocks), strict=True):
            row_B[: len(blocks)] = blocks
        shape = (sum(num_blocks) + 1, self.page, self.num_kv_heads, self.head_dim)
        caches = [torch.full(shape, float("nan")) for _ in range(2)]
        for cache_BSKD in caches:
            for row_B, (count, context) in zip(tables_RB, self.requests, strict=True):
                values = torch.randn(context, *shape[2:], generator=generator)
                position_P = torch.arange(max(0, context - count + 1 - self.window) if self.window else 0, context)
                cache_BSKD[row_B[position_P // self.page].long(), position_P % self.page] = values[position_P]
        q_TND = torch.randn(sum(query_lens), self.num_heads, self.head_dim, generator=generator)
        starts = torch.tensor([0, *query_lens]).cumsum(0).int()
        q, k, v = (x.to(device, self.dtype) for x in (q_TND, *caches))
        tables, query_starts, contexts = (
            x.to(device) for x in (tables_RB, starts, torch.tensor(context_lens, dtype=torch.int32))
        )
        return q, k, v if self.latent is None else k[..., : self.latent], tables, query_starts, contexts

    def scoring(self, device: str) -> dict[str, Any]:
        """What `paged_attention` is told of windows, the cap and sinks."""
        sinks = torch.linspace(-1, 5, self.num_heads, device=device) if self.sinks else None
        return {"window": self.window, "cap": self.cap, "sinks_N": sinks}

    @property
    def max_query_len(self) -> int:
        return max(query_len for query_len, _ in self.requests)
