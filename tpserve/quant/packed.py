"""A weight in the layout that oneDNN multiplies fastest on this CPU: a type of its own, made once after loading.

Invariant: dtype and processor decide the layout, the library path and the maximum rows of one call; the number of rows never
does.

Legend: T rows, K inner channels, N outputs, E matrices.
"""

import functools
import platform
from dataclasses import dataclass

import torch

PACKABLE = (torch.bfloat16, torch.float32)
AMX_ROWS = 32
"""With AMX, oneDNN switches to other bfloat16 kernels above this number of rows, depending on the number."""


@dataclass(frozen=True)
class PackedWeight:
    """A packed matrix. `blob` is opaque to torch operations other than the product, and as large as the plain tensor.

    `shape`: (N, K) of the plain tensor. `max_rows`: the maximum rows of one library call; None for no limit.
    """

    blob: torch.Tensor
    shape: torch.Size
    max_rows: int | None

    def product(self, x_TK: torch.Tensor) -> torch.Tensor:
        """x @ weight.T: [T, N] in the dtype of `x`, which is that of the plain tensor."""
        x_TK = x_TK.contiguous()
        if self.max_rows is None or len(x_TK) <= self.max_rows:
            return _product(x_TK, self.blob)
        return torch.cat([_product(rows, self.blob) for rows in torch.split(x_TK, self.max_rows)])


Weight = torch.Tensor | PackedWeight
Stack = torch.Tensor | tuple[Weight, ...]
"""E matrices of one shape: a tensor [E, N, K] or a tuple of [N, K]. Iterating over either gives the matrices."""


def pack(weight: Weight) -> Weight:
    """The weight [N, K], packed if this processor has a packed product of its dtype, else unchanged."""
    if isinstance(weight, PackedWeight) or weight.device.type != "cpu" or not can_pack(weight.dtype):
        return weight
    blob = torch.ops.mkldnn._reorder_linear_weight.default(weight.contiguous())
    return PackedWeight(blob, weight.shape, max_rows(weight.dtype))


def pack_stack(stack: Stack) -> Stack:
    """The stack with each matrix packed, if `pack` packs its dtype, else unchanged.

    When the stack owns its whole storage, packing frees it at once: two copies of a layer's experts might not fit in memory.
    The plain stack must not be read afterwards.
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
    """Whether this processor and this torch have a packed product of `dtype`. Tried once per dtype.

    Only on x86-64: the invariant was not measured with the libraries of other processors.
    """
    if dtype not in PACKABLE or platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        x_TK = torch.ones(4, 16, dtype=dtype)
        _product(x_TK, torch.ops.mkldnn._reorder_linear_weight.default(x_TK))
    except (AttributeError, NotImplementedError, RuntimeError):  # no oneDNN, or a processor without bfloat16
        return False
    return True


def max_rows(dtype: torch.dtype) -> int | None:
    """The maximum rows of one library call, so that a row's bits do not depend on the others; None for no limit."""
    return AMX_ROWS if dtype == torch.bfloat16 and has_amx() else None


def has_amx() -> bool:
    """Whether the processor has tiles for matrix products (AMX)."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private to torch, and missing in some versions
    return supported is not None and bool(supported())


def _product(x_TK: torch.Tensor, blob: torch.Tensor) -> torch.Tensor:
    """One library call: [T, N]."""
    out_TN: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x_TK, blob, None, "none", [], "")
    return out_TN
