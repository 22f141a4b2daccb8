"""A parameter of the model: its tensor and the sources that a loader fills it from. Owns no file.

A fused parameter (query-key-value, gate-up) has several sources, concatenated along dim 0, each with its own range of
a checkpoint tensor, which may be fused as well.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tpserve.weights.source import Source


@dataclass(frozen=True)
class Parameter:
    """`tensor` is allocated once and filled in place."""

    tensor: torch.Tensor
    sources: tuple[Source, ...]

    @staticmethod
    def empty(sources: tuple[Source, ...], dtype: torch.dtype, device: torch.device) -> "Parameter":
        """Allocate an uninitialised tensor for the sources."""
        shards = [source.shard[::-1] if source.transposed else source.shard for source in sources]
        shape = (sum(shard[0] for shard in shards), *shards[0][1:])
        return Parameter(torch.empty(shape, dtype=dtype, device=device), sources)

    def parts(self) -> Iterator[tuple[Source, torch.Tensor]]:
        """Each source with its view of the tensor, which has the shape `source.shard`."""
        row = 0
        for source in self.sources:
            rows = source.shard[-1 if source.transposed else 0]
            view = self.tensor[row : row + rows]
            yield source, view.T if source.transposed else view
            row += rows
        assert row == len(self.tensor), "sources fill the tensor"
