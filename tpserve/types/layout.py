"""How the ranks divide the model."""

from msgspec import Struct


class ParallelLayout(Struct, frozen=True, array_like=True):
    """Tensor-parallel ranks are neighbours, pipeline stages are strides: rank = stage * tp + tp_rank.

    `layers`: layers per stage, one entry a stage; its sum is the model's number of layers. `expert_parallel`: a stage's ranks
    hold whole experts, each a range of them, instead of a part of every expert.
    """

    tp: int
    pp: int
    layers: tuple[int, ...]
    expert_parallel: bool = False

    @property
    def world_size(self) -> int:
        return self.tp * self.pp

    def stage_of(self, rank: int) -> int:
        return rank // self.tp

    def tp_rank_of(self, rank: int) -> int:
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
    """Layers per stage where nobody says otherwise; earlier stages take the odd ones."""
    base, odd = divmod(num_layers, stages)
    return tuple(base + (stage < odd) for stage in range(stages))
