"""Adds up what a model's weights take in memory after packing. Owns nothing."""

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch


def held_bytes(parts: Iterable[Any]) -> int:
    """Bytes of every weight in these tensors, lists, tuples and dataclasses; those that share memory count once.

    Counters, which are int64, are no weights.
    """
    held: dict[int, int] = {}
    for tensor in held_tensors(parts):
        if tensor.is_mkldnn:  # oneDNN's tensors do not show their memory
            held[id(tensor)] = tensor.nbytes
        else:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(held.values())


def held_tensors(part: Any) -> Iterator[torch.Tensor]:
    """Every weight in tensors, lists, tuples and dataclasses."""
    if isinstance(part, torch.Tensor):
        if part.dtype != torch.int64:
            yield part
    elif isinstance(part, list | tuple):
        for each in part:
            yield from held_tensors(each)
    elif is_dataclass(part):
        for field in fields(part):
            yield from held_tensors(getattr(part, field.name))
