"""Reads the JSON files of a model directory. Does not interpret their fields; `models/` does."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpserve.errors import UserError


def read(directory: Path | str, eos_ids: Sequence[int] = ()) -> dict[str, Any]:
    """config.json as a dict, with `eos_ids` added to its `eos_token_id`. Raises UserError."""
    directory = Path(directory)
    if (error := unsupported_format(directory)) is not None:
        raise error
    if not directory.is_dir():
        raise UserError(f"no model directory {directory}: give the path of a directory with config.json and safetensors files")
    config = read_object(directory / "config.json")
    value = config.get("eos_token_id")
    present = value if isinstance(value, list) else [] if value is None else [value]
    if added := [token for token in eos_ids if token not in present]:
        config["eos_token_id"] = [*present, *added]
    return config


def unsupported_format(path: Path) -> UserError | None:
    """The error for a GGUF file, or a directory that holds only GGUF files; None for any other path."""
    files = [] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if path.suffix == ".gguf" and not path.is_dir():
        what = f"{path} is a GGUF file"
    elif files and not (path / "config.json").exists():
        what = f"{path} holds {files[0].name} and no config.json"
    else:
        return None
    return UserError(
        f"{what}: tpserve does not read GGUF; give the original model, a directory or a repository ORG/NAME with "
        "config.json and safetensors (or pytorch_model*.bin)",
        param="model",
    )


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises UserError that names the file and the problem."""
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
