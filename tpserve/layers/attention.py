"""The attention block (Vaswani et al. 2017, arXiv:1706.03762) with grouped-query attention (GQA, Ainslie et al. 2023,
arXiv:2305.13245). Its heads are split over ranks.

Legend: T rows, H hidden channels, N query heads and K key/value heads of this rank, D channels of a head, A = N + 2 K.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from tpserve.attention.metadata import AttentionMetadata
from tpserve.attention.paged import AttentionParams, KVCache, attend, write_kv
from tpserve.layers.norm import AllHeadsNorm, HeadNorm
from tpserve.layers.packing import Packer
from tpserve.layers.rope import RotaryPositions
from tpserve.layers.row_parallel import row_parallel
from tpserve.parallel.group import Group
from tpserve.quant.matmul import matmul
from tpserve.quant.packed import Weight
from tpserve.quant.product import Product, of_weight
from tpserve_kernels.cpu import qkv_heads
from tpserve_kernels.cpu.library import is_native


@dataclass(frozen=True)
class Attention:
    """Projections, rotation, cache and attention of one layer on one rank.

    `qkv`: the query, key and value projections as one matrix [(N + 2 K) D, H]; `out`: [H, N D]. `out_bias` [H] is added once,
    after the sum over ranks.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv: Weight
    qkv_bias: torch.Tensor | None
    qk_norm: HeadNorm | AllHeadsNorm | None
    attention_params: AttentionParams
    out: Weight
    out_bias: torch.Tensor | None
    tp: Group

    def __call__(
        self, x_TH: torch.Tensor, rotary: RotaryPositions | None, batch: AttentionMetadata, cache: KVCache
    ) -> torch.Tensor:
        """[T, H] -> [T, H] in the dtype of `x`, summed over ranks. Writes the keys and values of the rows to `cache` first.

        `rotary` None: the layer has no positions. Rows past the batch are padding.
        """
        fuses_bias = x_TH.is_cuda and not isinstance(self.qk_norm, AllHeadsNorm)
        qkv = matmul(x_TH, self.qkv, None if fuses_bias else self.qkv_bias)
        heads_TAD = qkv.view(len(x_TH), -1, self.head_dim)
        q_TND, k_TKD, v_TKD = heads_TAD.tensor_split((self.num_heads, self.num_heads + self.num_kv_heads), dim=1)
        q_TND = self._place(q_TND, k_TKD, v_TKD, rotary, batch, cache)
        mixed_TND = attend(q_TND, cache, batch, self.attention_params)
        return row_parallel(mixed_TND.flatten(1), self.out, self.out_bias, self.tp)

    def _place(
        self,
        q_TND: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        rotary: RotaryPositions | None,
        batch: AttentionMetadata,
        cache: KVCache,
    ) -> torch.Tensor:
        """Write the keys, normed and rotated, and the values to the cache; returns such queries. May overwrite `q`.

        On CUDA the bias is added first, except before a norm over all heads.
        """
        norm, bias = self.qk_norm, self.qkv_bias
        if isinstance(norm, AllHeadsNorm):
            (q_TND, k_TKD), norm, bias = norm(q_TND, k_TKD), None, None
        norms = None if norm is None else norm.weights
        rotation = None if rotary is None else rotary.rotation
        if q_TND.is_cuda:
            from tpserve_kernels import heads

            return heads.place_heads(q_TND, k_TKD, v_TKD, *cache.slots(), batch.write_slots, norms, rotation, bias)
        if is_native(q_TND):
            return qkv_heads.place_heads(q_TND, k_TKD, v_TKD, *cache.slots(), batch.write_slots, norms, rotation)
        if norm is not None:
            q_TND, k_TKD = norm(q_TND, k_TKD)
        if rotary is not None:
            q_TND, k_TKD = rotary(q_TND, k_TKD)
        write_kv(k_TKD, v_TKD, cache, batch)
        return q_TND

    def products(self, dtype: torch.dtype) -> Iterator[Product]:
        """The matrix products of this layer with weights of `dtype`, for the self-test."""
        yield of_weight(self.qkv, dtype)
        yield of_weight(self.out, dtype)

    def packed(self, packer: Packer) -> "Attention":
        """A copy with packed weights."""
        return replace(self, qkv=packer.matrix(self.qkv), out=packer.row_parallel(self.out, self.tp))
