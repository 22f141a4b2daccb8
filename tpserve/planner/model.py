"""What is known of a model without its weights: its configuration, and of its files the sizes and the safetensors headers."""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import msgspec

from tpserve.errors import UserError
from tpserve.types.model_files import WEIGHT_FORMATS, ModelFiles

_LENGTH = struct.Struct("<Q")
_MOST_HEADER = 100_000_000
"""As the format allows."""


class _TensorHeader(msgspec.Struct, frozen=True):
    """What a header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredWeights:
    """The weight files. `elements`: of all tensors, None where no headers are here; `kinds`: their types, the commonest first."""

    num_files: int
    num_bytes: int
    elements: int | None = None
    kinds: tuple[str, ...] = ()


def stored(files: ModelFiles) -> StoredWeights | None:
    """None where there are no weight files. UserError for a file whose header is damaged."""
    if files.snapshot is not None:
        sizes = [size for _, size in files.snapshot.weights]
        return StoredWeights(len(sizes), sum(sizes)) if sizes else None
    paths = _paths(Path(files.directory))
    if not paths:
        return None
    num_bytes = sum(path.stat().st_size for path in paths)
    if any(path.suffix != ".safetensors" for path in paths):
        return StoredWeights(len(paths), num_bytes)
    by_kind: dict[str, int] = {}
    for path in paths:
        for tensor in _header(path):
            by_kind[tensor.dtype] = by_kind.get(tensor.dtype, 0) + prod(tensor.shape)
    kinds = sorted(by_kind, key=lambda kind: -by_kind[kind])
    return StoredWeights(len(paths), num_bytes, sum(by_kind.values()), tuple(kinds))


def _paths(directory: Path) -> list[Path]:
    """The files that are there of those that a server would read."""
    for index_file, single, pattern in WEIGHT_FORMATS:
        index = directory / index_file
        if index.exists():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError):
                raise UserError(f"{index} is not an index of weight files: download the file again") from None
            return [directory / name for name in names if (directory / name).is_file()]
        if found := [directory / single] if (directory / single).is_file() else sorted(directory.glob(pattern)):
            return found
    return []


def _header(path: Path) -> list[_TensorHeader]:
    """Of all tensors (https://github.com/huggingface/safetensors#format)."""
    try:
        with path.open("rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            fields = msgspec.json.decode(file.read(min(length, _MOST_HEADER)), type=dict[str, msgspec.Raw])
        return [msgspec.json.decode(raw, type=_TensorHeader) for name, raw in fields.items() if name != "__metadata__"]
    except (OSError, struct.error, msgspec.DecodeError):
        raise UserError(f"{path} has no safetensors header: download the file again") from None
