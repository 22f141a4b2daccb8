"""The file that --config names: YAML with a flag's name, or `model`, on each line, as vLLM's. Read into a command line."""

import json
from pathlib import Path
from typing import Any

from tpserve.cli.option import OPTIONS
from tpserve.errors import UserError


def argv_of(path: str) -> list[str]:
    """The command line that says the same. A list is several values, null says nothing. UserError says what is wrong."""
    import yaml  # 30 ms that only a start with a file takes

    try:
        said = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"it cannot be read: {error.strerror}", param="config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"it is no YAML: {' '.join(str(error).split())}", param="config") from None
    if said is None:
        return []
    if not isinstance(said, dict) or not all(isinstance(name, str) for name in said):
        raise UserError("it must hold names and values, such as `max-model-len: 4096`", param="config")
    return [arg for name, value in said.items() for arg in _args(name.replace("_", "-"), value)]


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
