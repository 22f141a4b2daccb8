"""A weight in the layout that oneDNN multiplies fastest on this CPU: the form without the library of CPU kernels.

Invariant: dtype and processor decide the layout, the library path and the maximum rows of one call; the number of rows never
does.

Legend: T rows, K inner channels, N outputs.
"""

import functools
import platform
from dataclasses import dataclass

import torch

PACKABLE = (torch.bfloat16, torch.float32)
AMX_ROWS = 32
"""With AMX, oneDNN switches to other bfloat16 kernels above this number of rows, depending on the number."""


@dataclass(frozen=True)
class OneDNNWeight:
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


def pack(weight_NK: torch.Tensor) -> OneDNNWeight:
    """The packed weight [N, K]. `can_pack` must hold for its dtype."""
    blob = torch.ops.mkldnn._reorder_linear_weight.default(weight_NK.contiguous())
    return OneDNNWeight(blob, weight_NK.shape, max_rows(weight_NK.dtype))


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
