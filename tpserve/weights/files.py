"""One open file of weights, safetensors or torch's own: which tensors it holds, and slices of them.

Torch's files are mapped into memory and unpickled by torch's restricted reader, which makes nothing but tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open

from tpserve.errors import UserError

LFS_POINTER = b"version https://git-lfs"
"""How a file begins that Git LFS has not replaced by its content yet."""
KINDS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Types in the words of safetensors."""
Index = tuple[int | slice, ...]
"""A place in the first dimensions, and a range of the next."""


class TensorFile(Protocol):
    """What both formats can tell."""

    def names(self) -> list[str]:
        """Of all tensors."""
        ...

    def facts(self, name: str) -> tuple[tuple[int, ...], str]:
        """A tensor's shape and type."""
        ...

    def read(self, name: str, index: Index) -> torch.Tensor:
        """A part of a tensor, in the file's type."""
        ...


class SafetensorsFile:
    """Reads the slices it is asked for."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._handle.keys())

    def facts(self, name: str) -> tuple[tuple[int, ...], str]:
        """A tensor's shape and type."""
        tensor = self._handle.get_slice(name)
        return tuple(tensor.get_shape()), tensor.get_dtype()

    def read(self, name: str, index: Index) -> torch.Tensor:
        """A part of a tensor."""
        piece: torch.Tensor = self._handle.get_slice(name)[index]
        return piece


class TorchFile:
    """The tensors are the file's pages: what is not looked at is not read."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._tensors)

    def facts(self, name: str) -> tuple[tuple[int, ...], str]:
        """A tensor's shape and type."""
        tensor = self._tensors[name]
        return tuple(tensor.shape), KINDS.get(tensor.dtype, str(tensor.dtype))

    def read(self, name: str, index: Index) -> torch.Tensor:
        """A part of a tensor."""
        return self._tensors[name].detach()[index]


@contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """Open a file by its format; what goes wrong in it is a UserError that names it."""
    try:
        if path.suffix == ".bin":
            yield TorchFile(_mapped(path))
        else:
            with safe_open(path, framework="pt", device="cpu") as handle:
                yield SafetensorsFile(handle)
    except SafetensorError as error:
        raise _damaged(path, str(error)) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _mapped(path: Path) -> dict[str, torch.Tensor]:
    if not is_zipfile(path):
        raise _damaged(path, "no zip archive, as torch 1.6 and later write")
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of whatever part of the format is wrong, or asks for more than tensors
        raise _damaged(path, str(error).split("\n", 1)[0]) from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"{path} holds something else than tensors by their names: convert it to safetensors")
    return tensors


def _damaged(path: Path, why: str) -> UserError:
    with path.open("rb") as file:
        is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    if is_pointer:
        return UserError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in {path.parent}")
    return UserError(f"{path} is damaged or truncated ({why}): download the file again")
