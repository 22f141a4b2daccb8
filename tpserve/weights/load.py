"""Filling parameters from a checkpoint, by slices: a rank reads its own shard and nothing else.

Everything is checked before the first byte of a tensor is read.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from tpserve.errors import UserError
from tpserve.weights.checkpoint import Checkpoint
from tpserve.weights.parameter import Parameter, Source

READAHEAD_BYTES = 64 * 1024
"""The kernel reads ahead at least this much: a cut through rows narrower than that brings in the rows whole."""
EXPERT = re.compile(r"\.\d+\.(?=\w+\.weight$)")
"""The number of an expert in the name of one of its matrices."""


@dataclass(frozen=True)
class Loaded:
    """Bytes of the slices asked for, and bytes of the files that had to be read for them."""

    requested_bytes: int
    physical_bytes: int


def load(
    parameters: Sequence[Parameter],
    checkpoint: Checkpoint,
    num_layers: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Loaded:
    """Fill the parameters; `progress(bytes_done, bytes_total)` follows each slice. UserError names what does not fit.

    `num_layers`: of the whole model; the parameters are those of one stage.
    """
    by_file: dict[Path, list[tuple[Source, torch.Tensor]]] = defaultdict(list)
    for parameter in parameters:
        for wanted, place in parameter.parts():
            source = checkpoint.held(wanted)
            by_file[checkpoint.path_of(source)].append((source, place))
    _refuse_unused({source.name for parts in by_file.values() for source, _ in parts}, checkpoint, num_layers)
    sizes: dict[Source, int] = {}
    for path, parts in by_file.items():
        with checkpoint.opened(path) as file:
            sizes.update((source, file.check(source)) for source, _ in parts)
    total = sum(prod(source.shard) * sizes[source] for parts in by_file.values() for source, _ in parts)
    done = physical = 0
    for path, parts in sorted(by_file.items()):
        with checkpoint.opened(path) as file:
            for source, place in parts:
                place.copy_(file.read(source))
                done += prod(source.shard) * sizes[source]
                physical += _physical_bytes(source, sizes[source])
                progress(done, total)
    return Loaded(done, physical)


def _physical_bytes(source: Source, item_bytes: int) -> int:
    narrow = source.dim == 1 and len(source.taken) * item_bytes < READAHEAD_BYTES
    return prod(source.shape if narrow else source.shard) * item_bytes


def _refuse_unused(wanted: set[str], checkpoint: Checkpoint, num_layers: int) -> None:
    """A tensor that no parameter wants (a bias or scale in one of our layers, a layer too many) would change the output.

    Another rank's experts are wanted there; that there are no more than config.json says, the router's shape tells.
    """
    names = checkpoint.names
    ours = {names.layer_of(name) for name in wanted}
    wanted = {EXPERT.sub(".", name) for name in wanted}
    for name in checkpoint.tensors():
        layer = names.layer_of(name)
        if EXPERT.sub(".", name) not in wanted and layer is not None and (layer in ours or layer >= num_layers):
            raise UserError(
                f"{checkpoint.directory} holds tensor {name}, which a model with this config.json does not have: "
                "they do not belong together, or the model needs more than tpserve supports"
            )
