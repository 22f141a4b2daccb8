"""Multi-head latent attention (MLA; DeepSeek-V2, 2024, arXiv:2405.04434), its heads split over ranks.

The keys and values of all heads are products of one latent vector per position. The cache holds the normed latent and one
rotated key that all heads share; every rank computes and stores both in full. The projections are absorbed: a head's query goes
through its key projection into the latent space and is scored against the latents; the weighted latents then go through its
value projection. The keys and values of heads are never materialised.

Legend: T rows, H hidden channels, N heads of this rank, P channels of a head's query without rotation, R with rotation,
L channels of the latent, V of a head's value, D = L + R.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from tpserve.attention.metadata import AttentionMetadata
from tpserve.attention.paged import AttentionParams, KVCache, attend, write_kv
from tpserve.layers.norm import RMSNorm
from tpserve.layers.packing import Packer
from tpserve.layers.rope import RotaryPositions
from tpserve.layers.row_parallel import row_parallel
from tpserve.parallel.group import Group
from tpserve.quant.grouped import per_head
from tpserve.quant.matmul import matmul
from tpserve.quant.packed import Stack, Weight, stack_shape
from tpserve.quant.product import Product, of_heads, of_weight


@dataclass(frozen=True)
class QueryUpProj:
    """The projection from the compressed query (Q channels) to the heads of this rank. `weight`: [N (P + R), Q]."""

    norm: RMSNorm
    weight: Weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, Q] -> [T, N (P + R)]."""
        return matmul(self.norm(x), self.weight)


@dataclass(frozen=True)
class LatentAttention:
    """One MLA layer on one rank.

    `down`: three projections in one matrix: the query (compressed, or the heads of this rank), the latent and the shared key.
    `key_up_NLP`, `value_up_NVL`: the absorbed projections of each head. `out`: [H, N V].
    """

    down: Weight
    query_up: QueryUpProj | None
    latent_norm: RMSNorm
    rope_dim: int
    """R"""
    key_up_NLP: Stack
    value_up_NVL: Stack
    attention_params: AttentionParams
    out: Weight
    tp: Group

    def __call__(
        self, x_TH: torch.Tensor, rotary: RotaryPositions | None, batch: AttentionMetadata, cache: KVCache
    ) -> torch.Tensor:
        """[T, H] -> [T, H] in the dtype of `x`, summed over ranks. Writes the rows' latents and shared keys to `cache` first."""
        assert rotary is not None, "the shared key is rotated"
        (num_heads, latent_dim, plain_dim), rope_dim = stack_shape(self.key_up_NLP), self.rope_dim
        down = matmul(x_TH, self.down)
        query_dim = down.shape[1] - latent_dim - rope_dim
        query, latent_TL, key_TR = down.tensor_split((query_dim, query_dim + latent_dim), dim=1)
        q = query if self.query_up is None else self.query_up(query)
        q_TNP, q_TNR = q.view(len(x_TH), num_heads, plain_dim + rope_dim).tensor_split((plain_dim,), dim=2)
        q_TND = self._place(q_TNP, q_TNR, latent_TL, key_TR, rotary, batch, cache)
        mixed_TNL = attend(q_TND, cache, batch, self.attention_params)
        return row_parallel(self._values(mixed_TNL).flatten(1), self.out, None, self.tp)

    def _place(
        self,
        q_TNP: torch.Tensor,
        q_TNR: torch.Tensor,
        latent_TL: torch.Tensor,
        key_TR: torch.Tensor,
        rotary: RotaryPositions,
        batch: AttentionMetadata,
        cache: KVCache,
    ) -> torch.Tensor:
        """Write the latents, normed, and the keys, rotated, to the cache; returns the queries, [T, N, D]."""
        norm, latent_dim = self.latent_norm, latent_TL.shape[1]
        if not q_TNP.is_cuda:
            q_TNR, key_T1R = rotary(q_TNR, key_TR.unsqueeze(1))
            write_kv(torch.cat((norm(latent_TL).unsqueeze(1), key_T1R), dim=2), None, cache, batch)
            return torch.cat((per_head(q_TNP, self.key_up_NLP), q_TNR), dim=2)
        from tpserve_kernels import heads

        q_TND = q_TNP.new_empty(*q_TNP.shape[:2], latent_dim + self.rope_dim)
        _write_per_head(q_TNP, self.key_up_NLP, q_TND[..., :latent_dim])
        cache_SD, q_out_TNR = cache.k.view(-1, q_TND.shape[2]), q_TND[..., latent_dim:]
        places = latent_TL, key_TR, q_TNR, q_out_TNR, cache_SD, batch.write_slots
        heads.place_latents(*places, norm.weight_H, norm.eps, norm.offset, rotary.rotation)
        return q_TND

    def _values(self, mixed_TNL: torch.Tensor) -> torch.Tensor:
        """The heads' values of weighted latents, [T, N, V]."""
        if not mixed_TNL.is_cuda:
            return per_head(mixed_TNL, self.value_up_NVL)
        mixed_TNV = mixed_TNL.new_empty(*mixed_TNL.shape[:2], stack_shape(self.value_up_NVL)[1])
        _write_per_head(mixed_TNL, self.value_up_NVL, mixed_TNV)
        return mixed_TNV

    def products(self, dtype: torch.dtype) -> Iterator[Product]:
        """The matrix products of this layer with weights of `dtype`, for the self-test."""
        for weight in (self.down, self.out, *(() if self.query_up is None else (self.query_up.weight,))):
            yield of_weight(weight, dtype)
        yield of_heads(self.key_up_NLP, dtype)
        yield of_heads(self.value_up_NVL, dtype)

    def packed(self, packer: Packer) -> "LatentAttention":
        """A copy with packed weights. The plain heads' matrices, which are parts of one parameter, go with this object."""
        query_up = self.query_up and replace(self.query_up, weight=packer.matrix(self.query_up.weight))
        return replace(
            self,
            down=packer.matrix(self.down),
            query_up=query_up,
            key_up_NLP=packer.stack(self.key_up_NLP),
            value_up_NVL=packer.stack(self.value_up_NVL),
            out=packer.row_parallel(self.out, self.tp),
        )


def _write_per_head(x_TEK: torch.Tensor, stack_ENK: Stack, out_TEN: torch.Tensor) -> None:
    """`per_head` on CUDA, into strided memory: nothing is copied before or after the product."""
    assert isinstance(stack_ENK, torch.Tensor), "nothing is packed on CUDA"
    torch.bmm(x_TEK.transpose(0, 1), stack_ENK.transpose(1, 2), out=out_TEN.transpose(0, 1))
