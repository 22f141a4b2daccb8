"""Fills parameters from a checkpoint, one after another and slice by slice: a rank reads only its own shard.

Shapes and dtypes of all tensors are checked before the first byte of any tensor is read. Parameters on a card are filled all at
once, by threads that read ahead (`staging`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from tpserve.weights.checkpoint import Checkpoint, LocatedTensor
from tpserve.weights.parameter import Parameter
from tpserve.weights.staging import Slab, send_all, slabs

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
            self._count(sum(cut.nbytes for cut in cuts))

    def fill_on_card(self, parameters: Sequence[Parameter]) -> None:
        """Read parameters that are on one card."""
        for slab in send_all(self._slabs(parameters), parameters[0].tensor.device):
            self._count(slab.rows.nbytes)

    def _slabs(self, parameters: Sequence[Parameter]) -> Iterator[Slab]:
        """All that the parameters need, in order."""
        for parameter in parameters:
            for source, view in parameter.parts():
                located = self._checkpoint.stored(source)
                yield from _slabs_of(located, self._slices(located), view)

    def _count(self, num_bytes: int) -> None:
        self._done += num_bytes
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
    if parameters and parameters[0].tensor.is_cuda:
        loader.fill_on_card(parameters)
    else:
        for parameter in parameters:
            loader.fill(parameter)
    return loader.loaded


def _slabs_of(located: LocatedTensor, cuts: Sequence[torch.Tensor], view: torch.Tensor) -> Iterator[Slab]:
    """A tensor's slabs. Rows of a plain tensor go into their place at once, those of a quantized one when all are there."""
    scheme, source = located.scheme, located.source
    if scheme.by_rows:
        yield from slabs(cuts[0], lambda rows, there: scheme.load(source, [there], view[rows]))
        return
    places = [torch.empty(cut.shape, dtype=cut.dtype, device=view.device) for cut in cuts]
    for cut, place in zip(cuts, places, strict=True):

        def take(rows: slice, there: torch.Tensor, place: torch.Tensor = place) -> None:
            place[rows].copy_(there)
            if place is places[-1] and rows.stop >= len(place):
                scheme.load(source, places, view)

        yield from slabs(cut, take)


def _physical_bytes(cut: torch.Tensor) -> int:
    """Bytes that the kernel reads for a slice: read-ahead also reads the gaps between its contiguous runs."""
    run = 1
    for stride, size in sorted(zip(cut.stride(), cut.shape, strict=True)):
        if stride != run:
            break
        run *= size
    cover = 1 + sum((size - 1) * stride for size, stride in zip(cut.shape, cut.stride(), strict=True))
    return min(cover * cut.itemsize, cut.numel() // run * max(run * cut.itemsize, READAHEAD_BYTES))
