"""A parameter of the model says what it is made of; loaders fill it. Owns no file and no device.

A fused parameter (query-key-value, gate-up) has several sources, one below the other along dim 0, each with its own
range of a checkpoint tensor, which may be fused as well.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Source:
    """The range `taken` along `dim` of the checkpoint tensor `name`, whose whole shape is `shape`.

    The range may have a step: gate and up that alternate are two sources. `transposed`: the parameter holds the transpose of
    what is taken. Of a quantized checkpoint, name, shape and range are those of the plain tensor; the loader finds what is
    there in its place. A checkpoint may have the matrices of all experts in one tensor; `instead` says where the same
    numbers are then.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    taken: range
    transposed: bool = False
    expert: int = 0
    num_experts: int = 0
    """Unless 0, the tensor is a stack [num_experts, *shape], and this is about the matrix of `expert` in it."""
    instead: "Source | None" = None
    """Where to look when the checkpoint has no tensor `name`."""

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of the checkpoint tensor."""
        return (self.num_experts, *self.shape) if self.num_experts else self.shape

    @property
    def index(self) -> tuple[int | slice, ...]:
        """What is taken, as an index into the checkpoint tensor."""
        taken = (*(slice(None),) * self.dim, slice(self.taken.start, self.taken.stop, self.taken.step))
        return (self.expert, *taken) if self.num_experts else taken

    @property
    def shard(self) -> tuple[int, ...]:
        """Shape of what is taken, as the checkpoint has it."""
        return (*self.shape[: self.dim], len(self.taken), *self.shape[self.dim + 1 :])


@dataclass(frozen=True)
class Parameter:
    """`tensor` is allocated once and filled in place."""

    tensor: torch.Tensor
    sources: tuple[Source, ...]

    @staticmethod
    def empty(sources: tuple[Source, ...], dtype: torch.dtype, device: torch.device) -> "Parameter":
        """Allocate room for the sources."""
        shards = [source.shard[::-1] if source.transposed else source.shard for source in sources]
        shape = (sum(shard[0] for shard in shards), *shards[0][1:])
        return Parameter(torch.empty(shape, dtype=dtype, device=device), sources)

    def parts(self) -> Iterator[tuple[Source, torch.Tensor]]:
        """Each source with its place in the tensor, of the shape of its shard."""
        row = 0
        for source in self.sources:
            rows = source.shard[-1 if source.transposed else 0]
            place = self.tensor[row : row + rows]
            yield source, place.T if source.transposed else place
            row += rows
        assert row == len(self.tensor), "sources fill the tensor"
