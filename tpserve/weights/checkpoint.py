"""A directory of weight files: finds each tensor's file and stored name. Opening it reads headers only.

Reads safetensors if there are any, else torch's own files; with an index or without.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from tpserve.errors import UserError
from tpserve.types.model_files import WEIGHT_FORMATS
from tpserve.weights import files
from tpserve.weights.names import WeightNames
from tpserve.weights.quant_schemes import SCHEMES, QuantScheme
from tpserve.weights.source import Source

OPEN_FILES = 4
"""How many files stay open: a parameter's tensors lie in one or two, and the next parameter's in the same."""


@dataclass(frozen=True)
class LocatedTensor:
    """A source, its quantization scheme, and the stored name and the file of each of the scheme's tensors."""

    source: Source
    scheme: QuantScheme
    tensors: tuple[str, ...]
    paths: tuple[Path, ...]


class Checkpoint:
    """Maps tensor names to files."""

    def __init__(self, directory: Path, paths: Mapping[str, Path], names: WeightNames) -> None:
        """`paths`: the file of each stored name. The prefix of stored names may differ from the model's."""
        self.directory = directory
        self.names = names
        self.file = lru_cache(OPEN_FILES)(files.open_file)
        """Opens a file by its path; those asked for last stay open, for as long as the checkpoint lives."""
        self._paths = paths
        self._stored = names.known(paths)

    @staticmethod
    def open(directory: Path | str, names: WeightNames, *, only_safetensors: bool = False) -> "Checkpoint":
        """Find the tensors, by the index file if there is one. UserError for missing, damaged or unsupported files."""
        directory = Path(directory)
        if (found := _find(directory, only_safetensors)) is not None:
            index, paths = found
            return Checkpoint(directory, _listed(paths) if index is None else _indexed(index), names)
        unsupported = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt", "*.gguf") for path in directory.glob(pattern))
        hint = f": {unsupported[0]} is not read, convert it to safetensors" if unsupported else ""
        torch_files = "" if only_safetensors else " and no pytorch_model.bin"
        raise UserError(f"no safetensors files{torch_files} in {directory}{hint}")

    def tensors(self) -> dict[str, str]:
        """All tensors: the model's name to the stored name."""
        return dict(self._stored)

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors, named as in the model, have the same values."""
        stored = [self._stored[name] for name in (one, other)]
        first, second = (self.file(self._paths[name]).tensor_of(name).tensor for name in stored)
        return torch.equal(first, second)

    def stored(self, source: Source) -> LocatedTensor:
        """Locate a source or, where the checkpoint lacks it, its `instead`. UserError when a tensor is missing."""
        for wanted in (source, source.instead):
            if wanted is not None and (scheme := self._scheme(wanted.name)) is not None:
                known = [wanted.name + suffix for suffix in scheme.suffixes]
                missing = [name for name in known if name not in self._stored]
                if missing:
                    raise UserError(
                        f"tensor {missing[0]} is missing from {self._files()}, which goes with the others of its name"
                    )
                tensors = tuple(self._stored[name] for name in known)
                return LocatedTensor(wanted, scheme, tensors, tuple(self._paths[tensor] for tensor in tensors))
        raise UserError(
            f"tensor {source.name} with shape {list(source.shape)} is missing from {self._files()}: "
            "config.json and the weight files do not belong together, or a file is incomplete"
        )

    def _scheme(self, name: str) -> QuantScheme | None:
        return next((scheme for scheme in SCHEMES if name + scheme.suffixes[-1] in self._stored), None)

    def _files(self) -> str:
        paths = sorted(set(self._paths.values()))
        if len(paths) < 2:
            return str(paths[0]) if paths else f"{self.directory}, whose weight files hold no tensors"
        return f"the {len(paths)} files {paths[0].name} to {paths[-1].name} in {self.directory}"


def weight_files(directory: Path, *, only_safetensors: bool = False) -> list[str]:
    """Names of the files of a directory that `Checkpoint.open` reads, the index first; empty when it has no weights.

    UserError as `Checkpoint.open`.
    """
    found = _find(directory, only_safetensors)
    if found is None:
        return []
    index, paths = found
    read = paths if index is None else [index, *sorted(set(_indexed(index).values()))]
    return [str(path.relative_to(directory)) for path in read]


def _find(directory: Path, only_safetensors: bool) -> tuple[Path | None, list[Path]] | None:
    """The index file of the first format found, or that format's weight files."""
    for index, single, pattern in WEIGHT_FORMATS[: 1 if only_safetensors else None]:
        if (directory / index).exists():
            return directory / index, []
        paths = [directory / single] if (directory / single).exists() else sorted(directory.glob(pattern))
        if paths:
            return None, paths
    return None


def _listed(paths: Iterable[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        for name in files.open_file(path).names():
            if name in found:
                raise UserError(f"tensor {name} is in {found[name]} and in {path}: leave the files of one checkpoint only")
            found[name] = path
    return found


def _indexed(index: Path) -> dict[str, Path]:
    directory = index.parent
    try:
        files = {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{index} is not an index of weight files: download the file again") from None
    for file in sorted(set(files.values())):
        if Path(file).is_absolute() or ".." in Path(file).parts or not file.isprintable() or file in ("", "."):
            raise UserError(f"{index} names {file[:200]!r}, which is no file in its directory: download the index again")
        if not (directory / file).is_file():
            single = next(each.single for each in WEIGHT_FORMATS if each.index_file == index.name)
            instead = f", or remove the index and {single} is read" if (directory / single).exists() else ""
            raise UserError(
                f"{directory / file} is missing, but {index.name} lists it: download the model's remaining files{instead}"
            )
    return {name: directory / file for name, file in files.items()}
