"""Weights in the layout that this CPU multiplies fastest: types of their own, made once after loading.

The library of CPU kernels packs float32 and bfloat16, and quantizes them to int8 when asked (`int8.py`); without it oneDNN packs
them, where the processor lets it (`onednn.py`).

Legend: T rows, K inner channels, N outputs, E matrices.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tpserve.quant import onednn
from tpserve.quant.int8 import Int8Stack, Int8Weight
from tpserve.quant.onednn import OneDNNWeight
from tpserve.quant.weight_memory import PRIVATE, WeightMemory
from tpserve_kernels.cpu import product
from tpserve_kernels.cpu.library import is_native


@dataclass(frozen=True)
class PackedWeight:
    """A matrix packed for the library of CPU kernels. `shape`: (N, K) of the plain tensor; `dtype`: of its numbers.

    `blob`: uint8, position-independent (`tpserve_kernels.cpu.product`); larger than the plain tensor by what fills up its last
    16 outputs and, in bfloat16, the last 32 inner channels.
    """

    blob: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype

    def product(self, x_TK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        """x @ weight.T + bias: [T, N] in the dtype of `x`, which is that of the plain tensor. AssertionError if it is not."""
        assert x_TK.dtype == self.dtype
        return product.product(x_TK, self.blob, self.shape[0], bias_N if bias_N is None else bias_N.float())

    def rows(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Rows of the plain tensor: [T, K]. `ids_T`: int64."""
        return product.lookup(ids_T.contiguous(), self.blob, self.shape[1], self.dtype)


@dataclass(frozen=True)
class PackedStack:
    """E matrices [N, K] packed for the library of CPU kernels, one after the other: `blob_EB`, uint8 [E, bytes of one]."""

    blob_EB: torch.Tensor
    shape: torch.Size
    """(E, N, K)"""
    dtype: torch.dtype

    @staticmethod
    def of(
        matrices: Iterable[torch.Tensor], shape: torch.Size, dtype: torch.dtype, memory: WeightMemory = PRIVATE
    ) -> "PackedStack":
        """Pack plain matrices into `memory`, one after another."""
        count, outputs, inner = shape
        blob_EB = memory.take(count, product.packed_bytes(dtype, outputs, inner))
        if not memory.packed:
            for weight_NK, blob in zip(matrices, blob_EB, strict=True):
                product.pack(weight_NK.contiguous(), blob)
        return PackedStack(blob_EB, shape, dtype)

    def __getitem__(self, matrices: slice) -> "PackedStack":
        """Some of the matrices."""
        blob_EB = self.blob_EB[matrices]
        return PackedStack(blob_EB, torch.Size((len(blob_EB), *self.shape[1:])), self.dtype)


Table = torch.Tensor | PackedWeight | Int8Weight
"""A matrix whose rows can be looked up."""
Weight = Table | OneDNNWeight
Stack = torch.Tensor | PackedStack | Int8Stack | tuple[Weight, ...]
"""E matrices of one shape: a tensor [E, N, K], one packed object or a tuple of [N, K]. `stack_shape` is (E, N, K)."""


def can_pack(weight: torch.Tensor) -> bool:
    """Whether `pack` changes a plain tensor."""
    return weight.device.type == "cpu" and (is_native(weight) or onednn.can_pack(weight.dtype))


def pack(weight: Weight, *, int8: bool = False, memory: WeightMemory = PRIVATE) -> Weight:
    """The weight [N, K], packed if this processor has a packed product of its dtype, else unchanged. `int8`: quantized.

    `memory`: where the library's packed form lies. One that is packed already has it, and the plain numbers are not read.
    """
    if not isinstance(weight, torch.Tensor) or not can_pack(weight):
        return weight
    if int8:
        return Int8Weight.of(weight, memory=memory)
    if not is_native(weight):
        return onednn.pack(weight)
    blob = memory.take(product.packed_bytes(weight.dtype, *weight.shape))
    if not memory.packed:
        product.pack(weight.contiguous(), blob)
    return PackedWeight(blob, weight.shape, weight.dtype)


def stack_shape(stack: Stack) -> tuple[int, int, int]:
    """(E, N, K) of a stack."""
    if isinstance(stack, tuple):
        return (len(stack), *stack[0].shape)
    count, outputs, inner = stack.shape
    return count, outputs, inner


def pack_stack(
    stack: Stack, *, int8: bool = False, matrices: Iterable[torch.Tensor] | None = None, memory: WeightMemory = PRIVATE
) -> Stack:
    """The stack with each matrix packed, if `pack` packs its dtype, else unchanged. `int8`, `memory`: see `pack`.

    `matrices`: those of the stack, each taken when it is packed; by default the stack's own. When the stack owns its whole
    storage, packing frees it at once, and it must not be read afterwards.
    """
    if not isinstance(stack, torch.Tensor) or not can_pack(stack):
        return stack
    packed: Stack
    matrices = stack if matrices is None else matrices
    if is_native(stack):
        packed = (Int8Stack if int8 else PackedStack).of(matrices, stack.shape, stack.dtype, memory)
    else:
        packed = tuple(pack(weight) for weight in matrices)
    storage = stack.untyped_storage()
    if storage.nbytes() == stack.nbytes:
        storage.resize_(0)
    return packed
