"""MODEL, --tokenizer and --chat-template to files on this node; of a repository, the small files are fetched here.

A revision is resolved to a commit here and nowhere else; everything later (the ranks of `tpserve serve`, the weights, the check
that all nodes serve the same) uses the commit. Only files that are read are ever asked for: two files of configuration, the
tokenizer's (of one kind) and the chat templates, the indices of the weights, and later the files that the index names;
pytorch_model*.bin only where there are no safetensors.

When the hub cannot be reached or refuses, what the cache holds of the revision is used, with a warning; with HF_HUB_OFFLINE the
hub is never asked.
"""

import json
import logging
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple

from tpserve.config.schema import Flags
from tpserve.errors import UserError
from tpserve.hub import cache as caches
from tpserve.hub.cache import FileSet
from tpserve.hub.download import check_room, ensure, use_our_log
from tpserve.hub.names import check_revision, is_repository
from tpserve.hub.refusal import refusal
from tpserve.types.model_files import CHAT_TEMPLATES_DIR, TOKENIZER_FORMATS, WEIGHT_FORMATS, ModelFiles, Snapshot, WeightFormat

log = logging.getLogger(__name__)

CONFIG = ("config.json", "generation_config.json")
BESIDE_TOKENIZER = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", f"{CHAT_TEMPLATES_DIR}/*.jinja"),
)
INDICES = tuple(format.index_file for format in WEIGHT_FORMATS)
DEFAULT_REVISION = "main"
LOOK_UP_TIMEOUT_S = 20.0
_FOREIGN = ("*.bin", "*.pth", "*.pt", "*.gguf", "*.onnx")
_FOREIGN_TOKENIZERS = ("*tiktoken*", "tekken.json", "tokenizer.model*", "spiece.model", "vocab.*", "merges.txt")
_JINJA = "{}\n"
_NAME = re.compile(r"[\w-]+")
"""What may be the name of one of the tokenizer's templates."""


def locate(flags: Flags, *, head: bool) -> ModelFiles:
    """Find the model's files, fetching the small ones. `head`: this process starts the frontend, which needs the tokenizer.

    Raises UserError for what cannot be found or had, EngineFailure for a download by another process that does not move.
    """
    directory, snapshot = _model(flags, "needed" if head and _own_tokenizer(flags) else "as it is")
    if snapshot is not None:
        check_room(weights_of(snapshot))
    if not head:
        return ModelFiles(directory, directory, snapshot=snapshot)
    tokenizer = directory if _own_tokenizer(flags) else _tokenizer(flags.tokenizer or str(flags.model), flags)
    return ModelFiles(directory, tokenizer, read_template(flags.chat_template), snapshot)


def describe(flags: Flags) -> ModelFiles:
    """Find the model for one who will load nothing: of a repository configuration and index are fetched, of weights the sizes."""
    directory, snapshot = _model(flags, "not")
    return ModelFiles(directory, directory, snapshot=snapshot)


def _own_tokenizer(flags: Flags) -> bool:
    return flags.tokenizer in (None, flags.model) and flags.tokenizer_revision is None


def _model(flags: Flags, tokenizer: Literal["not", "as it is", "needed"]) -> tuple[str, Snapshot | None]:
    """The model's directory, and of a repository the snapshot, its small files fetched. `tokenizer`: whether its own, too."""
    assert flags.model is not None, "the caller fills in the built-in model"
    if is_repository(flags.model, "model"):
        found = _look_up(flags.model, flags.revision or DEFAULT_REVISION, "revision", flags)
        if CONFIG[0] not in found.files.sizes:
            raise found.without(CONFIG[0], CONFIG[0])
        its_tokenizer = () if tokenizer == "not" else _tokenizer_files(found.files.sizes)
        _have(found, (*CONFIG, *its_tokenizer, *INDICES), flags)
        only_safetensors = flags.load_format == "safetensors"
        weights = {} if flags.load_format == "dummy" else _weights(found, WEIGHT_FORMATS[: 1 if only_safetensors else None])
        if tokenizer == "needed" and not its_tokenizer:
            raise _no_tokenizer(found)
        snapshot = Snapshot(flags.model, found.files.commit, str(found.files.cache), tuple(weights.items()))
        return str(weights_of(snapshot).directory), snapshot
    if flags.revision is not None:
        raise UserError(
            f"--revision {flags.revision}, but {flags.model} is a directory: leave it out, or give a repository id",
            param="revision",
        )
    return flags.model, None


def _tokenizer(name: str, flags: Flags) -> str:
    """The directory of --tokenizer."""
    revision = flags.tokenizer_revision
    if is_repository(name, "tokenizer"):
        found = _look_up(name, revision or DEFAULT_REVISION, "tokenizer_revision", flags)
        files = _tokenizer_files(found.files.sizes)
        if not files:
            raise _no_tokenizer(found)
        _have(found, files, flags)
        return str(found.files.directory)
    if revision is not None:
        raise UserError(
            f"--tokenizer-revision {revision}, but {name} is a directory: leave it out, or give a repository id with --tokenizer",
            param="tokenizer_revision",
        )
    return name


def _tokenizer_files(names: Collection[str]) -> tuple[str, ...]:
    """Patterns of the files that make a tokenizer of those there are; nothing when they make none."""
    for vocabulary in TOKENIZER_FORMATS:
        if all(name in names for name in vocabulary):
            return (*vocabulary, *BESIDE_TOKENIZER, *(CONFIG[:1] if len(vocabulary) > 1 else ()))
    return ()


def _no_tokenizer(found: "_Found") -> UserError:
    what = ", no ".join(" with ".join(vocabulary) for vocabulary in TOKENIZER_FORMATS)
    instead = "make a tokenizer.json with transformers' AutoTokenizer.save_pretrained, or name another with --tokenizer"
    return found.without(TOKENIZER_FORMATS[0][0], what, _FOREIGN_TOKENIZERS, instead)


def weights_of(snapshot: Snapshot) -> FileSet:
    """The weights of a snapshot, to be downloaded or waited for."""
    return FileSet(snapshot.repository, snapshot.commit, Path(snapshot.cache), dict(snapshot.weights))


class _Found(NamedTuple):
    """All files of a repository; with an `error`, which kept the hub from telling, those that the cache holds."""

    files: FileSet
    revision: str
    error: Exception | None

    def without(
        self, name: str, what: str, foreign: Sequence[str] = _FOREIGN, way_out: str = "name a repository that does"
    ) -> UserError:
        """The error to raise when there is no `name`. `foreign`: patterns of what may be there instead."""
        files = self.files
        if self.error is not None:
            return refusal(self.error, files.repository, files.commit, files.cache, name)
        others = _matching(files.sizes, foreign)
        has = f" (it has {others[0]})" if others else ""
        return UserError(f"{files.repository} at {files.commit} holds no {what}{has}: {way_out}")


def _have(found: _Found, patterns: Sequence[str], flags: Flags) -> None:
    """Have those files of a repository that match."""
    files = found.files
    small = replace(files, sizes={name: files.sizes[name] for name in _matching(files.sizes, patterns)})
    ensure(small, flags.start_timeout, lambda done, total: None)
    caches.note_commit(files.cache, files.repository, found.revision, files.commit)


def _matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return sorted(name for name in names if ".." not in name and any(fnmatchcase(name, pattern) for pattern in patterns))


def _look_up(repository: str, revision: str, param: str, flags: Flags) -> _Found:
    """What `revision` is now; without the hub, what it was. `param`: the flag that gives it."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RevisionNotFoundError

    check_revision(revision, param)
    cache = Path(flags.download_dir or constants.HF_HUB_CACHE).expanduser().resolve()
    use_our_log()
    try:
        info = HfApi().model_info(repository, revision=revision, timeout=LOOK_UP_TIMEOUT_S, files_metadata=True)
    except Exception as error:  # of whatever carries HTTP in this version of huggingface_hub
        why = refusal(error, repository, revision, cache, flag="--" + param.replace("_", "-"))
        commit = caches.known_commit(cache, repository, revision)
        if commit is None or isinstance(error, RevisionNotFoundError):
            raise why from error
        if not constants.HF_HUB_OFFLINE:
            log.warning("%s; going on with commit %s in the cache", why, commit)
        return _Found(caches.present(cache, repository, commit), revision, error)
    assert info.sha is not None, "the hub names the commit of every revision"
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    return _Found(FileSet(repository, info.sha, cache, sizes), revision, None)


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


def read_template(given: str | None) -> str | None:
    """The text of --chat-template: a file's, or what was given where that is a template itself, or may be the name of one."""
    if given is None:
        return None
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # a template can be too long for a name
        if any(sign in given for sign in _JINJA) or (isinstance(error, FileNotFoundError) and _NAME.fullmatch(given)):
            return given
        raise UserError(
            f"--chat-template {given} cannot be read ({error}), and is no template itself: give a file, the template's text, or "
            "the name of one of the tokenizer's templates",
            param="chat_template",
        ) from error
