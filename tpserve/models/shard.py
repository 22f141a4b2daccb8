"""Cuts a model for one tensor-parallel rank: allocates its parameters and builds its layers from them.

Heads, MLP channels and vocabulary are split; norms, learned positions, the projections of an embedding of its own width and
the biases after a sum over ranks are held whole by every rank.
"""

from dataclasses import replace
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch

from tpserve.attention.paged import AttentionParams, KVLayout
from tpserve.layers import activation
from tpserve.layers.attention import Attention
from tpserve.layers.block import Block
from tpserve.layers.mla import LatentAttention
from tpserve.layers.mlp import MLP
from tpserve.layers.moe import Experts, MoE
from tpserve.layers.norm import AllHeadsNorm, HeadNorm, LayerNorm, Norm, RMSNorm
from tpserve.layers.routing import Routing
from tpserve.models import names_of
from tpserve.models.expert_weights import ExpertWeights
from tpserve.models.mla import latent_attention
from tpserve.models.units import MLP_UNIT, VOCAB_UNIT
from tpserve.parallel.group import Group
from tpserve.parallel.split import split, split_heads
from tpserve.types.model_spec import ExpertsSpec, ModelSpec
from tpserve.weights.parameter import Parameter, Source


class RowRange(NamedTuple):
    """Outputs `taken` of the `whole` ones of a checkpoint's projection."""

    name: str
    whole: int
    taken: range


class Shard:
    """Rank `tp.rank`'s share of `spec`. `parameters` grows with everything built."""

    def __init__(
        self, spec: ModelSpec, tp: Group, dtype: torch.dtype, device: torch.device, expert_parallel: bool = False
    ) -> None:
        self.spec = spec
        self.names = names_of(spec)
        self.parameters: list[Parameter] = []
        shares = split_heads(spec.num_heads, spec.num_kv_heads, tp.size)
        self.heads = shares[tp.rank]
        self._first_of_kv = next(rank for rank, share in enumerate(shares) if share.kv == self.heads.kv) == tp.rank
        self.expert_parallel = expert_parallel
        self.vocab_shards = split(spec.vocab_size, tp.size, VOCAB_UNIT, what="vocabulary entries")
        self.vocab = self.vocab_shards[tp.rank]
        self._tp = tp
        self._dtype = dtype
        self._device = device

    def kv_layout(self) -> KVLayout:
        """What a position leaves in a layer: keys and values of this rank's heads, or the latent, whole, and the shared key."""
        latent, dim = self.spec.latent, self.spec.head_dim
        if latent is not None:
            return KVLayout(1, latent.kv_rank + latent.rope_dim, latent.kv_rank, v_in_k=True)
        return KVLayout(len(self.heads.kv), dim, dim)

    def embedding(self) -> torch.Tensor:
        """The token embedding's rows of this rank."""
        return self._tensor(self._vocab_rows(self.names.embedding))

    def positions(self) -> torch.Tensor | None:
        """The embeddings of the positions, where they are learned."""
        if self.spec.rope is not None:
            return None
        first = self.names.unused_positions
        rows = first + self.spec.max_position
        return self._tensor(Source(f"{self.names.positions}.weight", (rows, self.spec.hidden_size), 0, range(first, rows)))

    def project_in(self) -> torch.Tensor | None:
        """From the embedding to the layers, where they are not of one width."""
        return self._projection(self.names.project_in, self.spec.hidden_size, self.spec.embedding_size)

    def project_out(self) -> torch.Tensor | None:
        """From the layers to the LM head, where they are not of one width."""
        return self._projection(self.names.project_out, self.spec.embedding_size, self.spec.hidden_size)

    def head(self) -> torch.Tensor:
        """The LM head's rows of this rank; the embedding's where the model ties them."""
        return self._tensor(self._vocab_rows(self.names.embedding if self.spec.tie_embeddings else self.names.head))

    def final_norm(self) -> Norm | None:
        """The norm before the LM head."""
        return self._norm(self.names.final_norm) if self.spec.final_norm else None

    def block(self, layer: int) -> Block:
        """Layer number `layer` of the whole model."""
        spec, names = self.spec, self.names
        prefix = names.layer.format(layer=layer)
        return Block(
            norm_place=spec.norm_place,
            attention_norm=self._norm(prefix + names.attention_norm),
            attention=self._attention(prefix),
            mlp_norm=self._norm(prefix + names.mlp_norm),
            mlp=self._feed_forward(prefix, layer),
            residual_scale=spec.residual_scale,
            attention_out_norm=self._norm(prefix + names.attention_out_norm) if spec.norm_place == "around" else None,
            mlp_out_norm=self._norm(prefix + names.mlp_out_norm) if spec.norm_place == "around" else None,
        )

    def _norm(self, name: str) -> Norm:
        """A norm of the residual stream."""
        spec = self.spec
        weight = self._vector(f"{name}.weight", spec.hidden_size) if spec.norm_affine else None
        if spec.norm == "layer":
            return LayerNorm(weight, self._vector(f"{name}.bias", spec.hidden_size) if spec.norm_affine else None, spec.norm_eps)
        assert weight is not None, "RMS norms have weights"
        return RMSNorm(weight, spec.norm_eps, spec.norm_offset)

    def _attention(self, prefix: str) -> Attention | LatentAttention:
        spec, names, heads, dim = self.spec, self.names, self.heads, self.spec.head_dim
        if spec.latent is not None:
            return latent_attention(spec, spec.latent, names, prefix, heads.q, self._tensor, self._tp)
        q, kv = _scaled(heads.q, dim), _scaled(heads.kv, dim)
        q_rows, kv_rows = spec.num_heads * dim, spec.num_kv_heads * dim
        fused = _fused(
            RowRange(prefix + names.q, q_rows, q),
            RowRange(prefix + names.k, kv_rows, kv),
            RowRange(prefix + names.v, kv_rows, kv),
        )
        return Attention(
            num_heads=len(heads.q),
            num_kv_heads=len(heads.kv),
            head_dim=dim,
            qkv=self._rows(fused),
            qkv_bias=self._row_biases(fused) if spec.qkv_bias else None,
            qk_norm=self._qk_norm(prefix, q, kv),
            attention_params=self._scoring(prefix),
            out=self._columns(prefix + names.o, q_rows, q),
            out_bias=self._vector(f"{prefix}{names.o}.bias", spec.hidden_size) if spec.out_bias else None,
            tp=self._tp,
        )

    def _scoring(self, prefix: str) -> AttentionParams:
        spec, heads, sinks = self.spec, self.heads.q, None
        if spec.sinks:
            sinks = self._tensor(Source(prefix + self.names.sinks, (spec.num_heads,), 0, heads), dtype=torch.float32)
        return AttentionParams(
            spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale, spec.scores_cap, sinks
        )

    def _qk_norm(self, prefix: str, q: range, kv: range) -> HeadNorm | AllHeadsNorm | None:
        """`q`, `kv`: this rank's channels of all heads."""
        spec = self.spec
        q_name, k_name = f"{prefix}{self.names.q_norm}.weight", f"{prefix}{self.names.k_norm}.weight"
        if spec.qk_norm is None:
            return None
        if spec.qk_norm == "head":
            q_D, k_D = self._vector(q_name, spec.head_dim), self._vector(k_name, spec.head_dim)
            return HeadNorm(q_D, k_D, spec.norm_eps, spec.norm_offset)
        num_q, num_k = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        return AllHeadsNorm(
            self._tensor(Source(q_name, (num_q,), 0, q)),
            self._tensor(Source(k_name, (num_k,), 0, kv)),
            eps=spec.norm_eps,
            num_q=num_q,
            num_k=num_k,
            counts_k=self._first_of_kv,
            tp=self._tp,
        )

    def _feed_forward(self, prefix: str, layer: int) -> MLP | MoE:
        experts = self.spec.experts
        if experts is not None and layer in experts.layers:
            return self._mixture(prefix, experts)
        names = self.names
        return self._mlp(prefix, self.spec.intermediate_size, (names.gate, names.up, names.down))

    def _mlp(self, prefix: str, size: int, names: tuple[str, str, str]) -> MLP:
        """An MLP of `size` channels; `names`: of gate, up and down."""
        spec, channels, down = self.spec, self._channels(size), names[2]
        fused = _fused(*(RowRange(prefix + name, size, channels) for name in names[0 if spec.gated else 1 : 2]))
        return MLP(
            up=self._rows(fused),
            up_bias=self._row_biases(fused) if spec.mlp_bias else None,
            activate=(activation.GATED_ACTIVATIONS if spec.gated else activation.ACTIVATIONS)[spec.activation],
            down=self._columns(prefix + down, size, channels),
            down_bias=self._vector(f"{prefix}{down}.bias", spec.hidden_size) if spec.mlp_bias else None,
            tp=self._tp,
        )

    def _mixture(self, prefix: str, experts: ExpertsSpec) -> MoE:
        """A router, this rank's part of the experts, and a shared expert, which is always cut by channels."""
        names, hidden = self.names.experts, self.spec.hidden_size
        router = Source(f"{prefix}{names.router}.weight", (experts.count, hidden), 0, range(experts.count))
        router = replace(router, instead=replace(router, name=f"{prefix}{names.stacked_router}.weight"))
        sources, shared = [router], None
        if experts.shared_size:
            shared = self._mlp(prefix, experts.shared_size, names.shared)
        if experts.shared_gate:
            sources.append(Source(f"{prefix}{names.shared_gate}.weight", (1, hidden), 0, range(1)))
        bias = None
        if experts.routing.bias is not None:
            name = prefix + names.router_bias
            bias = self._tensor(Source(name, (experts.count,), 0, range(experts.count)), dtype=torch.float32)
        return MoE(
            router=self._tensor(*sources, dtype=torch.float32),
            routing=Routing(experts.routing, bias),
            experts=self._experts(prefix, experts),
            shared=shared,
            expert_load=torch.zeros(experts.count, dtype=torch.int64, device=self._device),
            tp=self._tp,
        )

    def _experts(self, prefix: str, experts: ExpertsSpec) -> Experts:
        """A range of whole experts, or a range of every expert's channels."""
        mine, channels, hidden = range(experts.count), range(experts.size), self.spec.hidden_size
        if self.expert_parallel:
            mine = split(experts.count, self._tp.size, what="experts")[self._tp.rank]
        else:
            channels = self._channels(experts.size)
        sources = ExpertWeights(self.names.experts, prefix, experts, hidden, channels)
        clamped = experts.clamped
        activate = activation.GATED_ACTIVATIONS[self.spec.activation]
        if clamped is not None:
            activate = partial(activation.clamped_swiglu, alpha=clamped.alpha, limit=clamped.limit)
        gate_up_bias = down_bias = None
        if experts.bias:
            gate_up_bias = self._tensor(*chain.from_iterable(map(sources.gate_up_bias, mine))).view(len(mine), -1)
        if experts.bias and (self.expert_parallel or self._tp.rank == 0):
            down_bias = self._tensor(*map(sources.down_bias, mine)).view(len(mine), hidden)
        return Experts(
            count=experts.count,
            local_experts=mine,
            gate_up_EI2H=self._tensor(*chain.from_iterable(map(sources.gate_up, mine))).view(len(mine), -1, hidden),
            gate_up_bias_EI2=gate_up_bias,
            activate=activate,
            down_EHI=self._tensor(*map(sources.down, mine)).view(len(mine), hidden, -1),
            down_bias_EH=down_bias,
        )

    def _channels(self, size: int) -> range:
        """This rank's channels of an MLP."""
        return split(size, self._tp.size, MLP_UNIT, what="MLP channels")[self._tp.rank]

    def _rows(self, fused: tuple[RowRange, ...]) -> torch.Tensor:
        """Projections of a layer stacked; each rank computes some of the outputs."""
        return self._tensor(*(self._weight(rows.name, (rows.whole, self.spec.hidden_size), 0, rows.taken) for rows in fused))

    def _row_biases(self, fused: tuple[RowRange, ...]) -> torch.Tensor:
        return self._tensor(*(Source(f"{rows.name}.bias", (rows.whole,), 0, rows.taken) for rows in fused))

    def _columns(self, name: str, columns: int, taken: range) -> torch.Tensor:
        """A projection of a layer of which each rank computes all outputs from some of the inputs."""
        return self._tensor(self._weight(name, (self.spec.hidden_size, columns), 1, taken))

    def _weight(self, name: str, shape: tuple[int, int], dim: int, taken: range) -> Source:
        """`shape`, `dim`: as [outputs, inputs]."""
        if self.names.transposed:
            return Source(f"{name}.weight", shape[::-1], 1 - dim, taken, transposed=True)
        return Source(f"{name}.weight", shape, dim, taken)

    def _projection(self, name: str, rows: int | None, columns: int | None) -> torch.Tensor | None:
        """Whole on every rank."""
        if rows is None or columns is None:
            return None
        return self._tensor(Source(f"{name}.weight", (rows, columns), 0, range(rows)))

    def _vector(self, name: str, size: int) -> torch.Tensor:
        """Whole on every rank."""
        return self._tensor(Source(name, (size,), 0, range(size)))

    def _vocab_rows(self, name: str) -> Source:
        shape = (self.spec.vocab_size, self.spec.embedding_size or self.spec.hidden_size)
        return Source(f"{name}.weight", shape, 0, self.vocab)

    def _tensor(self, *sources: Source, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`dtype`: the model's unless it is said."""
        self.parameters.append(Parameter.empty(sources, dtype or self._dtype, self._device))
        return self.parameters[-1].tensor


def _fused(*projections: RowRange) -> tuple[RowRange, ...]:
    """Where the rows are in the checkpoint: projections of one name lie below one another in one tensor."""
    totals: dict[str, int] = {}
    firsts = []
    for name, whole, _ in projections:
        firsts.append(totals.get(name, 0))
        totals[name] = firsts[-1] + whole
    return tuple(
        RowRange(name, totals[name], range(first + taken.start, first + taken.stop))
        for first, (name, _, taken) in zip(firsts, projections, strict=True)
    )


def _scaled(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
