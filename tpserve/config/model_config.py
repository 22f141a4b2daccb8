"""Reads a model directory's JSON. Knows where fields are, not what they mean (that is `models/`)."""

import json
from pathlib import Path
from typing import Any

from tpserve.errors import UserError


def read(directory: Path | str) -> dict[str, Any]:
    """config.json as a dict. End-of-sequence ids that only generation_config.json names are added to `eos_token_id`."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"no model directory {directory}: give the path of a directory with config.json and safetensors files")
    config = _object(directory / "config.json")
    if (directory / "generation_config.json").exists():
        more = _ids(_object(directory / "generation_config.json").get("eos_token_id"))
        known = _ids(config.get("eos_token_id"))
        if added := [token for token in more if token not in known]:
            config["eos_token_id"] = [*known, *added]
    return config


def _ids(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _object(path: Path) -> dict[str, Any]:
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
