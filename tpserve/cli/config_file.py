"""Reads the --config file into a command line: YAML as in vLLM, a flag's name (or `model`) and its value on each line."""

import json
from pathlib import Path
from typing import Any

from tpserve.cli.option import OPTIONS
from tpserve.errors import UserError


def argv_of(path: str) -> list[str]:
    """The equivalent command line. A list becomes several values; null is skipped. Raises UserError for a file it cannot use."""
    import yaml  # takes 30 ms, so only a start with a file imports it

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"it cannot be read: {error.strerror}", param="config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"it is no YAML: {' '.join(str(error).split())}", param="config") from None
    if content is None:
        return []
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError("it must hold names and values, such as `max-model-len: 4096`", param="config")
    return [arg for name, value in content.items() for arg in _args(name.replace("_", "-"), value)]


def _args(name: str, value: Any) -> list[str]:
    flag = f"--{name}"
    if flag == "--config":
        raise UserError("it names another file: put everything into one", param="config")
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else f"--no-{name}"]
    if isinstance(value, list):
        option = OPTIONS.get(name.replace("-", "_"))
        return [f"{flag}={','.join(map(str, value))}"] if option is not None and not option.many else [flag, *map(str, value)]
    return [f"{flag}={json.dumps(value) if isinstance(value, dict) else value}"]
