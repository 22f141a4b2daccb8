"""Random weights for `--load-format dummy`: each number is a function of (seed, tensor name, index in the full tensor).

So every layout of ranks gets the same model, and a rank computes only its own shard. Not a statistical generator.
"""

from collections.abc import Sequence
from zlib import crc32

import torch

from tpserve.weights.parameter import Parameter
from tpserve.weights.source import Source

BATCH = 1 << 18
"""Elements computed at a time; bounds the memory of the int64 intermediates."""


def dummy(parameters: Sequence[Parameter], seed: int = 0) -> None:
    """Fill the parameters: matrices with variance 1 / inputs, norms around 1, biases around 0."""
    for parameter in parameters:
        fill(parameter, seed)


def fill(parameter: Parameter, seed: int = 0) -> None:
    """Fill one parameter."""
    for source, view in parameter.parts():
        _fill(view, source, seed)


def _fill(view: torch.Tensor, source: Source, seed: int) -> None:
    is_matrix = len(source.shape) == 2
    spread = (3.0 / source.shape[0 if source.transposed else 1]) ** 0.5 if is_matrix else 0.1
    centre = 0.0 if is_matrix or source.name.endswith(".bias") else 1.0
    width = source.shape[-1] if is_matrix else 1
    taken = torch.arange(source.taken.start, source.taken.stop, source.taken.step, device=view.device)
    columns = taken if source.dim == 1 else torch.arange(width, device=view.device)
    all_rows = taken if source.dim == 0 else torch.arange(source.shape[0], device=view.device)
    all_rows = all_rows + source.expert * source.shape[0]
    key = _mix(torch.tensor(crc32(source.name.encode()) + (seed << 32), device=view.device))
    step = max(1, BATCH // len(columns))
    for row in range(0, len(view), step):
        rows = all_rows[row : row + step]
        bits = _mix(rows.unsqueeze(1) * width + columns + key)
        values = (bits >> 40).float() * 2.0**-23  # 24 signed bits: [-1, 1)
        view[row : row + step] = (centre + spread * values).view(len(rows), *view.shape[1:]).to(view.dtype)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Scatter the bits of int64 counters: the finaliser of SplitMix64 (Steele et al. 2014), shifts made logical by masks."""
    x = (x ^ ((x >> 30) & 0x3_FFFF_FFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1F_FFFF_FFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1_FFFF_FFFF)
