"""The decoder-only transformer of all families: one rank's share of one pipeline stage.

Owns the stage's weights and layers, not the caches and not the transfers between stages. Ranks of a stage call the same
methods in the same order (each layer sums over `tp` twice, the embedding once).
Invariant: splitting the layers into stages changes no bit; stages pass on the residual stream.

T rows of a step, S sampled or scored rows, H hidden channels, E of the embedding (mostly H), V vocabulary entries of this rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from tpserve.attention import cpu_attention
from tpserve.attention.cpu_plan import TILE
from tpserve.attention.metadata import ModelInput
from tpserve.attention.paged import KVCache, build_metadata, no_library
from tpserve.config.flags import Quantization
from tpserve.errors import UserError
from tpserve.layers.embedding import embed
from tpserve.layers.expert_load import ExpertLoadCounter
from tpserve.layers.norm import Norm
from tpserve.layers.packing import LoadedWeights, Packer
from tpserve.layers.rope import RotaryPositions, tables
from tpserve.models.held_bytes import held_bytes
from tpserve.models.native_stage import NativeStage, unserved
from tpserve.models.shard import Shard
from tpserve.models.unfilled import UnfilledWeights
from tpserve.parallel.group import Group
from tpserve.quant.int8 import Int8Weight
from tpserve.quant.matmul import matmul, pad_rows
from tpserve.quant.packed import PackedWeight, Table, Weight, pack
from tpserve.quant.product import Product, of_weight
from tpserve.quant.weight_memory import PRIVATE, WeightMemory
from tpserve.sampler.logits import CardLogits, Logits, UnwrittenLogits, WrittenLogits
from tpserve.types.layout import ParallelLayout
from tpserve.types.model_spec import ModelSpec
from tpserve.weights.parameter import Parameter
from tpserve_kernels.cpu.library import serves
from tpserve_kernels.sampler_types import RawLogits


class Decoder:
    """Weights are undefined until a loader has filled `parameters()`.

    `kv_layout`: the cache of each layer of the stage. `expert_load`: token counts of this stage's experts, None without
    experts. `vocab_shards`: the vocabulary range of every tensor-parallel rank. `runs_as_list`: whether the layers run as a
    `NativeStage`; `form`: the same in words, for the log.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layout: ParallelLayout,
        stage: int,
        tp: Group,
        dtype: torch.dtype,
        device: torch.device,
        max_positions: int,
        kv_int8: bool = False,
    ) -> None:
        """Allocate the weights. `kv_int8`: the cache is of int8.

        UserError when the model has too few heads, channels or vocabulary entries for so many ranks, or int8 needs the library.
        """
        shard = Shard(spec, tp, dtype, device, layout.expert_parallel)
        last = stage == layout.pp - 1
        outer = shard.weights.outer(first=stage == 0, last=last)
        self.spec, self.dtype, self.device = spec, dtype, device
        self.vocab_shards, self._vocab = shard.weights.vocab_shards, shard.weights.vocab
        self._tp = tp
        rotary_dim = spec.head_dim if spec.latent is None else spec.latent.rope_dim
        self._rope = tables(spec.rope, rotary_dim, max_positions, device) if spec.rope else None
        self._window_rope = tables(spec.window_rope, rotary_dim, max_positions, device) if spec.window_rope else self._rope
        self._num_heads = len(shard.weights.heads.q)
        if kv_int8 and (why := no_library()):
            raise UserError(f"--kv-cache-dtype int8 needs the library of CPU kernels, but {why}: leave it out")
        self.kv_layout = replace(shard.kv_layout(), int8=kv_int8)
        self._embedding: Table | None = shard.optional(outer.embedding)
        self._project_in: Weight | None = shard.optional(outer.project_in)
        self._positions = shard.optional(outer.positions)
        expert_load = _expert_load(spec, layout.layers_of(stage), device)
        self.expert_load = expert_load if expert_load.layers else None
        self._blocks = [shard.block(layer, expert_load) for layer in layout.layers_of(stage)]
        self._cache_groups = [_cache_group(spec, layer) for layer in layout.layers_of(stage)]
        self._norm = shard.norm(outer.final_norm)
        self._project_out: Weight | None = shard.optional(outer.project_out)
        shares_embedding = last and outer.head is None
        self._head: Weight | None = self._embedding if shares_embedding else shard.optional(outer.head)
        self._parameters = shard.parameters
        self._native: NativeStage | None = None
        self.runs_as_list, self.form = False, "operations of torch"

    def parameters(self) -> list[Parameter]:
        """The parameters that a loader must fill; `prepack` empties the list."""
        return self._parameters

    def prepack(
        self,
        quantization: Quantization | None = None,
        fill: Callable[[Parameter], None] | None = None,
        memory: WeightMemory = PRIVATE,
    ) -> int:
        """Pack the weights for their matrix products, quantized if asked; return the bytes that they occupy afterwards.

        All ranks of the stage call this together. `fill` fills a parameter, or a matrix of a stack, just before it is packed;
        None: all are loaded. Plain tensors go one by one, so a load needs the packed model and one parameter. An embedding that
        is also the LM head is read from its packed form; oneDNN's form has no rows, so there the plain one stays, too.

        `memory`: where the weights lie afterwards. From one that has them already they are taken as they are, without the other
        ranks; it must be of this rank's share of the same model.
        """
        unfilled = None if fill is None else UnfilledWeights(self._parameters, fill, memory)
        self._parameters.clear()  # the loader has the same list, which would keep the plain weights alive
        packer = Packer(quantization is not None, unfilled or LoadedWeights(), memory)
        for i in range(len(self._blocks)):
            self._blocks[i] = self._blocks[i].packed(packer)
        self._project_in = None if self._project_in is None else packer.matrix(self._project_in, int8=False)
        self._project_out = None if self._project_out is None else packer.matrix(self._project_out, int8=False)
        self._pack_head(packer, int8=quantization == "int8-head")
        self._embedding = None if self._embedding is None else packer.table(self._embedding)
        if unfilled is not None:
            unfilled.fill_rest()
        self._choose_form()
        return held_bytes(self.held())

    def rejoin(self, tp: Group) -> None:
        """Compute with the same ranks in a later epoch: `tp` is their group there."""
        self._tp.replace(tp)
        self._native = None  # its operations have the addresses of the old group's memory
        self._choose_form()

    def _choose_form(self) -> None:
        if serves(self.device, self.dtype):
            reason = unserved(self._blocks, self._tp)
            self.runs_as_list = reason is None
            self.form = "one list of operations" if reason is None else f"one operation after the other: {reason}"

    def held(self) -> tuple[object, ...]:
        """Everything that holds weights."""
        return self._embedding, self._project_in, self._positions, self._blocks, self._norm, self._project_out, self._head

    def _pack_head(self, packer: Packer, *, int8: bool) -> None:
        plain = self._head
        if isinstance(plain, torch.Tensor):
            packer.plain.fill(plain)
            self._head = pack(plain, int8=int8, memory=packer.memory)
            if plain is self._embedding and isinstance(self._head, Table):
                self._embedding = self._head

    def products(self) -> Iterator[Product]:
        """Every matrix product of this stage's steps; layers of equal shape repeat theirs."""
        for block in self._blocks:
            yield from block.attention.products(self.dtype)
            yield from block.mlp.products(self.dtype)
        for weight in (self._project_in, self._project_out, self._head):
            if weight is not None:
                yield of_weight(weight, self.dtype)
        if serves(self.device, self.dtype):
            return  # no product of torch's in attention
        k_dim, v_dim = self.kv_layout.k_dim, self.kv_layout.v_dim
        name = f"attention float32 {k_dim}x{v_dim}"
        yield Product(name, k_dim, TILE * (k_dim + v_dim), torch.float32, partial(cpu_attention.products, v_dim=v_dim))

    def forward(self, batch: ModelInput, hidden_TH: torch.Tensor | None, caches: list[KVCache]) -> torch.Tensor:
        """Run this stage's layers; returns the residual stream [T, H].

        `hidden_TH`: the output of the previous stage, None on the first. `caches`: one for each layer of the stage.
        """
        if self._embedding is not None:
            x_TH = self._embed(batch, self._embedding)
        else:
            assert hidden_TH is not None, "a later stage continues the previous one's hidden states"
            x_TH = hidden_TH
        if self.runs_as_list:
            return self._native_stage(caches)(x_TH, self._rotary(batch.positions_T), batch.groups)
        rows, x_TH = len(x_TH), pad_rows(x_TH)
        padding = len(x_TH) - rows
        rotary = self._rotary(F.pad(batch.positions_T, (0, padding)) if padding else batch.positions_T)
        groups = [build_metadata(group, self._num_heads, caches[0]) for group in batch.groups]
        residual_TH: torch.Tensor | None = None
        deferred: Norm | None = None
        for block, group, cache in zip(self._blocks, self._cache_groups, caches, strict=True):
            x_TH, residual_TH = block(x_TH, residual_TH, rotary[group], groups[group], cache, deferred)
            deferred = block.deferred
        x_TH = x_TH if deferred is None else deferred(x_TH)
        return (x_TH if residual_TH is None else x_TH + residual_TH)[:rows]

    def _native_stage(self, caches: list[KVCache]) -> NativeStage:
        """The layers as native operations on these caches, which are the same ones in every step of a server."""
        if self._native is None or self._native.caches[0].k.data_ptr() != caches[0].k.data_ptr():
            self._native = NativeStage(self._blocks, self._cache_groups, caches, self._tp, self.spec.hidden_size, self.dtype)
        return self._native

    def _rotary(self, positions_T: torch.Tensor) -> list[RotaryPositions | None]:
        """The rotation in the layers of each cache group."""
        rotary = self._rope.at(positions_T) if self._rope else None
        windowed = rotary if self._window_rope is self._rope or self._window_rope is None else self._window_rope.at(positions_T)
        return [rotary if group.window is None else windowed for group in self.spec.cache]

    def _embed(self, batch: ModelInput, weight_VE: Table) -> torch.Tensor:
        x_TH = embed(batch.tokens_T, weight_VE, self._vocab, self._tp)
        scale = self.spec.embedding_scale
        if self.spec.embedding_scale_rounded:
            scale = torch.tensor(scale, dtype=self.dtype).item()
        if scale != 1:
            x_TH = x_TH * scale
        if self._project_in is not None:
            x_TH = matmul(x_TH, self._project_in)
        return x_TH if self._positions is None else x_TH + self._positions[batch.positions_T]

    def logits(self, hidden_SH: torch.Tensor) -> torch.Tensor:
        """Last stage: the logits of `hidden_SH` over this rank's vocabulary shard, float32 [S, V]."""
        return self.head(hidden_SH).written()

    def head(self, hidden_SH: torch.Tensor) -> Logits:
        """Last stage: the same logits for a draw, which need not be written."""
        logits, cap = self._logits(hidden_SH), self.spec.logits_cap
        if cap is None or isinstance(logits, CardLogits):
            return logits
        return WrittenLogits(logits.written().div_(cap).tanh_().mul_(cap))

    def of_raw(self, values_SV: torch.Tensor) -> CardLogits:
        """The logits that the head's `values_SV` stand for."""
        return CardLogits(RawLogits(values_SV, self.spec.logits_scale, self.spec.logits_cap))

    def _logits(self, hidden_SH: torch.Tensor) -> Logits:
        """The logits, on the CPU before their cap. The library of CPU kernels does not round them to the model's dtype."""
        assert self._head is not None, "only the last stage has logits"
        if self._norm is not None:
            hidden_SH = self._norm(hidden_SH)
        if self._project_out is not None:
            hidden_SH = matmul(hidden_SH, self._project_out)
        if isinstance(self._head, PackedWeight):
            return UnwrittenLogits(hidden_SH, self._head.blob, self._head.shape[0], self.spec.logits_scale)
        if isinstance(self._head, Int8Weight):
            logits_SV = self._head.product(hidden_SH, out_dtype=torch.float32)
        else:
            logits_SV = matmul(hidden_SH, self._head)
        if logits_SV.is_cuda:
            return self.of_raw(logits_SV)
        logits_SV = logits_SV.float()
        return WrittenLogits(logits_SV * self.spec.logits_scale if self.spec.logits_scale != 1 else logits_SV)


def _expert_load(spec: ModelSpec, layers: range, device: torch.device) -> ExpertLoadCounter:
    """A counter for those of `layers` that have experts."""
    experts = spec.experts
    if experts is None:
        return ExpertLoadCounter((), 0, device)
    return ExpertLoadCounter([layer for layer in layers if layer in experts.layers], experts.count, device)


def _cache_group(spec: ModelSpec, layer: int) -> int:
    return next(index for index, group in enumerate(spec.cache) if layer in group.layers)
