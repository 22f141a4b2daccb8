"""How the ranks divide the model."""

from msgspec import Struct


class ParallelLayout(Struct, frozen=True, array_like=True):
    """The grid of ranks: rank = stage * tp + tp_rank, so that the tensor-parallel ranks of a stage are consecutive.

    `layers`: number of layers of each stage; the sum is the model's number of layers. `expert_parallel`: each rank of a stage
    holds a range of whole experts, instead of some channels of every expert.
    """

    tp: int
    pp: int
    layers: tuple[int, ...]
    expert_parallel: bool = False

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp

    def stage_of(self, rank: int) -> int:
        """The pipeline stage of a rank."""
        return rank // self.tp

    def tp_rank_of(self, rank: int) -> int:
        """The index of a rank among the tensor-parallel ranks of its stage."""
        return rank % self.tp

    def layers_of(self, stage: int) -> range:
        """The layers of a stage, as indices into the whole model."""
        first = sum(self.layers[:stage])
        return range(first, first + self.layers[stage])

    @property
    def sampling_rank(self) -> int:
        """The rank that sends step results: tensor-parallel rank 0 of the last stage."""
        return self.world_size - self.tp


def even_layers(num_layers: int, stages: int) -> tuple[int, ...]:
    """The default number of layers of each stage: equal, and one more for earlier stages when there is a remainder."""
    base, remainder = divmod(num_layers, stages)
    return tuple(base + (stage < remainder) for stage in range(stages))
