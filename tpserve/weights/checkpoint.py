"""A directory of weight files: which tensor is in which file, and reading slices of them. Never loads a whole file.

Safetensors where there are some, else torch's own files; with an index or without.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from tpserve.errors import UserError
from tpserve.types.model_files import WEIGHT_FORMATS
from tpserve.weights import files
from tpserve.weights.names import WeightNames
from tpserve.weights.parameter import Source

ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Element types that are weights as they stand; others (integers, 8-bit floats) are quantized."""


class File:
    """One open file of a checkpoint."""

    def __init__(self, path: Path, file: files.TensorFile, stored: Mapping[str, str]) -> None:
        self._path = path
        self._file = file
        self._stored = stored

    def check(self, source: Source) -> int:
        """Bytes of one element of the source's tensor. UserError when its shape or type is not what the model needs."""
        shape, kind = self._file.facts(self._stored[source.name])
        if shape != source.stored:
            raise UserError(
                f"tensor {source.name} in {self._path} has shape {list(shape)}, but config.json asks for {list(source.stored)}"
            )
        if kind not in ITEM_BYTES:
            raise UserError(f"tensor {source.name} in {self._path} is {kind}: supported are {', '.join(ITEM_BYTES)}")
        return ITEM_BYTES[kind]

    def read(self, source: Source) -> torch.Tensor:
        """The source's range, in the file's dtype."""
        return self._file.read(self._stored[source.name], source.index)


class Checkpoint:
    """Tensor names resolved to files; opening it reads headers only."""

    def __init__(self, directory: Path, paths: Mapping[str, Path], names: WeightNames) -> None:
        """`paths`: where each stored name is. Names saved from a bare transformer lack a prefix and get it here."""
        self.directory = directory
        self.names = names
        prefix = _missing_prefix(paths, names)
        outside = f"{names.head}."
        self._stored = {name if name.startswith(outside) else prefix + name: name for name in paths}
        self._paths = {name: paths[stored] for name, stored in self._stored.items()}

    @staticmethod
    def open(directory: Path | str, names: WeightNames, *, only_safetensors: bool = False) -> "Checkpoint":
        """Find the tensors, by the index file if there is one. UserError for missing, damaged or foreign files."""
        directory = Path(directory)
        for index, single, pattern in WEIGHT_FORMATS[: 1 if only_safetensors else None]:
            if (directory / index).exists():
                return Checkpoint(directory, _indexed(directory, index), names)
            paths = [directory / single] if (directory / single).exists() else sorted(directory.glob(pattern))
            if paths:
                return Checkpoint(directory, _listed(paths), names)
        foreign = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt", "*.gguf") for path in directory.glob(pattern))
        found = f": {foreign[0]} is not read, convert it to safetensors" if foreign else ""
        torchs = "" if only_safetensors else " and no pytorch_model.bin"
        raise UserError(f"no safetensors files{torchs} in {directory}{found}")

    def tensors(self) -> list[str]:
        """All of them, under the model's names."""
        return list(self._paths)

    def held(self, source: Source) -> Source:
        """The source as this checkpoint has it: itself, or what it says to take instead."""
        use_other = source.instead is not None and source.name not in self._paths and source.instead.name in self._paths
        return source.instead if use_other and source.instead is not None else source

    def path_of(self, source: Source) -> Path:
        """The file that holds the source's tensor. UserError when there is none."""
        if source.name not in self._paths:
            raise UserError(
                f"tensor {source.name} with shape {list(source.shape)} is missing from the checkpoint in {self.directory}: "
                "config.json and the weight files do not belong together, or a file is incomplete"
            )
        return self._paths[source.name]

    @contextmanager
    def opened(self, path: Path) -> Iterator[File]:
        """Open one of the files; what goes wrong in it is a UserError that names it."""
        with files.opened(path) as file:
            yield File(path, file, self._stored)


def _missing_prefix(paths: Mapping[str, Path], names: WeightNames) -> str:
    """What the stored names lack of the model's: its outermost modules ("model."), if they were not saved."""
    parts = f"{names.embedding}.weight".split(".")
    for at in range(len(parts) - 1):
        if ".".join(parts[at:]) in paths:
            return "".join(f"{part}." for part in parts[:at])
    return ""


def _listed(paths: list[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        with files.opened(path) as file:
            found.update(dict.fromkeys(file.names(), path))
    return found


def _indexed(directory: Path, index: str) -> dict[str, Path]:
    try:
        weight_map = json.loads((directory / index).read_text())["weight_map"]
        found = {str(name): directory / file for name, file in weight_map.items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{directory / index} is not an index of weight files: download the file again") from None
    for path in sorted(set(found.values())):
        if not path.exists():
            raise UserError(f"{path} is missing, but {index} lists it: download the model's remaining files")
    return found
