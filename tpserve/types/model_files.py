"""Where a model's files are on this node."""

from typing import NamedTuple

from msgspec import Struct


class WeightFormat(NamedTuple):
    """How files of weights are called: those that an index lists, the only one, and those without an index."""

    index_file: str
    single: str
    pattern: str


WEIGHT_FORMATS = (
    WeightFormat("model.safetensors.index.json", "model.safetensors", "*.safetensors"),
    WeightFormat("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model*.bin"),
)
"""Safetensors, and torch's own. The first that a directory or repository has is read."""


class Snapshot(Struct, frozen=True):
    """A repository of the hub at one commit, in a cache on this node; its small files are there, its weights may not be yet.

    `weights`: file name and bytes (0 where the hub did not say) of what ranks read; empty when they read none.
    """

    repository: str
    commit: str
    cache: str
    weights: tuple[tuple[str, int], ...] = ()


class ModelFiles(Struct, frozen=True):
    """What MODEL, --tokenizer and --chat-template come to: two directories and a text (None: the tokenizer's own template).

    `snapshot`: None when MODEL is a directory.
    """

    directory: str
    tokenizer: str
    chat_template: str | None = None
    snapshot: Snapshot | None = None
