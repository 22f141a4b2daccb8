"""The hub's cache on this node: which files of a repository at one commit are there, and how far the others have come.

    CACHE/models--ORG--NAME/
        refs/REVISION           the commit a branch or tag stood for when it was last looked up
        snapshots/COMMIT/FILE   there once the file is whole, and never changed again
        blobs/*.incomplete      what is being downloaded
    CACHE/.locks/models--ORG--NAME/tpserve.lock     held (flock) by the one process that downloads; touched when it began

The layout is huggingface_hub's, shared with every other program that uses it. Reads and never downloads.
"""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileSet:
    """Some files of a repository at one commit. `sizes`: their names and bytes."""

    repository: str
    commit: str
    cache: Path
    sizes: Mapping[str, int]

    @property
    def directory(self) -> Path:
        """Where they stand side by side, as in a model directory."""
        return _folder(self.cache, self.repository) / "snapshots" / self.commit

    @property
    def lock(self) -> Path:
        return self.cache / ".locks" / _name(self.repository) / "tpserve.lock"

    @property
    def total(self) -> int:
        return sum(self.sizes.values())

    def missing(self) -> list[str]:
        """Those that are not there, or not whole yet."""
        return absent(self.directory, self.sizes)

    def have(self) -> int:
        """Bytes that are there, of files still on their way included."""
        missing = set(self.missing())
        whole = sum(size for name, size in self.sizes.items() if name not in missing)
        return min(self.total, whole + self._growing()) if missing else self.total

    def _growing(self) -> int:
        """Bytes of partial files written since the lock was taken; older ones are what a killed process left."""
        try:
            began_s = self.lock.stat().st_mtime
        except OSError:
            return 0
        grown = 0
        for part in (_folder(self.cache, self.repository) / "blobs").glob("*.incomplete"):
            with suppress(FileNotFoundError):
                facts = part.stat()
                grown += facts.st_blocks * 512 if facts.st_mtime >= began_s else 0  # a size may be reserved ahead
        return grown


def absent(directory: Path, names: Iterable[str]) -> list[str]:
    """Names of files that the directory lacks."""
    return [name for name in names if not (directory / name).is_file()]


def present(cache: Path, repository: str, commit: str) -> FileSet:
    """All files of the commit that the cache holds."""
    directory = FileSet(repository, commit, cache, {}).directory
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return FileSet(repository, commit, cache, {str(path.relative_to(directory)): path.stat().st_size for path in files})


def known_commit(cache: Path, repository: str, revision: str) -> str | None:
    """The commit `revision` was when it was last looked up; the revision itself when that commit is in the cache."""
    folder = _folder(cache, repository)
    with suppress(OSError):
        return (folder / "refs" / revision).read_text().strip()
    return revision if (folder / "snapshots" / revision).is_dir() else None


def note_commit(cache: Path, repository: str, revision: str, commit: str) -> None:
    """Remember what `revision` was, for starts without a network. A cache that cannot be written is left as it is."""
    if revision == commit or known_commit(cache, repository, revision) == commit:
        return
    ref = _folder(cache, repository) / "refs" / revision
    draft = ref.with_name(f"{ref.name}.{os.getpid()}")
    with suppress(OSError):
        ref.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(commit)
        draft.rename(ref)


def _folder(cache: Path, repository: str) -> Path:
    return cache / _name(repository)


def _name(repository: str) -> str:
    return "models--" + repository.replace("/", "--")
