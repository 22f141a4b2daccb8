"""Cuts a model for one tensor-parallel rank: allocates its parameters and builds its layers from them.

Heads, MLP channels and vocabulary are split; norms and the biases after a sum over ranks are held whole by every rank.
"""

import torch

from tpserve.layers.attention import Attention
from tpserve.layers.block import Block
from tpserve.layers.mlp import MLP
from tpserve.models import names_of
from tpserve.models.units import MLP_UNIT, VOCAB_UNIT
from tpserve.parallel.group import Group
from tpserve.parallel.split import split, split_heads
from tpserve.types.model_spec import ModelSpec
from tpserve.weights.parameter import Parameter, Source


class Shard:
    """Rank `tp.rank`'s share of `spec`. `parameters` grows with everything built."""

    def __init__(self, spec: ModelSpec, tp: Group, dtype: torch.dtype, device: torch.device) -> None:
        self.spec = spec
        self.names = names_of(spec)
        self.parameters: list[Parameter] = []
        self.heads = split_heads(spec.num_heads, spec.num_kv_heads, tp.size)[tp.rank]
        self.channels = split(spec.intermediate_size, tp.size, MLP_UNIT, what="MLP channels")[tp.rank]
        self.vocab_shards = split(spec.vocab_size, tp.size, VOCAB_UNIT, what="vocabulary entries")
        self.vocab = self.vocab_shards[tp.rank]
        self._tp = tp
        self._dtype = dtype
        self._device = device

    def embedding(self) -> torch.Tensor:
        """The token embedding's rows of this rank."""
        return self._tensor(self._vocab_rows(self.names.embedding))

    def head(self) -> torch.Tensor:
        """The LM head's rows of this rank; the embedding's where the model ties them."""
        return self._tensor(self._vocab_rows(self.names.embedding if self.spec.tie_embeddings else self.names.head))

    def final_norm(self) -> torch.Tensor:
        """The norm before the LM head."""
        return self._tensor(_whole(self.names.final_norm, self.spec.hidden_size))

    def block(self, layer: int) -> Block:
        """Layer number `layer` of the whole model."""
        spec, names = self.spec, self.names
        prefix = names.layer.format(layer=layer)
        return Block(
            attention_norm=self._tensor(_whole(prefix + names.attention_norm, spec.hidden_size)),
            attention=self._attention(prefix),
            mlp_norm=self._tensor(_whole(prefix + names.mlp_norm, spec.hidden_size)),
            mlp=self._mlp(prefix),
            eps=spec.norm_eps,
        )

    def _attention(self, prefix: str) -> Attention:
        spec, names, heads, dim = self.spec, self.names, self.heads, self.spec.head_dim
        q, kv = _scaled(heads.q, dim), _scaled(heads.kv, dim)
        q_rows, kv_rows = spec.num_heads * dim, spec.num_kv_heads * dim
        fused = ((prefix + names.q, q_rows, q), (prefix + names.k, kv_rows, kv), (prefix + names.v, kv_rows, kv))
        return Attention(
            num_heads=len(heads.q),
            num_kv_heads=len(heads.kv),
            head_dim=dim,
            qkv=self._rows(fused),
            qkv_bias=self._row_biases(fused) if spec.qkv_bias else None,
            q_norm=self._tensor(_whole(prefix + names.q_norm, dim)) if spec.qk_norm else None,
            k_norm=self._tensor(_whole(prefix + names.k_norm, dim)) if spec.qk_norm else None,
            out=self._columns(prefix + names.o, q_rows, q),
            out_bias=self._tensor(_whole(f"{prefix}{names.o}.bias", spec.hidden_size)) if spec.out_bias else None,
            eps=spec.norm_eps,
            tp=self._tp,
        )

    def _mlp(self, prefix: str) -> MLP:
        spec, names = self.spec, self.names
        fused = tuple((prefix + name, spec.intermediate_size, self.channels) for name in (names.gate, names.up))
        return MLP(
            gate_up=self._rows(fused),
            gate_up_bias=self._row_biases(fused) if spec.mlp_bias else None,
            down=self._columns(prefix + names.down, spec.intermediate_size, self.channels),
            down_bias=self._tensor(_whole(f"{prefix}{names.down}.bias", spec.hidden_size)) if spec.mlp_bias else None,
            tp=self._tp,
        )

    def _rows(self, fused: tuple[tuple[str, int, range], ...]) -> torch.Tensor:
        """Projections (name, all rows, taken rows) stacked; each rank computes some of the outputs."""
        hidden = self.spec.hidden_size
        return self._tensor(*(Source(f"{name}.weight", (rows, hidden), 0, taken) for name, rows, taken in fused))

    def _row_biases(self, fused: tuple[tuple[str, int, range], ...]) -> torch.Tensor:
        return self._tensor(*(Source(f"{name}.bias", (rows,), 0, taken) for name, rows, taken in fused))

    def _columns(self, name: str, columns: int, taken: range) -> torch.Tensor:
        """A projection of which each rank computes all outputs from some of the inputs."""
        return self._tensor(Source(f"{name}.weight", (self.spec.hidden_size, columns), 1, taken))

    def _vocab_rows(self, name: str) -> Source:
        return Source(name, (self.spec.vocab_size, self.spec.hidden_size), 0, self.vocab)

    def _tensor(self, *sources: Source) -> torch.Tensor:
        self.parameters.append(Parameter.empty(sources, self._dtype, self._device))
        return self.parameters[-1].tensor


def _whole(name: str, size: int) -> Source:
    return Source(name, (size,), 0, range(size))


def _scaled(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
