"""MODEL, --tokenizer and --chat-template to files on this node; of a repository, the small files are fetched here.

A revision is resolved to a commit here and nowhere else; everything later (the ranks of `tpserve serve`, the weights, the check
that all nodes serve the same) uses the commit. Only files that are read are ever asked for: two files of configuration, the
tokenizer's, the indices of the weights, and later the files that the index names; pytorch_model*.bin only where there are no
safetensors.

When the hub cannot be reached or refuses, what the cache holds of the revision is used, with a warning; with HF_HUB_OFFLINE the
hub is never asked.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from tpserve.config.schema import Flags
from tpserve.errors import UserError
from tpserve.hub import cache as caches
from tpserve.hub.cache import Wanted
from tpserve.hub.download import check_room, ensure, use_our_log
from tpserve.hub.names import check_revision, is_repository
from tpserve.hub.refusal import refusal
from tpserve.types.model_files import WEIGHT_FORMATS, ModelFiles, Snapshot, WeightFormat

log = logging.getLogger(__name__)

CONFIG = ("config.json", "generation_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")
INDICES = tuple(format.index_file for format in WEIGHT_FORMATS)
DEFAULT_REVISION = "main"
LOOK_UP_TIMEOUT_S = 20.0
_FOREIGN = (".bin", ".pth", ".pt", ".gguf", ".onnx")
_JINJA = "{}\n"


def locate(flags: Flags, *, head: bool) -> ModelFiles:
    """Find the model's files, fetching the small ones. `head`: this process starts the frontend, which needs the tokenizer.

    Raises UserError for what cannot be found or had, EngineFailure for a download by another process that does not move.
    """
    assert flags.model is not None, "the caller fills in the built-in model"
    snapshot = None
    directory = flags.model
    if is_repository(flags.model, "model"):
        snapshot = _snapshot(flags.model, flags)
        directory = str(weights_of(snapshot).directory)
    elif flags.revision is not None:
        raise UserError(
            f"--revision {flags.revision}, but {flags.model} is a directory: leave it out, or give a repository id",
            param="revision",
        )
    if not head:
        return ModelFiles(directory, directory, snapshot=snapshot)
    tokenizer = directory if flags.tokenizer in (None, flags.model) else _tokenizer(str(flags.tokenizer), flags)
    return ModelFiles(directory, tokenizer, _template(flags.chat_template), snapshot)


def _snapshot(repository: str, flags: Flags) -> Snapshot:
    """The model's repository, with its small files fetched and room for its weights."""
    found = _fetch(repository, flags.revision or DEFAULT_REVISION, (*CONFIG, *TOKENIZER, *INDICES), flags)
    only_safetensors = flags.load_format == "safetensors"
    weights = {} if flags.load_format == "dummy" else _weights(found, WEIGHT_FORMATS[: 1 if only_safetensors else None])
    snapshot = Snapshot(repository, found.files.commit, str(found.files.cache), tuple(weights.items()))
    check_room(weights_of(snapshot))
    return snapshot


def _tokenizer(name: str, flags: Flags) -> str:
    """The directory of --tokenizer."""
    if is_repository(name, "tokenizer"):
        return str(_fetch(name, DEFAULT_REVISION, TOKENIZER, flags).files.directory)
    return name


def weights_of(snapshot: Snapshot) -> Wanted:
    """The weights of a snapshot, to be downloaded or waited for."""
    return Wanted(snapshot.repository, snapshot.commit, Path(snapshot.cache), dict(snapshot.weights))


class _Found(NamedTuple):
    """All files of a repository; with an `error`, which kept the hub from telling, those that the cache holds."""

    files: Wanted
    error: Exception | None

    def without(self, name: str, what: str) -> UserError:
        """The error to raise when there is no `name`."""
        files = self.files
        if self.error is not None:
            return refusal(self.error, files.repository, files.commit, files.cache, name)
        foreign = sorted(name for name in files.sizes if name.endswith(_FOREIGN))
        instead = f" (it has {foreign[0]})" if foreign else ""
        return UserError(f"{files.repository} at {files.commit} holds no {what}{instead}: name a repository that does")


def _fetch(repository: str, revision: str, names: tuple[str, ...], flags: Flags) -> _Found:
    """Have those of `names` that the repository has; the first it must have."""
    from huggingface_hub import constants

    check_revision(revision)
    cache = Path(flags.download_dir or constants.HF_HUB_CACHE).expanduser().resolve()
    found = _look_up(repository, revision, cache)
    files = found.files
    if names[0] not in files.sizes:
        raise found.without(names[0], names[0])
    small = replace(files, sizes={name: files.sizes[name] for name in names if name in files.sizes})
    ensure(small, flags.start_timeout, lambda done, total: None)
    caches.note_commit(cache, repository, revision, files.commit)
    return found


def _look_up(repository: str, revision: str, cache: Path) -> _Found:
    """What `revision` is now; without the hub, what it was."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RevisionNotFoundError

    use_our_log()
    try:
        info = HfApi().model_info(repository, revision=revision, timeout=LOOK_UP_TIMEOUT_S, files_metadata=True)
    except Exception as error:  # of whatever carries HTTP in this version of huggingface_hub
        why = refusal(error, repository, revision, cache)
        commit = caches.known_commit(cache, repository, revision)
        if commit is None or isinstance(error, RevisionNotFoundError):
            raise why from error
        if not constants.HF_HUB_OFFLINE:
            log.warning("%s; going on with commit %s in the cache", why, commit)
        return _Found(caches.present(cache, repository, commit), error)
    assert info.sha is not None, "the hub names the commit of every revision"
    return _Found(Wanted(repository, info.sha, cache, {file.rfilename: file.size or 0 for file in info.siblings or ()}), None)


def _weights(found: _Found, formats: Sequence[WeightFormat]) -> dict[str, int]:
    """The files that make up the model, of the first format there is: those of the index, else the usual one, else all."""
    files, names = found.files, list[str]()
    for format in formats:
        if format.index_file in files.sizes:
            names = _indexed(files.directory / format.index_file)
        elif format.single in files.sizes:
            names = [format.single]
        else:
            names = sorted(name for name in files.sizes if "/" not in name and fnmatchcase(name, format.pattern))
        if names:
            break
    missing = [name for name in names if name not in files.sizes]
    if missing or not names:
        what = "safetensors files" if len(formats) == 1 else "safetensors files and no pytorch_model.bin"
        raise found.without(missing[0] if missing else formats[0].single, missing[0] if missing else what)
    return {name: files.sizes[name] for name in names}


def _indexed(index: Path) -> list[str]:
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index} is not an index of weight files: remove it, and it is downloaded again") from None
    if foreign := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index} names {foreign[0]!r}, which is no file of this repository's first level: this cannot be served")
    return names


def _template(given: str | None) -> str | None:
    """The text of --chat-template: a file's, or what was given where that is a template itself."""
    if given is None:
        return None
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # a template can be too long for a name
        if any(sign in given for sign in _JINJA):
            return given
        raise UserError(
            f"--chat-template {given} cannot be read ({error}), and is no template itself: give a file, or the template's text",
            param="chat_template",
        ) from error
