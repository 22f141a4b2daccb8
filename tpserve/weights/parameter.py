"""A parameter of the model says what it is made of; loaders fill it. Owns no file and no device.

A fused parameter (query-key-value, gate-up) has several sources, one below the other along dim 0, each with its own
range of its own checkpoint tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Source:
    """The range `taken` along `dim` of the checkpoint tensor `name`, whose whole shape is `shape`."""

    name: str
    shape: tuple[int, ...]
    dim: int
    taken: range

    @property
    def shard(self) -> tuple[int, ...]:
        """Shape of what is taken."""
        return (*self.shape[: self.dim], len(self.taken), *self.shape[self.dim + 1 :])


@dataclass(frozen=True)
class Parameter:
    """`tensor` is allocated once and filled in place."""

    tensor: torch.Tensor
    sources: tuple[Source, ...]

    @staticmethod
    def empty(sources: tuple[Source, ...], dtype: torch.dtype, device: torch.device) -> "Parameter":
        """Allocate room for the sources."""
        shards = [source.shard for source in sources]
        shape = (sum(shard[0] for shard in shards), *shards[0][1:])
        return Parameter(torch.empty(shape, dtype=dtype, device=device), sources)

    def parts(self) -> Iterator[tuple[Source, torch.Tensor]]:
        """Each source with its place in the tensor."""
        row = 0
        for source in self.sources:
            yield source, self.tensor[row : row + source.shard[0]]
            row += source.shard[0]
        assert row == len(self.tensor), "sources fill the tensor"
