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

    def piece(self, index: int, count: int) -> "Parameter":
        """One of `count` parts with equally many sources and rows, such as an expert of a stack, with memory of its own."""
        num_sources = len(self.sources) // count
        sources = self.sources[index * num_sources : (index + 1) * num_sources]
        return Parameter.empty(sources, self.tensor.dtype, self.tensor.device)

    def parts(self) -> Iterator[tuple[Source, torch.Tensor]]:
        """Each source with its view of the tensor, which has the shape `source.shard`."""
        row = 0
        for source in self.sources:
            rows = source.shard[-1 if source.transposed else 0]
            view = self.tensor[row : row + rows]
            yield source, view.T if source.transposed else view
            row += rows
        assert row == len(self.tensor), "sources fill the tensor"
