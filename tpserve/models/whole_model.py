"""Lists what all ranks of a model together read from its checkpoint, without allocating it."""

from tpserve.models.rank_weights import RankWeights, sources_in
from tpserve.types.model_spec import ModelSpec
from tpserve.weights.source import Source


def sources(spec: ModelSpec) -> list[Source]:
    """The sources of every parameter, as a single rank reads them."""
    weights = RankWeights(spec, tp_size=1, tp_rank=0)
    found = list(sources_in(weights.outer(first=True, last=True)))
    for layer in range(spec.num_layers):
        found += sources_in(weights.layer(layer))
    return found
