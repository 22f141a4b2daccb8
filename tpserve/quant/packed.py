"""A weight in the layout that oneDNN multiplies fastest on this CPU: a type of its own, made once after loading.

Invariant: the layout, the path through the library and the most rows of one call are chosen by dtype and processor, once, never
by the number of rows. Shapes: T rows, K inner, N outputs, E matrices.
"""

import functools
import platform
from dataclasses import dataclass

import torch

PACKABLE = (torch.bfloat16, torch.float32)
AMX_ROWS = 32
"""With AMX, oneDNN takes another kernel for bfloat16 above so many rows, and others for other numbers of rows."""


@dataclass(frozen=True)
class PackedWeight:
    """`blob` is opaque: nothing but a product can be done with it. It takes as many bytes as the plain tensor.

    `shape`: (N, K) of the plain tensor. `max_rows`: of one call of the library; None for any number.
    """

    blob: torch.Tensor
    shape: torch.Size
    max_rows: int | None

    def product(self, x_TK: torch.Tensor) -> torch.Tensor:
        """x @ weight.T: [T, N]."""
        x_TK = x_TK.contiguous()
        if self.max_rows is None or len(x_TK) <= self.max_rows:
            return _product(x_TK, self.blob)
        return torch.cat([_product(rows, self.blob) for rows in torch.split(x_TK, self.max_rows)])


Weight = torch.Tensor | PackedWeight
Stack = torch.Tensor | tuple[Weight, ...]
"""Matrices of one shape: [E, N, K], or each by itself. Iterating over either gives the matrices."""


def pack(weight: Weight) -> Weight:
    """Packed where this processor has a packed product of the dtype, else the weight as it is; [N, K]."""
    if isinstance(weight, PackedWeight) or weight.device.type != "cpu" or not can_pack(weight.dtype):
        return weight
    blob = torch.ops.mkldnn._reorder_linear_weight.default(weight.contiguous())
    return PackedWeight(blob, weight.shape, max_rows(weight.dtype))


def pack_stack(stack: Stack) -> Stack:
    """Each matrix packed where `pack` packs, else the stack as it is.

    A packed stack's memory is given back at once, if nothing but the stack is in it: a layer's experts are too large to be held
    twice until all of the layer is packed. Nobody may read the plain stack afterwards.
    """
    if isinstance(stack, tuple) or stack.device.type != "cpu" or not can_pack(stack.dtype):
        return stack
    packed = tuple(pack(weight) for weight in stack)
    storage = stack.untyped_storage()
    if storage.nbytes() == stack.nbytes:
        storage.resize_(0)
    return packed


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this processor and this torch have the packed product of a dtype, found by trying it once.

    On x86-64 only: what other processors' libraries make of it was never measured.
    """
    if dtype not in PACKABLE or platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        x_TK = torch.ones(4, 16, dtype=dtype)
        _product(x_TK, torch.ops.mkldnn._reorder_linear_weight.default(x_TK))
    except (AttributeError, NotImplementedError, RuntimeError):  # without oneDNN, or without bfloat16 in the processor
        return False
    return True


def max_rows(dtype: torch.dtype) -> int | None:
    """How many rows of a dtype one call of the library may have at most, so that a row's bits do not depend on the others."""
    return AMX_ROWS if dtype == torch.bfloat16 and has_amx() else None


def has_amx() -> bool:
    """Whether the processor has tiles for matrix products (AMX)."""
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)  # torch's own, not for the public
    return asked is not None and bool(asked())


def _product(x_TK: torch.Tensor, blob: torch.Tensor) -> torch.Tensor:
    out_TN: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x_TK, blob, None, "none", [], "")
    return out_TN
