"""Declares the weights of one tensor-parallel rank: which ranges of which checkpoint tensors make each parameter.

The only description of a model's weights, and torch-free: `shard` allocates parameters from it, `param_count` counts their
elements, `weight_bytes` what they take after loading, `whole_model` lists their sources.

Heads, MLP channels and vocabulary are split. Every rank holds all of the norms, the learned positions, the projections
between embedding and hidden size, and the biases that are added after a sum over ranks.
"""

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, replace
from itertools import chain
from typing import Any, Literal, NamedTuple

from tpserve.models import names_of
from tpserve.models.expert_weights import ExpertWeights
from tpserve.models.units import MLP_UNIT, VOCAB_UNIT
from tpserve.parallel.split import split, split_heads
from tpserve.types.model_spec import ExpertsSpec, LatentSpec, ModelSpec
from tpserve.weights.source import Source

Sources = tuple[Source, ...]
"""One parameter: its sources, concatenated along dim 0."""


class Form(NamedTuple):
    """How a parameter is kept after loading. The default is a plain tensor of the model's dtype.

    `packed`: for matrix products, by the library of CPU kernels; `int8`: the values of --quantization that quantize it;
    `float32`: whatever the model's dtype; `stacked`: the rows of one matrix for each expert of the rank, or of two for each head.
    """

    packed: bool = False
    int8: tuple[Literal["int8", "int8-head"], ...] = ()
    float32: bool = False
    stacked: Literal["experts", "heads"] | None = None

    @property
    def metadata(self) -> "dict[str, Form]":
        """For the field of a declaration."""
        return {"form": self}


PLAIN = Form()
FLOAT32 = Form(float32=True)
PROJECTION = Form(packed=True)
MATRIX = Form(packed=True, int8=("int8", "int8-head"))
EXPERTS, HEADS = MATRIX._replace(stacked="experts"), MATRIX._replace(stacked="heads")
ROUTER = Form(packed=True, float32=True)
HEAD = Form(packed=True, int8=("int8-head",))


def form_of(declared: "Field[Any]") -> Form:
    """The form of the parameter that a field of the declarations below holds."""
    form: Form = declared.metadata.get("form", PLAIN)
    return form


@dataclass(frozen=True)
class NormWeights:
    """A norm of the residual stream; both None for a norm without weights."""

    weight: Sources | None
    bias: Sources | None


@dataclass(frozen=True)
class AttentionWeights:
    """`qkv`: query, key and value rows. `q_norm`, `k_norm`: of one head, or of this rank's channels of all heads."""

    qkv: Sources = field(metadata=MATRIX.metadata)
    qkv_bias: Sources | None
    q_norm: Sources | None
    k_norm: Sources | None
    sinks: Sources | None = field(metadata=FLOAT32.metadata)
    out: Sources = field(metadata=MATRIX.metadata)
    out_bias: Sources | None


@dataclass(frozen=True)
class LatentAttentionWeights:
    """`down`: query (or compressed query), latent and shared key rows. `query_norm`, `query_up`: of a compressed query."""

    query_norm: Sources | None
    query_up: Sources | None = field(metadata=MATRIX.metadata)
    kv_up: Sources = field(metadata=HEADS.metadata)
    down: Sources = field(metadata=MATRIX.metadata)
    latent_norm: Sources
    out: Sources = field(metadata=MATRIX.metadata)


@dataclass(frozen=True)
class MLPWeights:
    """`up`: gate and up rows, or up rows alone."""

    up: Sources = field(metadata=MATRIX.metadata)
    up_bias: Sources | None
    down: Sources = field(metadata=MATRIX.metadata)
    down_bias: Sources | None


@dataclass(frozen=True)
class MoEWeights:
    """`router`: its rows and, last, the row of the shared expert's gate. The experts' parameters stack `local_experts`."""

    local_experts: range
    router: Sources = field(metadata=ROUTER.metadata)
    router_bias: Sources | None = field(metadata=FLOAT32.metadata)
    gate_up: Sources = field(metadata=EXPERTS.metadata)
    gate_up_bias: Sources | None
    down: Sources = field(metadata=EXPERTS.metadata)
    down_bias: Sources | None
    shared: MLPWeights | None


@dataclass(frozen=True)
class LayerWeights:
    """The two `*_out_norm` belong to layers with norms before and after attention and MLP."""

    attention_norm: NormWeights
    attention: AttentionWeights | LatentAttentionWeights
    mlp_norm: NormWeights
    mlp: MLPWeights | MoEWeights
    attention_out_norm: NormWeights | None
    mlp_out_norm: NormWeights | None


@dataclass(frozen=True)
class OuterWeights:
    """The weights of a stage outside its layers. `head` is None on a stage whose embedding is the LM head, too."""

    embedding: Sources | None
    project_in: Sources | None = field(metadata=PROJECTION.metadata)
    positions: Sources | None
    final_norm: NormWeights | None
    project_out: Sources | None = field(metadata=PROJECTION.metadata)
    head: Sources | None = field(metadata=HEAD.metadata)


class KVShape(NamedTuple):
    """What one position occupies in the cache of one layer: channels of each key and each value.

    `v_in_k`: the value is the first `v_dim` channels of the key.
    """

    num_heads: int
    k_dim: int
    v_dim: int
    v_in_k: bool = False


class RowRange(NamedTuple):
    """Outputs `taken` of a checkpoint's projection that has `total` outputs."""

    name: str
    total: int
    taken: range


class RankWeights:
    """The weights of rank `tp_rank` of `tp_size`. UserError when the model has too few heads, channels or entries to split."""

    def __init__(self, spec: ModelSpec, tp_size: int, tp_rank: int, expert_parallel: bool = False) -> None:
        self.spec = spec
        self.names = names_of(spec)
        self.head_shares = split_heads(spec.num_heads, spec.num_kv_heads, tp_size)
        self.heads = self.head_shares[tp_rank]
        self.vocab_shards = split(spec.vocab_size, tp_size, VOCAB_UNIT, what="vocabulary entries")
        self.vocab = self.vocab_shards[tp_rank]
        self._tp_size = tp_size
        self._tp_rank = tp_rank
        self._expert_parallel = expert_parallel

    def kv_shape(self) -> KVShape:
        """The keys and values of this rank's heads, or the latent and the shared key, which every rank holds in full."""
        latent, dim = self.spec.latent, self.spec.head_dim
        if latent is not None:
            return KVShape(1, latent.kv_rank + latent.rope_dim, latent.kv_rank, v_in_k=True)
        return KVShape(len(self.heads.kv), dim, dim)

    def outer(self, first: bool, last: bool) -> OuterWeights:
        """The weights outside the layers, on the first stage, the last, both or neither."""
        spec, names, hidden, width = self.spec, self.names, self.spec.hidden_size, self.spec.embedding_size
        head = None
        if last and not (first and spec.tie_embeddings):
            head = self._vocab_rows(names.embedding if spec.tie_embeddings else names.head)
        return OuterWeights(
            embedding=self._vocab_rows(names.embedding) if first else None,
            project_in=_all_rows(f"{names.project_in}.weight", hidden, width) if first and width is not None else None,
            positions=self._positions() if first and spec.rope is None else None,
            final_norm=self._norm(names.final_norm) if last and spec.final_norm else None,
            project_out=_all_rows(f"{names.project_out}.weight", width, hidden) if last and width is not None else None,
            head=head,
        )

    def layer(self, layer: int) -> LayerWeights:
        """Layer number `layer` of the whole model."""
        spec, names = self.spec, self.names
        prefix, around = names.layer.format(layer=layer), spec.norm_place == "around"
        mlp: MLPWeights | MoEWeights
        if spec.experts is not None and layer in spec.experts.layers:
            mlp = self._moe(prefix, spec.experts)
        else:
            mlp = self._mlp(prefix, spec.intermediate_size, (names.gate, names.up, names.down))
        return LayerWeights(
            attention_norm=self._norm(prefix + names.attention_norm),
            attention=self._attention(prefix) if spec.latent is None else self._latent_attention(prefix, spec.latent),
            mlp_norm=self._norm(prefix + names.mlp_norm),
            mlp=mlp,
            attention_out_norm=self._norm(prefix + names.attention_out_norm) if around else None,
            mlp_out_norm=self._norm(prefix + names.mlp_out_norm) if around else None,
        )

    def _positions(self) -> Sources:
        first = self.names.unused_positions
        rows = first + self.spec.max_position
        return (Source(f"{self.names.positions}.weight", (rows, self.spec.hidden_size), 0, range(first, rows)),)

    def _norm(self, name: str) -> NormWeights:
        spec = self.spec
        weight = _all_rows(f"{name}.weight", spec.hidden_size) if spec.norm_affine else None
        has_bias = spec.norm_affine and spec.norm == "layer"
        return NormWeights(weight, _all_rows(f"{name}.bias", spec.hidden_size) if has_bias else None)

    def _attention(self, prefix: str) -> AttentionWeights:
        spec, names, heads, dim = self.spec, self.names, self.heads, self.spec.head_dim
        q, kv = _scaled(heads.q, dim), _scaled(heads.kv, dim)
        num_q, num_kv = spec.num_heads * dim, spec.num_kv_heads * dim
        fused = _fused(
            RowRange(prefix + names.q, num_q, q), RowRange(prefix + names.k, num_kv, kv), RowRange(prefix + names.v, num_kv, kv)
        )
        q_norm = k_norm = None
        q_norm_name, k_norm_name = f"{prefix}{names.q_norm}.weight", f"{prefix}{names.k_norm}.weight"
        if spec.qk_norm == "head":
            q_norm, k_norm = _all_rows(q_norm_name, dim), _all_rows(k_norm_name, dim)
        elif spec.qk_norm == "all":
            q_norm, k_norm = (Source(q_norm_name, (num_q,), 0, q),), (Source(k_norm_name, (num_kv,), 0, kv),)
        return AttentionWeights(
            qkv=self._rows(fused),
            qkv_bias=_row_biases(fused) if spec.qkv_bias else None,
            q_norm=q_norm,
            k_norm=k_norm,
            sinks=(Source(prefix + names.sinks, (spec.num_heads,), 0, heads.q),) if spec.sinks else None,
            out=(self._columns(prefix + names.o, num_q, q),),
            out_bias=_all_rows(f"{prefix}{names.o}.bias", spec.hidden_size) if spec.out_bias else None,
        )

    def _latent_attention(self, prefix: str, latent: LatentSpec) -> LatentAttentionWeights:
        """Query heads and the projections from the latent are split; the projection to the latent is not."""
        spec, names, heads = self.spec, self.names.latent, self.heads.q
        hidden, num_heads, rank = spec.hidden_size, spec.num_heads, latent.kv_rank

        def head_rows(name: str, size: int, inputs: int) -> Source:
            return Source(f"{prefix}{name}.weight", (num_heads * size, inputs), 0, _scaled(heads, size))

        query: Sources = (head_rows(self.names.q, spec.head_dim, hidden),)
        query_norm = query_up = None
        if latent.q_rank is not None:
            query = _all_rows(f"{prefix}{names.q_down}.weight", latent.q_rank, hidden)
            query_norm = _all_rows(f"{prefix}{names.q_norm}.weight", latent.q_rank)
            query_up = (head_rows(names.q_up, spec.head_dim, latent.q_rank),)
        values = _scaled(heads, latent.v_dim)
        return LatentAttentionWeights(
            query_norm=query_norm,
            query_up=query_up,
            kv_up=(head_rows(names.kv_up, latent.nope_dim + latent.v_dim, rank),),
            down=(*query, *_all_rows(f"{prefix}{names.kv_down}.weight", rank + latent.rope_dim, hidden)),
            latent_norm=_all_rows(f"{prefix}{names.kv_norm}.weight", rank),
            out=(Source(f"{prefix}{self.names.o}.weight", (hidden, num_heads * latent.v_dim), 1, values),),
        )

    def _mlp(self, prefix: str, size: int, names: tuple[str, str, str]) -> MLPWeights:
        """An MLP of `size` channels; `names`: gate, up and down."""
        spec, channels, down = self.spec, self._channels(size), names[2]
        fused = _fused(*(RowRange(prefix + name, size, channels) for name in names[0 if spec.gated else 1 : 2]))
        return MLPWeights(
            up=self._rows(fused),
            up_bias=_row_biases(fused) if spec.mlp_bias else None,
            down=(self._columns(prefix + down, size, channels),),
            down_bias=_all_rows(f"{prefix}{down}.bias", spec.hidden_size) if spec.mlp_bias else None,
        )

    def _moe(self, prefix: str, experts: ExpertsSpec) -> MoEWeights:
        """A router, a range of complete experts or a range of every expert's channels, and a shared expert split by channels."""
        names, hidden = self.names.experts, self.spec.hidden_size
        router = Source(f"{prefix}{names.router}.weight", (experts.count, hidden), 0, range(experts.count))
        router = replace(router, instead=replace(router, name=f"{prefix}{names.stacked_router}.weight"))
        shared_gate = _all_rows(f"{prefix}{names.shared_gate}.weight", 1, hidden) if experts.shared_gate else ()
        has_router_bias = experts.routing.bias is not None
        local, channels = range(experts.count), range(experts.size)
        if self._expert_parallel:
            local = split(experts.count, self._tp_size, what="experts")[self._tp_rank]
        else:
            channels = self._channels(experts.size)
        sources = ExpertWeights(names, prefix, experts, hidden, channels)
        # the ranks' outputs are summed: one rank adds the bias of an expert that all ranks share
        has_down_bias = experts.bias and (self._expert_parallel or self._tp_rank == 0)
        return MoEWeights(
            local_experts=local,
            router=(router, *shared_gate),
            router_bias=_all_rows(prefix + names.router_bias, experts.count) if has_router_bias else None,
            gate_up=tuple(chain.from_iterable(map(sources.gate_up, local))),
            gate_up_bias=tuple(chain.from_iterable(map(sources.gate_up_bias, local))) if experts.bias else None,
            down=tuple(map(sources.down, local)),
            down_bias=tuple(map(sources.down_bias, local)) if has_down_bias else None,
            shared=self._mlp(prefix, experts.shared_size, names.shared) if experts.shared_size else None,
        )

    def _channels(self, size: int) -> range:
        """This rank's channels of an MLP."""
        return split(size, self._tp_size, MLP_UNIT, what="MLP channels")[self._tp_rank]

    def _rows(self, fused: tuple[RowRange, ...]) -> Sources:
        """Projections of a layer, stacked; a rank computes some of the outputs."""
        return tuple(self._weight(rows.name, (rows.total, self.spec.hidden_size), 0, rows.taken) for rows in fused)

    def _columns(self, name: str, columns: int, taken: range) -> Source:
        """A projection of a layer; a rank computes all outputs from some of the inputs."""
        return self._weight(name, (self.spec.hidden_size, columns), 1, taken)

    def _weight(self, name: str, shape: tuple[int, int], dim: int, taken: range) -> Source:
        """`shape`, `dim`: as [outputs, inputs]."""
        if self.names.transposed:
            return Source(f"{name}.weight", shape[::-1], 1 - dim, taken, transposed=True)
        return Source(f"{name}.weight", shape, dim, taken)

    def _vocab_rows(self, name: str) -> Sources:
        shape = (self.spec.vocab_size, self.spec.embedding_size or self.spec.hidden_size)
        return (Source(f"{name}.weight", shape, 0, self.vocab),)


def sources_in(declared: Any) -> Iterator[Source]:
    """Every source of a declaration above, nested ones included; parameters come in the order of the fields."""
    if isinstance(declared, Source):
        yield declared
    elif isinstance(declared, tuple):
        yield from declared
    elif declared is not None and not isinstance(declared, range):
        for field in fields(declared):
            yield from sources_in(getattr(declared, field.name))


def _all_rows(name: str, *shape: int) -> Sources:
    """A tensor that every rank holds in full."""
    return (Source(name, shape, 0, range(shape[0])),)


def _row_biases(fused: tuple[RowRange, ...]) -> Sources:
    return tuple(Source(f"{rows.name}.bias", (rows.total,), 0, rows.taken) for rows in fused)


def _fused(*projections: RowRange) -> tuple[RowRange, ...]:
    """The rows in the checkpoint: projections of the same name are concatenated in one tensor."""
    totals: dict[str, int] = {}
    firsts = []
    for name, total, _ in projections:
        firsts.append(totals.get(name, 0))
        totals[name] = firsts[-1] + total
    return tuple(
        RowRange(name, totals[name], range(first + taken.start, first + taken.stop))
        for first, (name, _, taken) in zip(firsts, projections, strict=True)
    )


def _scaled(heads: range, head_dim: int) -> range:
    """The channels of these heads."""
    return range(heads.start * head_dim, heads.stop * head_dim)
