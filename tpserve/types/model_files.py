"""The locations of a model's files on this node."""

from typing import NamedTuple

from msgspec import Struct

from tpserve.types.sampling import SamplingDefaults


class WeightFormat(NamedTuple):
    """File names of weights: the index of several files, the name of a single file, and the pattern of files without an index."""

    index_file: str
    single: str
    pattern: str


WEIGHT_FORMATS = (
    WeightFormat("model.safetensors.index.json", "model.safetensors", "*.safetensors"),
    WeightFormat("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model*.bin"),
)
"""Safetensors and torch's format, in order of preference: the first one that is present is read."""


TOKENIZER_FORMATS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
"""The files that hold a tokenizer's vocabulary (tokenizers library, SentencePiece, byte-level BPE), in order of preference: the
first set that is present is read."""
CHAT_TEMPLATES_DIR = "additional_chat_templates"
"""The folder of a model's additional chat templates, NAME.jinja each."""


class Snapshot(Struct, frozen=True):
    """A hub repository at one commit, in this node's cache. Its small files are present; its weights may not be downloaded yet.

    `weights`: (file name, size in bytes or 0 if unknown) of each file that ranks read; empty when they read none.
    """

    repository: str
    commit: str
    cache: str
    weights: tuple[tuple[str, int], ...] = ()


class ModelFiles(Struct, frozen=True):
    """The resolved MODEL, --tokenizer and --chat-template. `directory`, `tokenizer`: directories on this node.

    `chat_template`: a template's text, or the name of one of the tokenizer's; None: the tokenizer's default. `snapshot`: None
    when MODEL is a directory. `sampling_defaults`: filled in once generation_config.json is read.
    """

    directory: str
    tokenizer: str
    chat_template: str | None = None
    snapshot: Snapshot | None = None
    sampling_defaults: SamplingDefaults = SamplingDefaults()
