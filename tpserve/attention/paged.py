"""The paged KV cache of a layer (Kwon et al. 2023, arXiv:2309.06180): writes and attention. Triton on CUDA; on the CPU
attention is that of the library of CPU kernels, in torch without it and for float16.

Owns no memory policy: the metadata says which block belongs to which sequence. Invariant: all writes of a step precede its reads.

Legend: T rows, N query heads and K key/value heads of this rank, D channels of a key, E of a value.
"""

from dataclasses import dataclass, replace

import torch

from tpserve.attention import cpu_attention, cpu_plan
from tpserve.attention.metadata import AttentionMetadata
from tpserve_kernels.cpu import attention as native
from tpserve_kernels.cpu import qkv_heads
from tpserve_kernels.cpu.kv_int8 import SCALE_BYTES
from tpserve_kernels.cpu.library import is_native, load


@dataclass(frozen=True)
class KVCache:
    """The cache of one layer: [num_blocks, block_size, K, D] for keys and [num_blocks, block_size, K, E] for values.

    `v` may be a view of the first channels of `k` (latents); then only keys are written. In int8 a head of a position has four
    more bytes, its scale (`tpserve_kernels.cpu.kv_int8`).
    """

    k: torch.Tensor
    v: torch.Tensor

    @property
    def v_in_k(self) -> bool:
        """Whether `v` is a view of `k`."""
        return self.v.data_ptr() == self.k.data_ptr()

    def slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views with a row a slot, [num_blocks * block_size, K, D] and [num_blocks * block_size, K, E]."""
        return self.k.view(-1, *self.k.shape[2:]), self.v.view(-1, *self.v.shape[2:])


@dataclass(frozen=True)
class KVLayout:
    """The cache entry of one position in one layer on this rank: a key of `k_dim` and a value of `v_dim` channels per head.

    `v_in_k`: the value is the first channels of the key (latents). `int8`: instead of in the model's dtype, on the CPU with the
    library of CPU kernels only.
    """

    num_heads: int
    k_dim: int
    v_dim: int
    v_in_k: bool = False
    int8: bool = False

    def num_bytes(self, num_blocks: int, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one layer's cache. `dtype`: the model's."""
        sides = (self.k_dim,) if self.v_in_k else (self.k_dim, self.v_dim)
        head = sum(dim + SCALE_BYTES if self.int8 else dim * dtype.itemsize for dim in sides)
        return num_blocks * block_size * self.num_heads * head

    def empty(self, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        """An uninitialised cache for one layer: attention never reads entries that no plan has written. `dtype`: the model's."""
        scale = SCALE_BYTES if self.int8 else 0

        def side(dim: int) -> torch.Tensor:
            shape = (num_blocks, block_size, self.num_heads, dim + scale)
            return torch.empty(shape, dtype=torch.int8 if self.int8 else dtype, device=device)

        k = side(self.k_dim)
        return KVCache(k, k[..., : self.v_dim] if self.v_in_k else side(self.v_dim))


@dataclass(frozen=True)
class AttentionParams:
    """The parameters of a layer's softmax over `scale` * query * key.

    `cap`: a score s first becomes cap tanh(s / cap) (Gemma 2, arXiv:2408.00118). `sinks`: [N] float32, one more score per head
    in the softmax, whose value is zero (gpt-oss, arXiv:2508.10925).
    """

    scale: float
    cap: float | None = None
    sinks: torch.Tensor | None = None


def no_library() -> str:
    """Why there is no library of CPU kernels; empty when there is one."""
    return load()[1]


def build_metadata(batch: AttentionMetadata, num_heads: int, cache: KVCache) -> AttentionMetadata:
    """The metadata with the attention plan, made once per step for all layers of a cache group; the CPU's kernels need none.

    `num_heads`: N. `cache`: the cache of any layer of the group; only its shape and dtype matter.
    """
    if cache.k.is_cuda:
        from tpserve_kernels.attention_plan import PagedRequests, plan_attention

        assert batch.table_rows is not None
        where = batch.tables, batch.table_rows, batch.query_starts, batch.context_lens
        requests = PagedRequests(*where, len(batch.write_slots), max(batch.query_lens_host), batch.window)
        return replace(batch, plan=plan_attention(requests, num_heads, cache.v))
    if is_native(cache.k) or cache.k.dtype == torch.int8:
        return batch
    _, block_size, num_kv, k_dim = cache.k.shape
    heads = cpu_plan.HeadShape(num_kv, num_heads // num_kv, k_dim, cache.v.shape[3])
    lens, contexts = batch.query_lens_host, batch.context_lens_host
    return replace(batch, tiles=cpu_plan.plan(lens, contexts, batch.tables, block_size, heads, batch.window))


def write_kv(k_TKD: torch.Tensor, v_TKE: torch.Tensor | None, cache: KVCache, batch: AttentionMetadata) -> None:
    """Write each row's key and value to its slot, in place. Rows past `batch.write_slots` are padding.

    Keys and values have the dtype of the cache, or are quantized for one of int8. `v_TKE` is None if and only if `cache.v_in_k`,
    else AssertionError. On the CPU: on CUDA the kernels that rotate keys write them.
    """
    assert (v_TKE is None) == cache.v_in_k
    k_cache_SKD, v_cache_SKE = cache.slots()
    if is_native(k_TKD):
        qkv_heads.write_kv(k_TKD, v_TKE, k_cache_SKD, v_cache_SKE, batch.write_slots)
        return
    written = len(batch.write_slots)
    k_cache_SKD.index_copy_(0, batch.write_slots, k_TKD[:written])
    if v_TKE is not None:
        cache.v.flatten(0, 1).index_copy_(0, batch.write_slots, v_TKE[:written])


def attend(q_TND: torch.Tensor, cache: KVCache, batch: AttentionMetadata, attention_params: AttentionParams) -> torch.Tensor:
    """softmax(scale q K^T) V for each row, over what it sees of its own sequence: [T, N, E] in the dtype of `q`.

    `batch` comes from `build_metadata`. The keys and values of the rows are in the cache already. On the CPU padding rows are
    zero, on CUDA undefined.
    """
    scale, cap, sinks = attention_params.scale, attention_params.cap, attention_params.sinks
    if not q_TND.is_cuda:
        if not is_native(q_TND):
            return cpu_attention.attend(q_TND, cache.k, cache.v, batch.tiles, scale, cap, sinks)
        where = batch.tables, batch.query_starts, batch.context_lens
        return native.paged_attention(
            native.AttentionInputs(q_TND, cache.k, cache.v, *where, scale, batch.window, cap, sinks)
        )  # fmt: skip
    from tpserve_kernels import attention

    assert batch.plan is not None
    return attention.paged_attention(q_TND, cache.k, cache.v, batch.plan, scale, cap, sinks)
