"""Finds the model that the flags name and reads its configuration. All ways of starting use it."""

from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace

from tpserve import builtin
from tpserve.config import generation_config, model_config
from tpserve.config.flags import Flags
from tpserve.models import model_spec
from tpserve.types.model_files import ModelFiles
from tpserve.types.model_spec import ModelSpec


def load_model_config(flags: Flags, find: Callable[[Flags], ModelFiles]) -> tuple[Flags, ModelFiles, ModelSpec]:
    """Find the model, or the built-in model without one, and read its configuration.

    For a repository, the returned flags name the commit. UserError names what is missing or not supported.
    """
    if flags.model is None:
        flags = replace(flags, model=str(builtin.path()), served_model_name=flags.served_model_name or (builtin.NAME,))
    files = find(flags)
    if files.snapshot is not None:
        flags = replace(flags, revision=files.snapshot.commit)
    generation = generation_config.load(flags, files.directory)
    config = model_config.read(files.directory, generation.eos_ids)
    files = replace(files, sampling_defaults=generation.sampling)
    return flags, files, model_spec(config, str(Path(files.directory, "config.json")))
