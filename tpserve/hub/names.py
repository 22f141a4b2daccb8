"""Tell a directory from a repository id, by the name and the local disk. Never uses the network."""

import re
from pathlib import Path

from tpserve.config.model_config import unsupported_format
from tpserve.errors import UserError

MAX_ID = 96
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)


def is_repository(name: str, param: str) -> bool:
    """True for a repository id, False for an existing directory. Raises UserError for anything else. `param`: the flag's name."""
    path = Path(name)
    flag = "--" + param
    if path.is_dir():
        return False
    if param == "model" and (other_format := unsupported_format(path)) is not None:
        raise other_format
    if path.is_file() and path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        raise UserError(f"{name} is a file of weights: {flag} takes the directory that it is in, {path.parent}", param=param)
    if path.exists():
        raise UserError(f"{name} is a file: {flag} takes a directory, or a repository id such as ORG/NAME", param=param)
    if name.startswith(("/", ".", "~")) or name.count("/") != 1 or name.endswith("/"):
        raise UserError(
            f"no {param} directory {name}: give the path of a directory with {_content(param)}, or a repository id ORG/NAME",
            param=param,
        )
    if not _ID.fullmatch(name) or "--" in name or ".." in name or len(name) > MAX_ID:
        raise UserError(
            f"{name!r} is neither a directory here nor a repository id: an id is ORG/NAME of letters, digits and . _ -",
            param=param,
        )
    return True


def check_revision(revision: str, param: str) -> None:
    """Raise UserError when `revision` cannot be a branch, tag or commit. `param`: the flag's name."""
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise UserError(f"--{param.replace('_', '-')} {revision!r} is no branch, tag or commit", param=param)


def _content(param: str) -> str:
    """What the flag's directory contains, for an error."""
    return "config.json and safetensors files" if param == "model" else "a tokenizer's files"
