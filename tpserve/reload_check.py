"""Checks whether a running server may reload, in a process of its own: reading a model must not hold up the frontend's streams.

    python -m tpserve.reload_check PARENT_PID        stdin: a ReloadQuestion in JSON, stdout: a ReloadVerdict

It dies with its parent. Changes nothing but the hub's cache, as a start does. Never loads torch.
"""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from tpserve.cli.command import did_you_mean
from tpserve.cli.keywords import read_value
from tpserve.cli.option import OPTIONS
from tpserve.config.reload import (
    Candidate,
    Launched,
    ReloadQuestion,
    ReloadVerdict,
    check_durable_answers,
    check_same_shape,
    fixed_because,
    with_changes,
)
from tpserve.config.resolve import resolve
from tpserve.errors import EngineFailure, UserError
from tpserve.hub.locate import TOKENIZER_EXTRAS, locate, weights_of
from tpserve.models.load_config import load_model_config
from tpserve.process.process_utils import die_with
from tpserve.types.model_files import TOKENIZER_FORMATS, WEIGHT_FORMATS

_TOKENIZER_FILES = (*(name for names in TOKENIZER_FORMATS for name in names), *TOKENIZER_EXTRAS)


def main(arguments: list[str]) -> int:
    """Answer one question; returns the exit code."""
    die_with(int(arguments[0]))
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=ReloadQuestion)
    try:
        verdict = ReloadVerdict(check(question.present, question.values))
    except UserError as error:
        verdict = ReloadVerdict(error=str(error), param=error.param)
    except EngineFailure as error:  # another process stalls in a download
        verdict = ReloadVerdict(error=str(error))
    sys.stdout.buffer.write(msgspec.json.encode(verdict))
    return 0


def check(present: Candidate, values: Mapping[str, Any]) -> Candidate:
    """The configuration with `values`, flags by field name. UserError when a running server cannot take it over."""
    changed = read_changes(values)
    before = replace(present.launched.flags, served_model_name=present.config.served_model_name)
    if changed.get("model", before.model) != before.model and before.revision is not None:
        changed = {"revision": None} | changed  # a branch or a commit of the other repository
    flags = with_changes(before, changed)
    flags, files, spec = load_model_config(flags, lambda flags: locate(flags, head=True))
    if files.snapshot is not None:
        changed["revision"] = files.snapshot.commit
    check_same_shape(present.launched.spec, spec)
    check_same_tokenizer(Path(present.config.tokenizer), Path(files.tokenizer))
    if flags.load_format != "dummy":
        missing = _missing_weights(Path(files.directory)) if files.snapshot is None else weights_of(files.snapshot).missing()
        if missing:
            raise UserError(
                f"{files.directory} has no {missing[0]}: put the weights there first; a reload does not wait for a download",
                param="model",
            )
    config = resolve(flags, files, spec, present.launched.machine)
    changes = present.changes | msgspec.to_builtins(changed)
    new_weights = (config.model, config.snapshot) != (present.config.model, present.config.snapshot)
    candidate = Candidate(changes, Launched(flags, spec, present.launched.machine), config, new_weights)
    check_durable_answers(present, candidate)
    return candidate


def read_changes(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of flags that an operator gave, checked; null is a flag's default. UserError for one that cannot change."""
    changed = {}
    for given, value in values.items():
        name = given.removeprefix("--").replace("-", "_")
        option = OPTIONS.get(name)
        if option is None:
            hint = did_you_mean(f"--{name}".replace("_", "-"), OPTIONS) or ": `tpserve serve --help` lists all flags"
            raise UserError(f"there is no flag {given[:64]}{hint}", param=name[:64])
        if why := fixed_because(name, option.about.group):
            raise UserError(f"{option.flag} cannot change in a running server, it {why}: start the server anew", param=name)
        if name == "model" and value is None:
            raise UserError("model names a directory or a repository", param=name)
        changed[name] = option.default if value is None else read_value(option, value)
    return changed


def check_same_tokenizer(present: Path, new: Path) -> None:
    """UserError that names a file in which the tokenizers differ: requests are tokenized with the present one."""
    before, after = _tokenizer_files(present), _tokenizer_files(new)
    for name in sorted(before | after):
        old, found = present / name, new / name
        if name not in before or name not in after or old.read_bytes() != found.read_bytes():
            raise UserError(
                f"{found} and {old} differ, and a running server keeps its tokenizer and chat template: start the server anew, "
                f"or keep the present files with --tokenizer {present}",
                param="tokenizer",
            )


def _tokenizer_files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for pattern in _TOKENIZER_FILES for path in directory.glob(pattern)}


def _missing_weights(directory: Path) -> list[str]:
    """What a model directory lacks; empty when it has weights in one format."""
    patterns: Iterable[str] = (pattern for form in WEIGHT_FORMATS for pattern in (form.index_file, form.single, form.pattern))
    return [] if any(any(directory.glob(pattern)) for pattern in patterns) else [WEIGHT_FORMATS[0].single]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
