"""Where the numbers of a parameter lie in a checkpoint. Owns no file, no device and no tensor; imports no torch."""

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Source:
    """The range `taken` along `dim` of the checkpoint tensor `name`, whose full shape is `shape`.

    The range may have a step: interleaved gate and up rows are two sources. `transposed`: the parameter holds the transpose
    of the range. For a quantized checkpoint, name, shape and range describe the plain tensor; the loader finds the stored
    tensors. A checkpoint may stack the matrices of all experts in one tensor; `instead` describes that place.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    taken: range
    transposed: bool = False
    expert: int = 0
    num_experts: int = 0
    """Unless 0, the tensor is a stack [num_experts, *shape], and the source is the matrix of `expert` in it."""
    instead: "Source | None" = None
    """Where to look when the checkpoint has no tensor `name`."""

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of the checkpoint tensor."""
        return (self.num_experts, *self.shape) if self.num_experts else self.shape

    @property
    def index(self) -> tuple[int | slice, ...]:
        """The range as an index into the checkpoint tensor."""
        taken = (*(slice(None),) * self.dim, slice(self.taken.start, self.taken.stop, self.taken.step))
        return (self.expert, *taken) if self.num_experts else taken

    @property
    def shard(self) -> tuple[int, ...]:
        """Shape of the range, in the checkpoint's orientation."""
        return (*self.shape[: self.dim], len(self.taken), *self.shape[self.dim + 1 :])

    @property
    def num_elements(self) -> int:
        """Elements of the range."""
        return prod(self.shard)
