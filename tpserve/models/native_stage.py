"""The dense layers of a stage as one list of native operations: those that the layers run one by one, on buffers that stay.

Owns the buffers, not the weights and caches. It serves layers with attention over keys and values (not latents) and an MLP (not
experts), all weights packed for the library of CPU kernels; `unserved` says what keeps a stage from it. Each operation has the
bits that it has alone, so both forms give the same tokens.

A list ends where ranks sum over a network; between ranks of one host, and for one rank, a step is a single list. In int8 a norm
and an activation quantize each row that they have computed, and ranks agree on a row's scale before they quantize it.

T rows of a step, C rows that the buffers hold, H hidden channels, N query heads and K key/value heads of this rank, D channels of
a head, I intermediate channels, U = I or, with a gate, 2 I.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tpserve.attention.metadata import AttentionMetadata
from tpserve.attention.paged import KVCache
from tpserve.layers.activation import NATIVE_KINDS
from tpserve.layers.attention import Attention
from tpserve.layers.block import Block
from tpserve.layers.mlp import MLP
from tpserve.layers.norm import AllHeadsNorm, Norm, RMSNorm
from tpserve.layers.rope import RotaryPositions
from tpserve.parallel.group import Group
from tpserve.quant.int8 import Int8Weight
from tpserve.quant.packed import PackedWeight, Weight
from tpserve_kernels.cpu import attention, int8, product, qkv_heads, rows
from tpserve_kernels.cpu.all_reduce import Reduction, all_reduce_args
from tpserve_kernels.cpu.attention import AttentionInputs
from tpserve_kernels.cpu.calls import CallList
from tpserve_kernels.cpu.library import Operation

ROW_UNIT = 64
"""Buffers hold a multiple of this many rows."""


def unserved(blocks: Sequence[Block], tp: Group) -> str | None:
    """Why these layers run one operation after the other; None when one list can serve them."""
    for block in blocks:
        if not isinstance(block.attention, Attention):
            return "latent attention"
        if not isinstance(block.mlp, MLP):
            return "experts"
        if isinstance(block.attention.qk_norm, AllHeadsNorm):
            return "a norm over all heads"
        if block.norm_place not in ("before", "around"):
            return f"norms {block.norm_place} the layers"
        if block.residual_scale != 1:
            return "a scaled residual stream"
        if block.mlp.activate not in NATIVE_KINDS:
            return "its activation"
        weights = (block.attention.qkv, block.attention.out, block.mlp.up, block.mlp.down)
        biased = block.attention.out_bias is not None or block.mlp.down_bias is not None
        if tp.size > 1 and isinstance(block.mlp.down, Int8Weight):  # whose bias comes with the scales
            if tp.page is None:
                return "int8 sums over a network"
        elif tp.size > 1 and biased:
            return "a bias after a sum over ranks"
        if not all(isinstance(weight, PackedWeight | Int8Weight) for weight in weights):
            return "weights that are not packed for the CPU kernels"
    return None if blocks else "no layers"


@dataclass(frozen=True)
class _Buffers:
    """What operations write; later layers overwrite it. `stream_CH` is the residual stream, `delta_CH` what a layer adds."""

    stream_CH: torch.Tensor
    delta_CH: torch.Tensor
    normed_CH: torch.Tensor
    qkv: torch.Tensor
    """[C, (N + 2 K) D]"""
    mixed: torch.Tensor
    """[C, N D]"""
    up_CU: torch.Tensor
    active_CI: torch.Tensor

    @staticmethod
    def of(block: Block, capacity: int, hidden_size: int, dtype: torch.dtype) -> "_Buffers":
        """All layers of a stage have the widths of `block`."""
        assert isinstance(block.attention, Attention) and isinstance(block.mlp, MLP)
        heads, mlp = (
            (block.attention.qkv.shape[0], block.attention.out.shape[1]),
            (block.mlp.up.shape[0], block.mlp.down.shape[1]),
        )
        return _Buffers(*(torch.empty(capacity, width, dtype=dtype) for width in (*(hidden_size,) * 3, *heads, *mlp)))


_OF_GROUP = ("positions", "slots", "requests", "query_starts", "context_lens", "tables", "table_stride")
"""The values of a cache group that change from step to step."""


class NativeStage:
    """All layers of a stage. `cache_groups`: the cache group of each layer; `caches`: of each layer."""

    def __init__(
        self,
        blocks: Sequence[Block],
        cache_groups: Sequence[int],
        caches: Sequence[KVCache],
        tp: Group,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        """`unserved` must be None for the blocks. `dtype`: of the residual stream."""
        self._blocks, self._cache_groups, self.caches = blocks, cache_groups, caches
        self._tp, self._hidden_size, self._dtype = tp, hidden_size, dtype
        self._capacity = 0
        self._lists: list[CallList] = []
        self._kept: list[torch.Tensor] = []
        self._sums_CH: torch.Tensor | None = None
        self._int8_rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by their width, with their scales

    def __call__(
        self, x_TH: torch.Tensor, rotary: Sequence[RotaryPositions | None], batches: Sequence[AttentionMetadata]
    ) -> torch.Tensor:
        """The residual stream after the layers: [T, H]. `rotary` and `batches`: of each cache group."""
        num_rows, x_TH = len(x_TH), x_TH.contiguous()
        if num_rows > self._capacity:
            self._build(-(-num_rows // ROW_UNIT) * ROW_UNIT, rotary, [batch.window for batch in batches])
        values = [num_rows, x_TH.data_ptr()]
        for turn, batch in zip(rotary, batches, strict=True):
            tables, context_lens = batch.tables, batch.context_lens
            values += (  # in the order of _OF_GROUP
                0 if turn is None else turn.positions_T.data_ptr(),
                batch.write_slots.data_ptr(),
                len(context_lens),
                batch.query_starts.data_ptr(),
                context_lens.data_ptr(),
                tables.data_ptr(),
                tables.stride(0),
            )
        first, *others = self._lists
        first.run(values, self._tp.watch)
        delta_TH = self._buffers.delta_CH[:num_rows]
        for calls in others:
            delta_TH.copy_(self._tp.all_reduce(delta_TH.clone()))
            calls.run(values, self._tp.watch)
        return self._buffers.stream_CH[:num_rows] + delta_TH

    def _build(self, capacity: int, rotary: Sequence[RotaryPositions | None], windows: Sequence[int | None]) -> None:
        """Make buffers for so many rows, and the lists over them."""
        self._buffers = _Buffers.of(self._blocks[0], capacity, self._hidden_size, self._dtype)
        self._capacity, self._lists, self._kept, self._int8_rows, self._sums_CH = capacity, [], [], {}, None
        self._names = "rows", "input", *(f"{name} {group}" for group in range(len(windows)) for name in _OF_GROUP)
        self._lists.append(CallList(self._names))
        for i, (block, group, cache) in enumerate(zip(self._blocks, self._cache_groups, self.caches, strict=True)):
            attention_layer, mlp = block.attention, block.mlp
            assert isinstance(attention_layer, Attention) and isinstance(mlp, MLP)
            # The step's input is the residual stream until the first sum is written.
            self._norm(block.attention_norm, attention_layer.qkv, add=i > 0, stream="input" if i == 0 else None)
            self._attention(attention_layer, group, cache, rotary[group], windows[group])
            self._norm_delta(block.attention_out_norm)
            self._norm(block.mlp_norm, mlp.up, add=True, stream="input" if i == 0 else None)
            self._mlp(mlp)
            self._norm_delta(block.mlp_out_norm)

    def _norm(self, norm: Norm, weight: Weight, *, add: bool, stream: str | None) -> None:
        """The norm of the stream, to which delta is added first, for a product with `weight`.

        `stream`: the name of the value where the stream is, None: in its buffer.
        """
        buffers = self._buffers
        stream_CH, normed_CH = buffers.stream_CH, buffers.normed_CH
        quantize = self._quantize(normed_CH) if isinstance(weight, Int8Weight) else None
        x_CH, sum_CH = (buffers.delta_CH, stream_CH) if add else (stream_CH, None)
        varying = {} if stream is None else {"residual" if add else "x": stream}
        self._lists[-1].add(
            Operation.NORM, _norm_args(norm, x_CH, normed_CH, sum_CH, quantize), rows="rows", **varying
        )  # fmt: skip

    def _norm_delta(self, norm: Norm | None) -> None:
        """The norm of what a layer adds, in place."""
        if norm is not None:
            delta_CH = self._buffers.delta_CH
            self._lists[-1].add(Operation.NORM, _norm_args(norm, delta_CH, delta_CH), rows="rows")

    def _attention(
        self, layer: Attention, group: int, cache: KVCache, rotary: RotaryPositions | None, window: int | None
    ) -> None:
        buffers = self._buffers
        num_heads, num_kv, dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
        self._product(buffers.normed_CH, layer.qkv, layer.qkv_bias, buffers.qkv)
        heads_CAD = buffers.qkv.view(self._capacity, -1, dim)
        q_CND, k_CKD, v_CKD = heads_CAD[:, : num_heads + 2 * num_kv].tensor_split((num_heads, num_heads + num_kv), dim=1)
        self._place(layer, q_CND, k_CKD, v_CKD, group, cache, rotary)
        mixed_CND = buffers.mixed.view(self._capacity, num_heads, dim)
        params, none = layer.attention_params, torch.zeros(1, dtype=torch.int32)
        where = none.view(1, 1)[:0], none, none[:0]  # set in each step
        inputs = AttentionInputs(q_CND, cache.k, cache.v, *where, params.scale, window, params.cap, params.sinks)
        arguments = attention.attention_args(inputs, mixed_CND)
        fields = ("requests", "query_starts", "context_lens", "tables", "table_stride")
        self._lists[-1].add(Operation.ATTENTION, arguments, rows="rows", **{field: f"{field} {group}" for field in fields})
        if isinstance(layer.out, Int8Weight):
            self._lists[-1].add(Operation.QUANTIZE, self._quantize_shared(buffers.mixed), rows="rows")
        self._row_parallel(buffers.mixed, layer.out, layer.out_bias)

    def _place(
        self,
        layer: Attention,
        q_CND: torch.Tensor,
        k_CKD: torch.Tensor,
        v_CKD: torch.Tensor,
        group: int,
        cache: KVCache,
        rotary: RotaryPositions | None,
    ) -> None:
        """Norm and rotate queries in place, and keys on their way to the cache, values too."""
        assert layer.qk_norm is None or not isinstance(layer.qk_norm, AllHeadsNorm)
        norms = None if layer.qk_norm is None else layer.qk_norm.weights
        k_cache, v_cache = cache.slots()
        q = qkv_heads.heads_of(q_CND, q_CND, None if norms is None else norms.q_D)
        k = qkv_heads.heads_of(k_CKD, k_cache, None if norms is None else norms.k_D)
        rotation = None if rotary is None else rotary.rotation
        varying = {"rows": "rows", "written": "rows", "slots": f"slots {group}"}
        if rotation is not None:
            rotation = rotation._replace(positions_T=torch.zeros(self._capacity, dtype=torch.int64))
            varying["positions"] = f"positions {group}"
        arguments = qkv_heads.qkv_args(
            q, k, qkv_heads.heads_of(v_CKD, v_cache), self._capacity, self._dtype, norms=norms, rotation=rotation,
            cache_int8=cache.k.dtype == torch.int8,
        )  # fmt: skip
        self._lists[-1].add(Operation.QKV, arguments, **varying)

    def _mlp(self, layer: MLP) -> None:
        buffers = self._buffers
        self._product(buffers.normed_CH, layer.up, layer.up_bias, buffers.up_CU)
        quantize = self._quantize_shared(buffers.active_CI) if isinstance(layer.down, Int8Weight) else None
        arguments = rows.activation_args(
            buffers.up_CU, buffers.active_CI, NATIVE_KINDS[layer.activate], quantize=quantize
        )  # fmt: skip
        self._lists[-1].add(Operation.ACTIVATION, arguments, rows="rows")
        self._row_parallel(buffers.active_CI, layer.down, layer.down_bias)

    def _product(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """out = x @ weight.T + bias. In int8 `x` has been quantized before; `out` of int32 takes the sums."""
        if isinstance(weight, PackedWeight):
            arguments = product.product_args(x, weight.blob, self._float(bias), out)
            self._lists[-1].add(Operation.PRODUCT, arguments, rows="rows")
            return
        assert isinstance(weight, Int8Weight)
        q_CF, scale_C = self._int8_of(weight.shape[1])
        arguments_int8 = int8.product_int8_args(q_CF, scale_C, weight.blob, self._float(bias), out)
        self._lists[-1].add(Operation.PRODUCT_INT8, arguments_int8, rows="rows")

    def _row_parallel(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> None:
        """delta = x @ weight.T summed over the ranks, + bias. In int8 `_quantize_shared` of `x` has run."""
        calls, tp, delta_CH = self._lists[-1], self._tp, self._buffers.delta_CH
        if tp.size == 1 or not isinstance(weight, Int8Weight):
            self._product(x, weight, bias, delta_CH)
            if tp.page is not None:
                calls.add(Operation.ALL_REDUCE, all_reduce_args(tp.page, delta_CH), rows="rows")
            elif tp.size > 1:
                self._lists.append(CallList(self._names))
            return
        assert tp.page is not None
        q_CF, scale_C = self._int8_of(weight.shape[1])
        if self._sums_CH is None:
            self._sums_CH = torch.empty(delta_CH.shape, dtype=torch.int32)
        sums_CH = self._sums_CH
        bits_C1 = scale_C.view(torch.int32).unsqueeze(1)  # no scale is negative, so their bits are in their order, NaN last
        calls.add(Operation.ALL_REDUCE, all_reduce_args(tp.page, bits_C1, reduction=Reduction.MAX), rows="rows")
        calls.add(Operation.QUANTIZE, int8.quantize_args(x, scale_C, q_CF, given=True), rows="rows")
        self._product(x, weight, None, sums_CH)
        calls.add(Operation.ALL_REDUCE, all_reduce_args(tp.page, sums_CH), rows="rows")
        arguments = int8.product_int8_args(sums_CH, scale_C, weight.blob, self._float(bias), delta_CH)
        calls.add(Operation.RESCALE_INT8, arguments, rows="rows")

    def _quantize(self, x: torch.Tensor) -> int8.QuantizeArgs:
        """Of the rows of `x`, for `_product`."""
        q_CF, scale_C = self._int8_of(x.shape[1])
        return int8.quantize_args(x, scale_C, q_CF, given=False)

    def _quantize_shared(self, x: torch.Tensor) -> int8.QuantizeArgs:
        """The same for `_row_parallel`; with several ranks only the scales of this one's channels."""
        q_CF, scale_C = self._int8_of(x.shape[1])
        return int8.quantize_args(x, scale_C, q_CF if self._tp.size == 1 else None, given=False)

    def _int8_of(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Buffers of quantized rows of this width, and of their scales."""
        if width not in self._int8_rows:
            self._int8_rows[width] = int8.empty_rows(self._capacity, width), torch.empty(self._capacity)
        return self._int8_rows[width]

    def _float(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The bias in float32, which lives as long as the lists."""
        if bias is None or bias.dtype == torch.float32:
            return bias
        self._kept.append(bias.float())
        return self._kept[-1]


def _norm_args(
    norm: Norm,
    x_CH: torch.Tensor,
    out_CH: torch.Tensor,
    stream_CH: torch.Tensor | None = None,
    quantize: int8.QuantizeArgs | None = None,
) -> rows.NormArgs:
    """The arguments of Operation.NORM: out = norm(x), or stream += x and out = norm(stream)."""
    of_norm: tuple[torch.Tensor | None, torch.Tensor | None, float, float, rows.NormKind]
    if isinstance(norm, RMSNorm):
        of_norm = (norm.weight_H, None, norm.eps, norm.offset, rows.NormKind.RMS_NORM)
    else:
        of_norm = (norm.weight_H, norm.bias_H, norm.eps, 0.0, rows.NormKind.LAYER_NORM)
    return rows.norm_args(x_CH, out_CH, *of_norm, stream_CH, stream_CH, quantize)
