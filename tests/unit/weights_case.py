"""A small model as a rank holds it, and its checkpoint."""

from pathlib import Path

import torch
from msgspec.structs import replace

from tests.specs import small
from tpserve.models import names_of
from tpserve.models.decoder import Decoder
from tpserve.models.whole_model import sources
from tpserve.parallel.group import Group
from tpserve.types.layout import ParallelLayout, even_layers
from tpserve.types.model_spec import ModelSpec
from tpserve.weights.checkpoint import Checkpoint
from tpserve.weights.dummy import dummy
from tpserve.weights.load import Loaded, load
from tpserve.weights.parameter import Parameter
from tpserve.weights.source import Source
from tpserve.weights.unused_weights import unused_tensors

QWEN3 = {"family": "qwen3", "qkv_bias": True, "out_bias": True, "mlp_bias": True, "qk_norm": "head", "norm_eps": 1e-6}
SPEC = small(**QWEN3, num_layers=5, hidden_size=24, head_dim=4, max_position=64)
TIED = replace(SPEC, tie_embeddings=True)


class Seat(Group):
    """A place in a group nobody talks in."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def decoder(
    rank: int = 0, tp: int = 1, stage: int = 0, pp: int = 1, spec: ModelSpec = SPEC, dtype: torch.dtype = torch.float32
) -> Decoder:
    layout = ParallelLayout(tp, pp, even_layers(spec.num_layers, pp))
    return Decoder(spec, layout, stage, Seat(rank, tp), dtype, torch.device("cpu"), 16)


def tensors(parameters: list[Parameter]) -> dict[str, torch.Tensor]:
    """By checkpoint name; of a whole model these are the checkpoint."""
    return {source.name: place.clone() for parameter in parameters for source, place in parameter.parts()}


def whole_checkpoint() -> dict[str, torch.Tensor]:
    """Of `SPEC`."""
    model = decoder()
    dummy(model.parameters(), seed=3)
    return tensors(model.parameters())


def read(directory: Path, model: Decoder) -> Loaded:
    """As rank 0 does it."""
    checkpoint = Checkpoint.open(directory, names_of(model.spec))
    unused_tensors(sources(model.spec), checkpoint, model.spec.num_layers)
    return load(model.parameters(), checkpoint)


def poison(model: Decoder) -> Decoder:
    """So that a place nobody fills shows."""
    for parameter in model.parameters():
        parameter.tensor.fill_(torch.nan)
    return model


def range_of(tensor: torch.Tensor, source: Source) -> torch.Tensor:
    """What the source takes."""
    return tensor.narrow(source.dim, source.taken.start, len(source.taken))
