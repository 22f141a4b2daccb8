"""A dense weight in the layout that oneDNN multiplies fastest on this CPU: a type of its own, made once after loading.

Invariant: the layout and the path through the library are chosen by dtype and processor, never by the number of rows.
"""

from dataclasses import dataclass

import torch

PACKABLE = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class PackedWeight:
    """`blob` is opaque: nothing but a product can be done with it. It takes as many bytes as the plain tensor."""

    blob: torch.Tensor

    def product(self, x_TK: torch.Tensor) -> torch.Tensor:
        """x @ weight.T: [T, N]."""
        out_TN: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x_TK, self.blob, None, "none", [], "")
        return out_TN


Weight = torch.Tensor | PackedWeight


def pack(weight: Weight) -> Weight:
    """Packed where that is known to be faster and to keep the numerics contract (AVX-512), else the weight as it is."""
    if isinstance(weight, PackedWeight) or weight.device.type != "cpu" or weight.dtype not in PACKABLE or not packs():
        return weight
    return PackedWeight(torch.ops.mkldnn._reorder_linear_weight.default(weight))


def packs() -> bool:
    """Whether this processor and this torch have the packed product."""
    has_onednn = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return has_onednn and torch.backends.cpu.get_cpu_capability() == "AVX512"
