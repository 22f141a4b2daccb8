"""A layer's paged key/value cache: writing to it and attending over it. Triton on CUDA, plain torch elsewhere.

Owns no memory policy: which block belongs to whom is the batch's word. Every write of a step precedes its reads.
"""

from dataclasses import dataclass, replace

import torch

from tpserve.attention import tiled, tiles
from tpserve.attention.batch import AttentionBatch


@dataclass(frozen=True)
class KVCache:
    """One layer's cache, each tensor [num_blocks, block_size, key/value heads of this rank, head_dim]."""

    k: torch.Tensor
    v: torch.Tensor


def ready(batch: AttentionBatch, num_heads: int, cache: KVCache) -> AttentionBatch:
    """The batch with what its attention needs worked out, once a step for all layers with such heads and caches."""
    if cache.k.is_cuda:
        return batch
    _, block_size, num_kv, dim = cache.k.shape
    heads = tiles.Heads(num_kv, num_heads // num_kv, dim)
    return replace(batch, tiles=tiles.plan(batch.query_lens_host, batch.context_lens_host, batch.tables, block_size, heads))


def write_kv(k_TKD: torch.Tensor, v_TKD: torch.Tensor, cache: KVCache, batch: AttentionBatch) -> None:
    """Put each row's key and value where the batch says, in place; rows past the batch's are padding."""
    if k_TKD.is_cuda:
        from tpserve_kernels import kv

        kv.write_kv(k_TKD, v_TKD, cache.k, cache.v, batch.write_slots)
        return
    rows = len(batch.write_slots)
    cache.k.flatten(0, 1).index_copy_(0, batch.write_slots, k_TKD[:rows])
    cache.v.flatten(0, 1).index_copy_(0, batch.write_slots, v_TKD[:rows])


def attend(q_TND: torch.Tensor, cache: KVCache, batch: AttentionBatch, scale: float) -> torch.Tensor:
    """Causal attention of every chunk of the batch, made `ready`, over its own sequence: [T, N, D]."""
    if not q_TND.is_cuda:
        return tiled.attend(q_TND, cache.k, cache.v, batch.tiles, scale)
    from tpserve_kernels import attention

    return attention.paged_attention(
        q_TND, cache.k, cache.v, batch.tables, batch.query_starts, batch.context_lens, max(batch.query_lens_host), scale
    )
