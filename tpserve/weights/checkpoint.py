"""A directory of safetensors files: which tensor is in which file, and reading slices of them. Never loads a whole file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tpserve.errors import UserError
from tpserve.weights.parameter import Source

INDEX = "model.safetensors.index.json"
ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Element types that are weights as they stand; others (integers, 8-bit floats) are quantized."""
LFS_POINTER = b"version https://git-lfs"
"""How a file begins that Git LFS has not replaced by its content yet."""


class File:
    """One open safetensors file."""

    def __init__(self, path: Path, handle: Any, stored: dict[str, str]) -> None:
        self._path = path
        self._handle = handle
        self._stored = stored

    def check(self, source: Source) -> int:
        """Bytes of one element of the source's tensor. UserError when its shape or type is not what the model needs."""
        tensor = self._handle.get_slice(self._stored[source.name])
        shape, kind = tuple(tensor.get_shape()), tensor.get_dtype()
        if shape != source.shape:
            raise UserError(
                f"tensor {source.name} in {self._path} has shape {list(shape)}, but config.json asks for {list(source.shape)}"
            )
        if kind not in ITEM_BYTES:
            raise UserError(f"tensor {source.name} in {self._path} is {kind}: supported are {', '.join(ITEM_BYTES)}")
        return ITEM_BYTES[kind]

    def read(self, source: Source) -> torch.Tensor:
        """The source's range, in the file's dtype."""
        tensor = self._handle.get_slice(self._stored[source.name])
        taken = slice(source.taken.start, source.taken.stop)
        piece: torch.Tensor = tensor[taken] if source.dim == 0 else tensor[:, taken]
        return piece


class Checkpoint:
    """Tensor names resolved to files; opening it reads headers only."""

    def __init__(self, directory: Path, files: dict[str, Path]) -> None:
        """`files`: where each stored name is. Names saved from a bare transformer lack the prefix "model." and get it here."""
        bare = not any(name.startswith("model.") for name in files)
        self.directory = directory
        self._stored = {f"model.{name}" if bare and not name.startswith("lm_head.") else name: name for name in files}
        self._files = {name: files[stored] for name, stored in self._stored.items()}

    @staticmethod
    def open(directory: Path | str) -> "Checkpoint":
        """Find the tensors, by the index file if there is one. UserError for missing, damaged or foreign files."""
        directory = Path(directory)
        if (directory / INDEX).exists():
            return Checkpoint(directory, _indexed(directory))
        single = directory / "model.safetensors"
        paths = [single] if single.exists() else sorted(directory.glob("*.safetensors"))
        if not paths:
            foreign = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt", "*.gguf") for path in directory.glob(pattern))
            found = f": {foreign[0]} is not read, convert it to safetensors" if foreign else ""
            raise UserError(f"no safetensors files in {directory}{found}")
        files: dict[str, Path] = {}
        for path in paths:
            with _opened(path) as handle:
                files.update(dict.fromkeys(handle.keys(), path))
        return Checkpoint(directory, files)

    def names(self) -> list[str]:
        """All tensors, under the model's names."""
        return list(self._files)

    def path_of(self, source: Source) -> Path:
        """The file that holds the source's tensor. UserError when there is none."""
        if source.name not in self._files:
            raise UserError(
                f"tensor {source.name} with shape {list(source.shape)} is missing from the checkpoint in {self.directory}: "
                "config.json and the safetensors files do not belong together, or a file is incomplete"
            )
        return self._files[source.name]

    @contextmanager
    def opened(self, path: Path) -> Iterator[File]:
        """Open one of the files; what goes wrong in it is a UserError that names it."""
        with _opened(path) as handle:
            yield File(path, handle, self._stored)


def _indexed(directory: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
        files = {str(name): directory / file for name, file in weight_map.items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{directory / INDEX} is not a safetensors index: download the file again") from None
    for path in sorted(set(files.values())):
        if not path.exists():
            raise UserError(f"{path} is missing, but {INDEX} lists it: download the model's remaining files")
    return files


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            yield handle
    except SafetensorError as error:
        with path.open("rb") as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
        if is_pointer:
            raise UserError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in {path.parent}") from None
        raise UserError(f"{path} is damaged or truncated ({error}): download the file again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
