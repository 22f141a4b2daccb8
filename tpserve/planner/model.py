"""The weight files of a model, without reading weights: their sizes and their safetensors headers."""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import msgspec

from tpserve.errors import UserError
from tpserve.types.model_files import WEIGHT_FORMATS, ModelFiles

_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the format."""


class _TensorHeader(msgspec.Struct, frozen=True):
    """The entry of one tensor in a header."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredWeights:
    """The weight files. `elements`: of all tensors, None without headers. `kinds`: their dtypes, the most common first."""

    num_files: int
    num_bytes: int
    elements: int | None = None
    kinds: tuple[str, ...] = ()


def stored(files: ModelFiles) -> StoredWeights | None:
    """The weight files of a model; None without any. Raises UserError for a file with a damaged header."""
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
    """The existing files among those that a server would read."""
    for index_file, single, pattern in WEIGHT_FORMATS:
        index = directory / index_file
        if index.exists():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError):
                raise UserError(f"{index} is not an index of weight files: download the file again") from None
            return [directory / name for name in names if (directory / name).is_file()]
        if paths := [directory / single] if (directory / single).is_file() else sorted(directory.glob(pattern)):
            return paths
    return []


def _header(path: Path) -> list[_TensorHeader]:
    """The entries of all tensors of a file (https://github.com/huggingface/safetensors#format)."""
    try:
        with path.open("rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            fields = msgspec.json.decode(file.read(min(length, _MAX_HEADER_BYTES)), type=dict[str, msgspec.Raw])
        return [msgspec.json.decode(raw, type=_TensorHeader) for name, raw in fields.items() if name != "__metadata__"]
    except (OSError, struct.error, msgspec.DecodeError):
        raise UserError(f"{path} has no safetensors header: download the file again") from None
