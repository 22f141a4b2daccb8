"""Filling parameters from a checkpoint, by slices: a rank reads its own shard and nothing else.

Everything is checked before the first byte of a tensor is read.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tpserve.weights import files
from tpserve.weights.checkpoint import Checkpoint, LocatedTensor
from tpserve.weights.files import WeightFile
from tpserve.weights.parameter import Parameter

READAHEAD_BYTES = 64 * 1024
"""The kernel reads ahead at least this much."""


@dataclass(frozen=True)
class Loaded:
    """Bytes of the slices asked for, and bytes of the files that had to be read for them, in the files' types."""

    requested_bytes: int
    physical_bytes: int


def load(
    parameters: Sequence[Parameter],
    checkpoint: Checkpoint,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Loaded:
    """Fill the parameters; `progress(bytes_done, bytes_total)` follows each slice. UserError names what does not fit."""
    by_files: dict[tuple[Path, ...], list[tuple[LocatedTensor, torch.Tensor]]] = defaultdict(list)
    for parameter in parameters:
        for source, place in parameter.parts():
            located = checkpoint.stored(source)
            by_files[located.paths].append((located, place))
    total = physical = done = 0
    for paths, parts in by_files.items():
        with _opened(paths) as opened:
            for located, _ in parts:
                cuts = _slices(located, opened)
                total += sum(cut.nbytes for cut in cuts)
                physical += sum(map(_physical_bytes, cuts))
    for paths, parts in sorted(by_files.items()):
        with _opened(paths) as opened:
            for located, place in parts:
                cuts = _slices(located, opened)
                located.scheme.load(located.source, cuts, place)
                done += sum(cut.nbytes for cut in cuts)
                progress(done, total)
    return Loaded(total, physical)


@contextmanager
def _opened(paths: Sequence[Path]) -> Iterator[dict[Path, WeightFile]]:
    """The files in which one tensor lies: two when its scales are in the next one."""
    with ExitStack() as stack:
        yield {path: stack.enter_context(files.open_file(path)) for path in set(paths)}


def _slices(located: LocatedTensor, opened: dict[Path, WeightFile]) -> list[torch.Tensor]:
    held = [opened[path].tensor_of(tensor) for tensor, path in zip(located.tensors, located.paths, strict=True)]
    return located.scheme.slice(located.source, held)


def _physical_bytes(cut: torch.Tensor) -> int:
    """Between the first byte and the last there are gaps, which come along where the kernel reads ahead beyond them."""
    run = 1
    for stride, size in sorted(zip(cut.stride(), cut.shape, strict=True)):
        if stride != run:
            break
        run *= size
    cover = 1 + sum((size - 1) * stride for size, stride in zip(cut.shape, cut.stride(), strict=True))
    return min(cover * cut.itemsize, cut.numel() // run * max(run * cut.itemsize, READAHEAD_BYTES))
