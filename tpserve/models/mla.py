"""Cuts latent attention for one tensor-parallel rank: heads are split, the latent and what it is made of are held whole."""

from collections.abc import Callable

import torch

from tpserve.attention.paged import AttentionParams
from tpserve.layers.mla import LatentAttention, QueryUpProj
from tpserve.layers.norm import RMSNorm
from tpserve.parallel.group import Group
from tpserve.types.model_spec import LatentSpec, ModelSpec
from tpserve.weights.names import WeightNames
from tpserve.weights.parameter import Source

Tensor = Callable[..., torch.Tensor]
"""Allocates a parameter of the sources given, one below the other."""


def latent_attention(
    spec: ModelSpec, latent: LatentSpec, names: WeightNames, prefix: str, heads: range, tensor: Tensor, tp: Group
) -> LatentAttention:
    """The attention of the layer whose names begin with `prefix`; `heads`: this rank's."""
    own, q = names.latent, range(heads.start * spec.head_dim, heads.stop * spec.head_dim)
    queries, hidden, rank = spec.num_heads * spec.head_dim, spec.hidden_size, latent.kv_rank

    def rows(name: str, whole: int, inputs: int, taken: range | None = None) -> Source:
        return Source(f"{prefix}{name}.weight", (whole, inputs), 0, taken or range(whole))

    def norm(name: str, size: int) -> RMSNorm:
        return RMSNorm(tensor(Source(f"{prefix}{name}.weight", (size,), 0, range(size))), latent.norm_eps)

    query, query_up = rows(names.q, queries, hidden, q), None
    if latent.q_rank is not None:
        query = rows(own.q_down, latent.q_rank, hidden)
        query_up = QueryUpProj(norm(own.q_norm, latent.q_rank), tensor(rows(own.q_up, queries, latent.q_rank, q)))
    both = latent.nope_dim + latent.v_dim
    up = tensor(rows(own.kv_up, spec.num_heads * both, rank, range(heads.start * both, heads.stop * both)))
    key_up_NPL, value_up_NVL = up.view(len(heads), both, rank).tensor_split((latent.nope_dim,), dim=1)
    values = range(heads.start * latent.v_dim, heads.stop * latent.v_dim)
    assert spec.attention_scale is not None, "families with latents say it"
    return LatentAttention(
        down=tensor(query, rows(own.kv_down, rank + latent.rope_dim, hidden)),
        query_up=query_up,
        latent_norm=norm(own.kv_norm, rank),
        rope_dim=latent.rope_dim,
        key_up_NLP=key_up_NPL.transpose(1, 2),
        value_up_NVL=value_up_NVL,
        attention_params=AttentionParams(spec.attention_scale),
        out=tensor(Source(f"{prefix}{names.o}.weight", (hidden, spec.num_heads * latent.v_dim), 1, values)),
        tp=tp,
    )
