"""Allocates the parameters of one tensor-parallel rank, as `rank_weights` declares them, and builds its layers from them."""

from functools import partial

import torch

from tpserve.attention.paged import AttentionParams, KVLayout
from tpserve.layers import activation
from tpserve.layers.attention import Attention
from tpserve.layers.block import Block
from tpserve.layers.expert_load import ExpertLoadCounter
from tpserve.layers.mla import LatentAttention, QueryUpProj
from tpserve.layers.mlp import MLP
from tpserve.layers.moe import Experts, MoE
from tpserve.layers.norm import AllHeadsNorm, HeadNorm, LayerNorm, Norm, RMSNorm
from tpserve.layers.routing import Routing
from tpserve.models.rank_weights import (
    AttentionWeights,
    LatentAttentionWeights,
    MLPWeights,
    MoEWeights,
    NormWeights,
    RankWeights,
    Sources,
)
from tpserve.parallel.group import Group
from tpserve.types.model_spec import ExpertsSpec, LatentSpec, ModelSpec
from tpserve.weights.parameter import Parameter


class Shard:
    """Rank `tp.rank`'s share of `spec`. `parameters` lists every parameter allocated so far."""

    def __init__(
        self, spec: ModelSpec, tp: Group, dtype: torch.dtype, device: torch.device, expert_parallel: bool = False
    ) -> None:
        self.spec = spec
        self.weights = RankWeights(spec, tp.size, tp.rank, expert_parallel)
        self.parameters: list[Parameter] = []
        heads, shares = self.weights.heads, self.weights.head_shares
        self._first_of_kv = next(rank for rank, share in enumerate(shares) if share.kv == heads.kv) == tp.rank
        self._tp = tp
        self._dtype = dtype
        self._device = device

    def kv_layout(self) -> KVLayout:
        """The cache of a layer of this rank."""
        return KVLayout(*self.weights.kv_shape())

    def tensor(self, sources: Sources, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Allocate a parameter; `dtype` defaults to the model's."""
        self.parameters.append(Parameter.empty(sources, dtype or self._dtype, self._device))
        return self.parameters[-1].tensor

    def optional(self, sources: Sources | None, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        """Allocate a parameter where one is declared."""
        return None if sources is None else self.tensor(sources, dtype)

    def norm(self, declared: NormWeights | None) -> Norm | None:
        """A norm of the residual stream where one is declared."""
        return None if declared is None else self._norm(declared)

    def block(self, layer: int, expert_load: ExpertLoadCounter) -> Block:
        """Layer number `layer` of the whole model. Its experts count their tokens in `expert_load`."""
        declared = self.weights.layer(layer)
        attention, mlp = declared.attention, declared.mlp
        return Block(
            norm_place=self.spec.norm_place,
            attention_norm=self._norm(declared.attention_norm),
            attention=self._attention(attention) if isinstance(attention, AttentionWeights) else self._latent(attention),
            mlp_norm=self._norm(declared.mlp_norm),
            mlp=self._mlp(mlp) if isinstance(mlp, MLPWeights) else self._moe(mlp, expert_load.of(layer)),
            residual_scale=self.spec.residual_scale,
            attention_out_norm=self.norm(declared.attention_out_norm),
            mlp_out_norm=self.norm(declared.mlp_out_norm),
        )

    def _norm(self, declared: NormWeights) -> Norm:
        spec, weight = self.spec, self.optional(declared.weight)
        if spec.norm == "layer":
            return LayerNorm(weight, self.optional(declared.bias), spec.norm_eps)
        assert weight is not None, "RMS norms have weights"
        return RMSNorm(weight, spec.norm_eps, spec.norm_offset)

    def _attention(self, declared: AttentionWeights) -> Attention:
        spec, heads = self.spec, self.weights.heads
        scale = spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
        return Attention(
            num_heads=len(heads.q),
            num_kv_heads=len(heads.kv),
            head_dim=spec.head_dim,
            qkv=self.tensor(declared.qkv),
            qkv_bias=self.optional(declared.qkv_bias),
            qk_norm=self._qk_norm(declared),
            attention_params=AttentionParams(scale, spec.scores_cap, self.optional(declared.sinks, torch.float32)),
            out=self.tensor(declared.out),
            out_bias=self.optional(declared.out_bias),
            tp=self._tp,
        )

    def _qk_norm(self, declared: AttentionWeights) -> HeadNorm | AllHeadsNorm | None:
        spec = self.spec
        q, k = self.optional(declared.q_norm), self.optional(declared.k_norm)
        if q is None or k is None:
            return None
        if spec.qk_norm == "head":
            return HeadNorm(q, k, spec.norm_eps, spec.norm_offset)
        return AllHeadsNorm(
            q,
            k,
            eps=spec.norm_eps,
            num_q=spec.num_heads * spec.head_dim,
            num_k=spec.num_kv_heads * spec.head_dim,
            counts_k=self._first_of_kv,
            tp=self._tp,
        )

    def _latent(self, declared: LatentAttentionWeights) -> LatentAttention:
        spec, latent, num_heads = self.spec, self.spec.latent, len(self.weights.heads.q)
        assert latent is not None and spec.attention_scale is not None, "families with latents set the scale"
        kv_up = self.tensor(declared.kv_up).view(num_heads, latent.nope_dim + latent.v_dim, latent.kv_rank)
        key_up_NPL, value_up_NVL = kv_up.tensor_split((latent.nope_dim,), dim=1)
        return LatentAttention(
            down=self.tensor(declared.down),
            query_up=self._query_up(declared, latent),
            latent_norm=RMSNorm(self.tensor(declared.latent_norm), latent.norm_eps),
            rope_dim=latent.rope_dim,
            key_up_NLP=key_up_NPL.transpose(1, 2),
            value_up_NVL=value_up_NVL,
            attention_params=AttentionParams(spec.attention_scale),
            out=self.tensor(declared.out),
            tp=self._tp,
        )

    def _query_up(self, declared: LatentAttentionWeights, latent: LatentSpec) -> QueryUpProj | None:
        if declared.query_norm is None or declared.query_up is None:
            return None
        return QueryUpProj(RMSNorm(self.tensor(declared.query_norm), latent.norm_eps), self.tensor(declared.query_up))

    def _mlp(self, declared: MLPWeights) -> MLP:
        spec = self.spec
        return MLP(
            up=self.tensor(declared.up),
            up_bias=self.optional(declared.up_bias),
            activate=(activation.GATED_ACTIVATIONS if spec.gated else activation.ACTIVATIONS)[spec.activation],
            down=self.tensor(declared.down),
            down_bias=self.optional(declared.down_bias),
            tp=self._tp,
        )

    def _moe(self, declared: MoEWeights, expert_load_E: torch.Tensor) -> MoE:
        experts = self.spec.experts
        assert experts is not None, "a layer with experts"
        return MoE(
            router=self.tensor(declared.router, torch.float32),
            routing=Routing(experts.routing, self.optional(declared.router_bias, torch.float32)),
            experts=self._experts(declared, experts),
            shared=None if declared.shared is None else self._mlp(declared.shared),
            expert_load=expert_load_E,
            tp=self._tp,
        )

    def _experts(self, declared: MoEWeights, experts: ExpertsSpec) -> Experts:
        local, hidden, clamped = declared.local_experts, self.spec.hidden_size, experts.clamped
        activate = activation.GATED_ACTIVATIONS[self.spec.activation]
        if clamped is not None:
            activate = partial(activation.clamped_swiglu, alpha=clamped.alpha, limit=clamped.limit)
        gate_up_bias, down_bias = self.optional(declared.gate_up_bias), self.optional(declared.down_bias)
        return Experts(
            count=experts.count,
            local_experts=local,
            gate_up_EI2H=self.tensor(declared.gate_up).view(len(local), -1, hidden),
            gate_up_bias_EI2=None if gate_up_bias is None else gate_up_bias.view(len(local), -1),
            activate=activate,
            down_EHI=self.tensor(declared.down).view(len(local), hidden, -1),
            down_bias_EH=None if down_bias is None else down_bias.view(len(local), hidden),
        )
