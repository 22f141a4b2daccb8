"""Adds up what a model's weights take in memory after packing. Owns nothing."""

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch


def held_bytes(parts: Iterable[Any]) -> int:
    """Bytes of every tensor in these tensors, lists, tuples and dataclasses; those that share memory count once."""
    storages = (tensor.untyped_storage() for tensor in _tensors(parts))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(part: Any) -> Iterator[torch.Tensor]:
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, list | tuple):
        for each in part:
            yield from _tensors(each)
    elif is_dataclass(part):
        for field in fields(part):
            yield from _tensors(getattr(part, field.name))
