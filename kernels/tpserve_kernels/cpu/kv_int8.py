"""Keys and values in int8: a head of a position is D integers and after them their float32 scale, D + 4 int8 in all.

kernels/cpu/kv_int8.h reads and writes the same form, for `qkv_heads.place_heads`, `write_kv` and attention. Symmetric: the
largest magnitude of a head becomes 127.

Legend: K heads, D channels; leading dimensions are free.
"""

import torch

SCALE_BYTES = 4
LEAST = 1e-30
"""A head whose magnitudes are all below it becomes zeros."""


def quantize_heads_reference(x_KD: torch.Tensor) -> torch.Tensor:
    """int8 [.., K, D + 4] of numbers [.., K, D], rounded to nearest even. A head that is not finite reads back as NaN."""
    x_KD = x_KD.float()
    most_K1 = x_KD.abs().amax(-1, keepdim=True)
    finite_K1, tiny_K1 = most_K1.isfinite(), most_K1 < LEAST
    scale_K1 = (most_K1 / 127).masked_fill(tiny_K1, 0).masked_fill(~finite_K1, torch.nan)
    inverse_K1 = most_K1.new_tensor(127).div(most_K1).masked_fill(tiny_K1, 0)  # 127 / x is a reciprocal and a product in torch
    integers_KD = (x_KD * inverse_K1).masked_fill(~finite_K1, 0).round().to(torch.int8)
    return torch.cat([integers_KD, scale_K1.view(torch.int8)], -1)


def dequantize_heads_reference(cache_KX: torch.Tensor) -> torch.Tensor:
    """float32 [.., K, D] of int8 [.., K, D + 4]."""
    scale_K1 = cache_KX[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return cache_KX[..., :-SCALE_BYTES] * scale_K1
