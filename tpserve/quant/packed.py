"""Weights in the layout that this CPU multiplies fastest: types of their own, made once after loading.

The library of CPU kernels packs float32 and bfloat16; without it oneDNN does, where the processor lets it (`onednn.py`).

Legend: T rows, K inner channels, N outputs, E matrices.
"""

from dataclasses import dataclass

import torch

from tpserve.quant import onednn
from tpserve.quant.onednn import OneDNNWeight
from tpserve_kernels.cpu import product
from tpserve_kernels.cpu.library import DTYPES, library


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

    @property
    def padding_bytes(self) -> int:
        """Bytes of the blob beyond those of the plain tensor."""
        return self.blob.nbytes - self.shape.numel() * self.dtype.itemsize


Weight = torch.Tensor | PackedWeight | OneDNNWeight
Stack = torch.Tensor | tuple[Weight, ...]
"""E matrices of one shape: a tensor [E, N, K] or a tuple of [N, K]. Iterating over either gives the matrices."""


def is_native(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the library of CPU kernels computes with tensors of this device and dtype."""
    return device.type == "cpu" and dtype in DTYPES and library() is not None


def can_pack(weight: torch.Tensor) -> bool:
    """Whether `pack` changes a plain tensor."""
    return weight.device.type == "cpu" and (is_native(weight.device, weight.dtype) or onednn.can_pack(weight.dtype))


def pack(weight: Weight) -> Weight:
    """The weight [N, K], packed if this processor has a packed product of its dtype, else unchanged."""
    if not isinstance(weight, torch.Tensor) or not can_pack(weight):
        return weight
    if not is_native(weight.device, weight.dtype):
        return onednn.pack(weight)
    return PackedWeight(product.pack(weight.contiguous()), weight.shape, weight.dtype)


def padding_bytes(weight: Weight | Stack) -> int:
    """Bytes that packing has added."""
    if isinstance(weight, tuple):
        return sum(map(padding_bytes, weight))
    return weight.padding_bytes if isinstance(weight, PackedWeight) else 0


def pack_stack(stack: Stack) -> Stack:
    """The stack with each matrix packed, if `pack` packs its dtype, else unchanged.

    When the stack owns its whole storage, packing frees it at once: two copies of a layer's experts might not fit in memory.
    The plain stack must not be read afterwards.
    """
    if isinstance(stack, tuple) or not can_pack(stack):
        return stack
    packed = tuple(pack(weight) for weight in stack)
    storage = stack.untyped_storage()
    if storage.nbytes() == stack.nbytes:
        storage.resize_(0)
    return packed
