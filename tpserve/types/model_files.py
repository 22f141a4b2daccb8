"""Where a model's files are on this node."""

from typing import NamedTuple

from msgspec import Struct

from tpserve.types.sampling import SamplingDefaults


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


TOKENIZER_FORMATS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
"""The files that a tokenizer's vocabulary stands in: the Rust library's own, SentencePiece's, byte-level BPE. The first that a
directory or repository has is read."""
CHAT_TEMPLATES_DIR = "additional_chat_templates"
"""The folder of chat templates besides the one for plain conversations, NAME.jinja each."""


class Snapshot(Struct, frozen=True):
    """A repository of the hub at one commit, in a cache on this node; its small files are there, its weights may not be yet.

    `weights`: file name and bytes (0 where the hub did not say) of what ranks read; empty when they read none.
    """

    repository: str
    commit: str
    cache: str
    weights: tuple[tuple[str, int], ...] = ()


class ModelFiles(Struct, frozen=True):
    """What MODEL, --tokenizer and --chat-template come to: two directories and a text or a name (None: the tokenizer's default).

    `snapshot`: None when MODEL is a directory. `sampling_defaults`: what the files say, once they are read.
    """

    directory: str
    tokenizer: str
    chat_template: str | None = None
    snapshot: Snapshot | None = None
    sampling_defaults: SamplingDefaults = SamplingDefaults()
