"""One open weight file, safetensors or torch's own, mapped into memory: untouched pages are not read.

Torch's restricted unpickler reads torch's files and creates nothing but tensors.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open

from tpserve.errors import UserError

LFS_POINTER = b"version https://git-lfs"
"""The first bytes of a Git LFS pointer, which stands in place of the file's content."""
KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.uint8: "U8",
    torch.int8: "I8",
}
"""Dtypes by the names that safetensors uses."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor that views the pages of a mapped file."""

    name: str
    path: Path
    tensor: torch.Tensor

    @property
    def kind(self) -> str:
        """Its dtype, by safetensors' name."""
        return KINDS.get(self.tensor.dtype, str(self.tensor.dtype))

    def __str__(self) -> str:
        return f"tensor {self.name} in {self.path}"


class WeightFile:
    """The tensors of one file."""

    def __init__(self, path: Path, names: Iterable[str], tensor: Callable[[str], torch.Tensor]) -> None:
        self._path = path
        self._names = dict.fromkeys(names)
        self._tensor = tensor

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._names)

    def tensor_of(self, name: str) -> FileTensor:
        """The tensor `name`. UserError when the file lacks it, although the index lists it."""
        if name not in self._names:
            raise UserError(f"{self._path} has no tensor {name}, though the index says so: download the files again")
        with _named(self._path):
            return FileTensor(name, self._path, self._tensor(name))


def open_file(path: Path) -> WeightFile:
    """Open a file by its format. UserError names a damaged or unreadable file."""
    with _named(path):
        if path.suffix == ".bin":
            tensors = _mapped(path)
            return WeightFile(path, tensors, lambda name: tensors[name].detach())
        handle: Any = safe_open(path, framework="pt", device="cpu")
        return WeightFile(path, handle.keys(), handle.get_tensor)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of reading the file as UserErrors."""
    try:
        yield
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
    except Exception as error:  # torch raises many types for broken files and for pickles of other things than tensors
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
