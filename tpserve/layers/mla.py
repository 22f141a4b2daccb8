"""Multi-head latent attention (DeepSeek-V2, 2024, arXiv:2405.04434), its heads split over ranks.

Keys and values of all heads are products of one latent vector a position. That latent, normed, and one rotated key that all
heads share are what is cached; every rank computes and holds them whole. The products are absorbed: a head's query goes
through its key projection into the space of latents, is scored against these themselves, and what it takes of them goes
through its value projection. Nothing is ever expanded to the keys and values of heads.

T rows, H channels, N heads of this rank, P channels of a head's query that are not rotated and R that are, L of the latent,
V of a head's value.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from tpserve.attention.metadata import AttentionMetadata
from tpserve.attention.paged import AttentionParams, KVCache, attend, write_kv
from tpserve.layers.norm import RMSNorm
from tpserve.layers.rope import RotaryPositions
from tpserve.parallel.group import Group
from tpserve.quant.grouped import per_head
from tpserve.quant.matmul import matmul
from tpserve.quant.packed import Stack, Weight, pack, pack_stack
from tpserve.quant.product import Product, of_heads, of_weight


@dataclass(frozen=True)
class QueryUpProj:
    """From a compressed query to this rank's heads, [N (P + R), channels of the compressed one]."""

    norm: RMSNorm
    weight: Weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return matmul(self.norm(x), self.weight)


@dataclass(frozen=True)
class LatentAttention:
    """`down` is three projections in one matrix: of the query (this rank's heads, or compressed), the latent, the shared key."""

    down: Weight
    query_up: QueryUpProj | None
    latent_norm: RMSNorm
    rotated: int
    """R"""
    key_up_NLP: Stack
    value_up_NVL: Stack
    attention_params: AttentionParams
    out: Weight
    tp: Group

    def __call__(
        self, x_TH: torch.Tensor, rotary: RotaryPositions | None, batch: AttentionMetadata, cache: KVCache
    ) -> torch.Tensor:
        assert rotary is not None, "the shared key is rotated"
        num_heads, (rank, plain), rotated = len(self.key_up_NLP), self.key_up_NLP[0].shape, self.rotated
        down = matmul(x_TH, self.down)
        query, latent_TL, key_TR = down.tensor_split((down.shape[1] - rank - rotated, down.shape[1] - rotated), dim=1)
        q = query if self.query_up is None else self.query_up(query)
        q_TNP, q_TNR = q.view(len(x_TH), num_heads, plain + rotated).tensor_split((plain,), dim=2)
        q_TNR, key_T1R = rotary(q_TNR, key_TR.unsqueeze(1))
        write_kv(torch.cat((self.latent_norm(latent_TL).unsqueeze(1), key_T1R), dim=2), None, cache, batch)
        q_TND = torch.cat((per_head(q_TNP, self.key_up_NLP), q_TNR), dim=2)
        taken_TNL = attend(q_TND, cache, batch, self.attention_params)
        mixed_TNV = per_head(taken_TNL, self.value_up_NVL)
        return self.tp.all_reduce(matmul(mixed_TNV.flatten(1), self.out))

    def products(self, dtype: torch.dtype) -> Iterator[Product]:
        """Its products of weights of `dtype`."""
        for weight in (self.down, self.out, *(() if self.query_up is None else (self.query_up.weight,))):
            yield of_weight(weight, dtype)
        yield of_heads(self.key_up_NLP, dtype)
        yield of_heads(self.value_up_NVL, dtype)

    def packed(self) -> "LatentAttention":
        """The same with packed weights."""
        query_up = self.query_up and replace(self.query_up, weight=pack(self.query_up.weight))
        return replace(
            self,
            down=pack(self.down),
            query_up=query_up,
            key_up_NLP=pack_stack(self.key_up_NLP),
            value_up_NVL=pack_stack(self.value_up_NVL),
            out=pack(self.out),
        )
