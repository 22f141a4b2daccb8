"""Multi-head latent attention (DeepSeek-V2, 2024, arXiv:2405.04434), its heads split over ranks.

Keys and values of all heads are products of one latent vector a position. That latent, normed, and one rotated key that all
heads share are what is cached; every rank computes and holds them whole. The products are absorbed: a head's query goes
through its key projection into the space of latents, is scored against these themselves, and what it takes of them goes
through its value projection. Nothing is ever expanded to the keys and values of heads.

T rows, H channels, N heads of this rank, P channels of a head's query that are not rotated and R that are, L of the latent,
V of a head's value.
"""

from dataclasses import dataclass, replace

import torch

from tpserve.attention.batch import AttentionBatch
from tpserve.attention.paged import KVCache, Scoring, attend, write_kv
from tpserve.layers.norm import RMSNorm
from tpserve.layers.rope import Turn
from tpserve.parallel.group import Group
from tpserve.quant.matmul import matmul
from tpserve.quant.packed import Weight, pack


@dataclass(frozen=True)
class QueryUp:
    """From a compressed query to this rank's heads, [N (P + R), channels of the compressed one]."""

    norm: RMSNorm
    weight: Weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return matmul(self.norm(x), self.weight)


@dataclass(frozen=True)
class LatentAttention:
    """`down` is three projections in one matrix: of the query (this rank's heads, or compressed), the latent, the shared key."""

    down: Weight
    query_up: QueryUp | None
    latent_norm: RMSNorm
    rotated: int
    """R"""
    key_up_NPL: torch.Tensor
    value_up_NVL: torch.Tensor
    scoring: Scoring
    out: Weight
    tp: Group

    def __call__(self, x_TH: torch.Tensor, turn: Turn | None, batch: AttentionBatch, cache: KVCache) -> torch.Tensor:
        assert turn is not None, "the shared key is rotated"
        (num_heads, plain, rank), rotated = self.key_up_NPL.shape, self.rotated
        down = matmul(x_TH, self.down)
        query, latent_TL, key_TR = down.tensor_split((down.shape[1] - rank - rotated, down.shape[1] - rotated), dim=1)
        q = query if self.query_up is None else self.query_up(query)
        q_TNP, q_TNR = q.view(len(x_TH), num_heads, plain + rotated).tensor_split((plain,), dim=2)
        q_TNR, key_T1R = turn(q_TNR, key_TR.unsqueeze(1))
        write_kv(torch.cat((self.latent_norm(latent_TL).unsqueeze(1), key_T1R), dim=2), None, cache, batch)
        q_TND = torch.cat((per_head(q_TNP, self.key_up_NPL), q_TNR), dim=2)
        taken_TNL = attend(q_TND, cache, batch, self.scoring)
        mixed_TNV = per_head(taken_TNL, self.value_up_NVL.transpose(1, 2))
        return self.tp.all_reduce(matmul(mixed_TNV.flatten(1), self.out))

    def packed(self) -> "LatentAttention":
        """The same with packed weights, those of the heads apart from one another."""
        query_up = self.query_up and replace(self.query_up, weight=pack(self.query_up.weight))
        key_up_NPL, value_up_NVL = self.key_up_NPL.contiguous(), self.value_up_NVL.contiguous()
        return replace(
            self,
            down=pack(self.down),
            query_up=query_up,
            key_up_NPL=key_up_NPL,
            value_up_NVL=value_up_NVL,
            out=pack(self.out),
        )


def per_head(x_TNK: torch.Tensor, weight_NKM: torch.Tensor) -> torch.Tensor:
    """Each head's rows times its own matrix: [T, N, M].

    Rows come in multiples of four and the number of matrices is the layer's: then a row's bits do not depend on the others.
    """
    return torch.bmm(x_TNK.transpose(0, 1), weight_NKM).transpose(0, 1)
