"""What all ranks of a model together want of its checkpoint, without allocating it."""

import torch

from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.types.layout import ParallelLayout
from tpserve.types.model_spec import ModelSpec
from tpserve.weights.parameter import Source


def sources(spec: ModelSpec) -> list[Source]:
    """Of every parameter, as a single rank would take them."""
    layout = ParallelLayout(1, 1, (spec.num_layers,))
    decoder = Decoder(spec, layout, 0, Group(), torch.float32, torch.device("meta"), max_positions=1)
    return [source for parameter in decoder.parameters() for source in parameter.sources]
