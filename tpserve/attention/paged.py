"""A layer's paged key/value cache: writing to it and attending over it. Triton on CUDA, plain torch elsewhere.

Owns no memory policy: which block belongs to whom is the batch's word. Every write of a step precedes its reads.
"""

from dataclasses import dataclass, replace

import torch

from tpserve.attention import cpu_attention, cpu_plan
from tpserve.attention.metadata import AttentionMetadata


@dataclass(frozen=True)
class KVCache:
    """One layer's cache: [num_blocks, block_size, key/value heads of this rank, channels] for keys and for values.

    `v` may be a view of the first channels of `k`; then there is nothing else to write.
    """

    k: torch.Tensor
    v: torch.Tensor

    @property
    def v_in_k(self) -> bool:
        return self.v.data_ptr() == self.k.data_ptr()


@dataclass(frozen=True)
class KVLayout:
    """What a position leaves in one layer on this rank: a key of `k_dim` and a value of `v_dim` channels for each head.

    `v_in_k`: the value is the first channels of the key (latents).
    """

    num_heads: int
    k_dim: int
    v_dim: int
    v_in_k: bool = False

    def num_bytes(self, num_blocks: int, block_size: int, dtype: torch.dtype) -> int:
        channels = self.k_dim if self.v_in_k else self.k_dim + self.v_dim
        return num_blocks * block_size * self.num_heads * channels * dtype.itemsize

    def empty(self, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        """A layer's cache, unwritten: attention never reads what no plan has written."""

        def side(dim: int) -> torch.Tensor:
            return torch.empty((num_blocks, block_size, self.num_heads, dim), dtype=dtype, device=device)

        k = side(self.k_dim)
        return KVCache(k, k[..., : self.v_dim] if self.v_in_k else side(self.v_dim))


@dataclass(frozen=True)
class AttentionParams:
    """How a layer weighs what a row sees: the softmax of `scale` times query times key.

    `cap`: a score s becomes cap tanh(s / cap) first (Gemma 2). `sinks`: [query heads of this rank] float32, for each head one
    more score in the softmax, which takes weight and gives no value (gpt-oss).
    """

    scale: float
    cap: float | None = None
    sinks: torch.Tensor | None = None


def build_metadata(batch: AttentionMetadata, num_heads: int, cache: KVCache) -> AttentionMetadata:
    """The batch with what its attention needs worked out, once a step for all layers of its cache group.

    `cache`: any of theirs; only its shape counts.
    """
    if cache.k.is_cuda:
        return batch
    _, block_size, num_kv, k_dim = cache.k.shape
    heads = cpu_plan.HeadShape(num_kv, num_heads // num_kv, k_dim, cache.v.shape[3])
    lens, contexts = batch.query_lens_host, batch.context_lens_host
    return replace(batch, tiles=cpu_plan.plan(lens, contexts, batch.tables, block_size, heads, batch.window))


def write_kv(k_TKD: torch.Tensor, v_TKE: torch.Tensor | None, cache: KVCache, batch: AttentionMetadata) -> None:
    """Put each row's key and value where the batch says, in place; rows past the batch's are padding.

    `v_TKE`: None where the cache has the value in the key.
    """
    assert (v_TKE is None) == cache.v_in_k
    if k_TKD.is_cuda:
        from tpserve_kernels import kv

        kv.write_kv(k_TKD, v_TKE, cache.k, cache.v, batch.write_slots)
        return
    rows = len(batch.write_slots)
    cache.k.flatten(0, 1).index_copy_(0, batch.write_slots, k_TKD[:rows])
    if v_TKE is not None:
        cache.v.flatten(0, 1).index_copy_(0, batch.write_slots, v_TKE[:rows])


def attend(q_TND: torch.Tensor, cache: KVCache, batch: AttentionMetadata, attention_params: AttentionParams) -> torch.Tensor:
    """Attention of every row of the batch, made `build_metadata`, over what it sees of its own sequence: [T, N, channels of a
    value]."""
    if not q_TND.is_cuda:
        return cpu_attention.attend(
            q_TND, cache.k, cache.v, batch.tiles, attention_params.scale, attention_params.cap, attention_params.sinks
        )
    from tpserve_kernels import attention

    return attention.paged_attention(
        q_TND, cache.k, cache.v, batch.tables, batch.query_starts, batch.context_lens, max(batch.query_lens_host),
        attention_params.scale, batch.window, attention_params.cap, attention_params.sinks,
    )  # fmt: skip
