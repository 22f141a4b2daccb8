"""Integers of a step, from Python to the device: all arrays of a batch in one copy."""

from array import array
from collections.abc import Sequence

import torch

ALIGNMENT = 16
"""Bytes: where arrays begin on a card. Triton compiles a kernel once more for addresses that are no multiples of this."""
DTYPES = {"q": torch.int64, "i": torch.int32, "f": torch.float32, "d": torch.float64}
"""The tensor dtype of each typecode of `array` in use."""


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to the device without waiting."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def copy_arrays(arrays: Sequence["array[int] | array[float]"], device: torch.device) -> list[torch.Tensor]:
    """Each array as a tensor [N] of the device, in one copy without waiting. On the CPU tensors share the arrays' memory."""
    if device.type == "cpu":
        return [torch.frombuffer(data, dtype=DTYPES[data.typecode]) if data else _empty(data.typecode) for data in arrays]
    ends: list[int] = []
    joined = bytearray()
    for data in arrays:
        joined += data.tobytes()
        ends.append(len(joined))
        joined += bytes(-len(joined) % ALIGNMENT)
    on_device = to_device(torch.frombuffer(joined, dtype=torch.uint8), device)
    sizes = (len(data) * data.itemsize for data in arrays)
    return [on_device[end - size : end].view(DTYPES[data.typecode]) for data, end, size in zip(arrays, ends, sizes, strict=True)]


def _empty(typecode: str) -> torch.Tensor:
    return torch.empty(0, dtype=DTYPES[typecode])
