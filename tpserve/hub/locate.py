"""Find the files of MODEL, --tokenizer and --chat-template on this node. Downloads the small files of a repository.

Owns the choice of files and of the commit. A revision becomes a commit here and nowhere else; the ranks, the weights and the
check that all nodes serve the same model use the commit. Only files that are read are downloaded: two configuration files, the
tokenizer's files (of one kind) and chat templates, the weights' indices, and later the weight files that an index names.
pytorch_model*.bin is used only without safetensors.

When the hub is out of reach or refuses, the cached files of the revision are used, with a warning. With HF_HUB_OFFLINE the hub is
never contacted. Never downloads weights.
"""

import json
import logging
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple

from msgspec import structs

from tpserve.config.flags import Flags
from tpserve.errors import UserError
from tpserve.hub import cache as caches
from tpserve.hub.cache import FileSet
from tpserve.hub.download import check_disk_space, download, redirect_hub_log
from tpserve.hub.errors import to_user_error
from tpserve.hub.names import check_revision, is_repository
from tpserve.types.model_files import CHAT_TEMPLATES_DIR, TOKENIZER_FORMATS, WEIGHT_FORMATS, ModelFiles, Snapshot, WeightFormat

log = logging.getLogger(__name__)

CONFIG = ("config.json", "generation_config.json")
TOKENIZER_EXTRAS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", f"{CHAT_TEMPLATES_DIR}/*.jinja"),
)
INDICES = tuple(format.index_file for format in WEIGHT_FORMATS)
DEFAULT_REVISION = "main"
LOOK_UP_TIMEOUT_S = 20.0
_OTHER_WEIGHTS = ("*.bin", "*.pth", "*.pt", "*.gguf", "*.onnx")
_OTHER_TOKENIZERS = ("*tiktoken*", "tekken.json", "tokenizer.model*", "spiece.model", "vocab.*", "merges.txt")
_TEMPLATE_CHARS = "{}\n"
_NAME = re.compile(r"[\w-]+")
"""A possible name of one of the tokenizer's templates."""


def locate(flags: Flags, *, head: bool) -> ModelFiles:
    """Find the model's files and download the small ones. `head`: this process starts the frontend, which needs
    the model's own tokenizer and the chat template; ranks compile grammars with a tokenizer that is named.

    Raises UserError for files that cannot be found or downloaded, EngineFailure when another process stalls in the download.
    """
    directory, snapshot = _model(flags, "required" if head and _own_tokenizer(flags) else "optional")
    if snapshot is not None:
        check_disk_space(weights_of(snapshot))
    tokenizer = directory if _own_tokenizer(flags) else _tokenizer(flags.tokenizer or str(flags.model), flags)  # also of grammars
    return ModelFiles(directory, tokenizer, read_template(flags.chat_template) if head else None, snapshot)


def locate_tokenizer(flags: Flags) -> ModelFiles:
    """Find the tokenizer's files alone, for a caller that loads no weights. `directory` is theirs, too."""
    assert flags.model is not None, "the caller fills in the built-in model"
    own = _own_tokenizer(flags)
    revision = flags.revision if own else flags.tokenizer_revision
    directory = _tokenizer(flags.tokenizer or flags.model, structs.replace(flags, tokenizer_revision=revision))
    return ModelFiles(directory, directory, read_template(flags.chat_template))


def describe(flags: Flags) -> ModelFiles:
    """Find the model for a caller that loads no weights. Downloads configuration and index, and looks up the weights' sizes."""
    directory, snapshot = _model(flags, "none")
    return ModelFiles(directory, directory, snapshot=snapshot)


def _own_tokenizer(flags: Flags) -> bool:
    """Whether the tokenizer is the model's own."""
    return flags.tokenizer in (None, flags.model) and flags.tokenizer_revision is None


def _model(flags: Flags, tokenizer: Literal["none", "optional", "required"]) -> tuple[str, Snapshot | None]:
    """The model's directory, and the snapshot of a repository. `tokenizer`: whether to download the model's own tokenizer."""
    assert flags.model is not None, "the caller fills in the built-in model"
    if is_repository(flags.model, "model"):
        found = _look_up(flags.model, flags.revision or DEFAULT_REVISION, "revision", flags)
        if CONFIG[0] not in found.files.sizes:
            raise found.missing_error(CONFIG[0], CONFIG[0])
        its_tokenizer = () if tokenizer == "none" else _tokenizer_files(found.files.sizes)
        _download(found, (*CONFIG, *its_tokenizer, *INDICES), flags)
        only_safetensors = flags.load_format == "safetensors"
        weights = {} if flags.load_format == "dummy" else _weights(found, WEIGHT_FORMATS[: 1 if only_safetensors else None])
        if tokenizer == "required" and not its_tokenizer:
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
    """The directory of --tokenizer, whose files are downloaded."""
    revision = flags.tokenizer_revision
    if is_repository(name, "tokenizer"):
        found = _look_up(name, revision or DEFAULT_REVISION, "tokenizer_revision", flags)
        files = _tokenizer_files(found.files.sizes)
        if not files:
            raise _no_tokenizer(found)
        _download(found, files, flags)
        return str(found.files.directory)
    if revision is not None:
        raise UserError(
            f"--tokenizer-revision {revision}, but {name} is a directory: leave it out, or give a repository id with --tokenizer",
            param="tokenizer_revision",
        )
    return name


def _tokenizer_files(names: Collection[str]) -> tuple[str, ...]:
    """Patterns of the tokenizer's files among `names`; empty when there is no tokenizer."""
    for vocabulary in TOKENIZER_FORMATS:
        if all(name in names for name in vocabulary):
            return (*vocabulary, *TOKENIZER_EXTRAS, *(CONFIG[:1] if len(vocabulary) > 1 else ()))
    return ()


def _no_tokenizer(found: "_RepositoryFiles") -> UserError:
    """The error for a repository without a tokenizer."""
    what = ", no ".join(" with ".join(vocabulary) for vocabulary in TOKENIZER_FORMATS)
    instead = "make a tokenizer.json with transformers' AutoTokenizer.save_pretrained, or name another with --tokenizer"
    return found.missing_error(TOKENIZER_FORMATS[0][0], what, _OTHER_TOKENIZERS, instead)


def weights_of(snapshot: Snapshot) -> FileSet:
    """The weight files of a snapshot, for `download` or `wait_for_download`."""
    return FileSet(snapshot.repository, snapshot.commit, Path(snapshot.cache), dict(snapshot.weights))


class _RepositoryFiles(NamedTuple):
    """The files of a repository: all of them, or, when the hub failed with `error`, the cached ones."""

    files: FileSet
    revision: str
    error: Exception | None

    def missing_error(
        self, name: str, what: str, others: Sequence[str] = _OTHER_WEIGHTS, way_out: str = "name a repository that does"
    ) -> UserError:
        """The error for a missing file `name`. `others`: patterns of unsupported files that the repository may have instead."""
        files = self.files
        if self.error is not None:
            return to_user_error(self.error, files.repository, files.commit, files.cache, name)
        unsupported = _matching(files.sizes, others)
        has = f" (it has {unsupported[0]})" if unsupported else ""
        return UserError(f"{files.repository} at {files.commit} holds no {what}{has}: {way_out}")


def _download(found: _RepositoryFiles, patterns: Sequence[str], flags: Flags) -> None:
    """Download the files of a repository that match `patterns`, and store its commit."""
    files = found.files
    small = replace(files, sizes={name: files.sizes[name] for name in _matching(files.sizes, patterns)})
    download(small, flags.start_timeout, lambda done, total: None)
    caches.write_ref(files.cache, files.repository, found.revision, files.commit)


def _matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that match a pattern, sorted. A name with ".." never matches."""
    return sorted(name for name in names if ".." not in name and any(fnmatchcase(name, pattern) for pattern in patterns))


def _look_up(repository: str, revision: str, param: str, flags: Flags) -> _RepositoryFiles:
    """Resolve `revision` to a commit and its files, from the hub or else from the cache. `param`: the flag that gives it."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RevisionNotFoundError

    check_revision(revision, param)
    cache = Path(flags.download_dir or constants.HF_HUB_CACHE).expanduser().resolve()
    redirect_hub_log()
    try:
        info = HfApi().model_info(repository, revision=revision, timeout=LOOK_UP_TIMEOUT_S, files_metadata=True)
    except Exception as error:  # of the HTTP library of this version of huggingface_hub
        why = to_user_error(error, repository, revision, cache, flag="--" + param.replace("_", "-"))
        commit = caches.cached_commit(cache, repository, revision)
        if commit is None or isinstance(error, RevisionNotFoundError):
            raise why from error
        if not constants.HF_HUB_OFFLINE:
            log.warning("%s; going on with commit %s in the cache", why, commit)
        return _RepositoryFiles(caches.cached_files(cache, repository, commit), revision, error)
    assert info.sha is not None, "the hub names the commit of every revision"
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    return _RepositoryFiles(FileSet(repository, info.sha, cache, sizes), revision, None)


def _weights(found: _RepositoryFiles, formats: Sequence[WeightFormat]) -> dict[str, int]:
    """The weight files, name to bytes, in the first format found: those of the index, else the single file, else all matches."""
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
        raise found.missing_error(missing[0] if missing else formats[0].single, missing[0] if missing else what)
    return {name: files.sizes[name] for name in names}


def _indexed(index: Path) -> list[str]:
    """The file names in an index of weights."""
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index} is not an index of weight files: remove it, and it is downloaded again") from None
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index} names {outside[0]!r}, which is no file of this repository's first level: this cannot be served")
    return names


def read_template(value: str | None) -> str | None:
    """The text of --chat-template: of a file, or `value` itself when it is a template, or may be the name of one."""
    if value is None:
        return None
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # OSError: a template is too long for a file name
        if any(sign in value for sign in _TEMPLATE_CHARS) or (isinstance(error, FileNotFoundError) and _NAME.fullmatch(value)):
            return value
        raise UserError(
            f"--chat-template {value} cannot be read ({error}), and is no template itself: give a file, the template's text, or "
            "the name of one of the tokenizer's templates",
            param="chat_template",
        ) from error
