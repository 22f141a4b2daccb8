"""Reads a model directory's JSON. Knows where fields are, not what they mean (that is `models/`)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpserve.errors import UserError


def read(directory: Path | str, eos_ids: Sequence[int] = ()) -> dict[str, Any]:
    """config.json as a dict. `eos_ids` that it does not name are added to its `eos_token_id`."""
    directory = Path(directory)
    if (foreign := unsupported_format(directory)) is not None:
        raise foreign
    if not directory.is_dir():
        raise UserError(f"no model directory {directory}: give the path of a directory with config.json and safetensors files")
    config = read_object(directory / "config.json")
    named = config.get("eos_token_id")
    known = named if isinstance(named, list) else [] if named is None else [named]
    if added := [token for token in eos_ids if token not in known]:
        config["eos_token_id"] = [*known, *added]
    return config


def unsupported_format(path: Path) -> UserError | None:
    """What to say of a model that is a GGUF file, or a directory of nothing else; None for another one."""
    files = [] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if path.suffix == ".gguf" and not path.is_dir():
        what = f"{path} is a GGUF file"
    elif files and not (path / "config.json").exists():
        what = f"{path} holds {files[0].name} and no config.json"
    else:
        return None
    return UserError(
        f"{what}: tpserve reads no GGUF; give the model that it was made from, a directory or a repository ORG/NAME with "
        "config.json and safetensors (or pytorch_model*.bin)",
        param="model",
    )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of the directory. UserError names the file and what is wrong with it."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: a model directory holds {path.name} next to its safetensors files") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): download the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}: download the file again")
    return value
