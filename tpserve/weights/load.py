"""Fills parameters from a checkpoint, one after another and slice by slice: a rank reads only its own shard.

Shapes and dtypes of all tensors are checked before the first byte of any tensor is read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tpserve.weights.checkpoint import Checkpoint, LocatedTensor
from tpserve.weights.parameter import Parameter

READAHEAD_BYTES = 64 * 1024
"""The kernel reads ahead at least this much."""


@dataclass(frozen=True)
class Loaded:
    """Bytes of the requested slices, and bytes that the kernel reads from the files for them, both in the files' dtypes."""

    requested_bytes: int
    physical_bytes: int


class Loader:
    """Fills the parameters of a model, each when the caller asks for it. `loaded`: what all of them take."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        checkpoint: Checkpoint,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Check all parameters. `progress(bytes_done, bytes_total)` is called after each slice that is read.

        UserError names a tensor that is missing or has another shape or dtype.
        """
        self._checkpoint, self._progress, self._done = checkpoint, progress, 0
        total = physical = 0
        located = [checkpoint.stored(source) for parameter in parameters for source in parameter.sources]
        for tensor in sorted(located, key=lambda tensor: tensor.paths):  # each file is opened once
            cuts = self._slices(tensor)
            total += sum(cut.nbytes for cut in cuts)
            physical += sum(map(_physical_bytes, cuts))
        self.loaded = Loaded(total, physical)

    def fill(self, parameter: Parameter) -> None:
        """Read one of the parameters, or a piece of one."""
        for source, view in parameter.parts():
            located = self._checkpoint.stored(source)
            cuts = self._slices(located)
            located.scheme.load(located.source, cuts, view)
            self._done += sum(cut.nbytes for cut in cuts)
            self._progress(self._done, self.loaded.requested_bytes)

    def _slices(self, located: LocatedTensor) -> list[torch.Tensor]:
        tensors = [self._checkpoint.file(path).tensor_of(name) for name, path in zip(located.tensors, located.paths, strict=True)]
        return located.scheme.slice(located.source, tensors)


def load(
    parameters: Sequence[Parameter],
    checkpoint: Checkpoint,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Loaded:
    """Fill all parameters. Arguments and errors are those of `Loader`."""
    loader = Loader(parameters, checkpoint, progress)
    for parameter in parameters:
        loader.fill(parameter)
    return loader.loaded


def _physical_bytes(cut: torch.Tensor) -> int:
    """Bytes that the kernel reads for a slice: read-ahead also reads the gaps between its contiguous runs."""
    run = 1
    for stride, size in sorted(zip(cut.stride(), cut.shape, strict=True)):
        if stride != run:
            break
        run *= size
    cover = 1 + sum((size - 1) * stride for size, stride in zip(cut.shape, cut.stride(), strict=True))
    return min(cover * cut.itemsize, cut.numel() // run * max(run * cut.itemsize, READAHEAD_BYTES))
