"""The hub's cache on this node: which files of a repository at one commit are cached, and the progress of the others.

    CACHE/models--ORG--NAME/
        refs/REVISION           the commit of a branch or tag at its last look-up
        snapshots/COMMIT/FILE   exists once the file is complete, and never changes
        blobs/*.incomplete      downloads in progress
    CACHE/.locks/models--ORG--NAME/tpserve.lock     locked (flock) by the one downloading process; touched at its start

The layout is huggingface_hub's and shared with other programs. This module never downloads, and writes only refs.
"""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileSet:
    """Some files of a repository at one commit. `sizes`: name to bytes."""

    repository: str
    commit: str
    cache: Path
    sizes: Mapping[str, int]

    @property
    def directory(self) -> Path:
        """The snapshot directory, which looks like a model directory."""
        return _folder(self.cache, self.repository) / "snapshots" / self.commit

    @property
    def lock(self) -> Path:
        """The lock file of the repository."""
        return self.cache / ".locks" / _name(self.repository) / "tpserve.lock"

    @property
    def total_bytes(self) -> int:
        """The size of all files."""
        return sum(self.sizes.values())

    def missing(self) -> list[str]:
        """Names of the files that are not cached, or not complete."""
        return missing_files(self.directory, self.sizes)

    def cached_bytes(self) -> int:
        """Bytes that are cached, with those of files that are being downloaded."""
        missing = set(self.missing())
        complete = sum(size for name, size in self.sizes.items() if name not in missing)
        return min(self.total_bytes, complete + self._partial_bytes()) if missing else self.total_bytes

    def _partial_bytes(self) -> int:
        """Bytes of partial files written since the lock was taken. Older files are remains of a killed process."""
        try:
            began_s = self.lock.stat().st_mtime
        except OSError:
            return 0
        written = 0
        for part in (_folder(self.cache, self.repository) / "blobs").glob("*.incomplete"):
            with suppress(FileNotFoundError):
                facts = part.stat()
                written += facts.st_blocks * 512 if facts.st_mtime >= began_s else 0  # the file size may be reserved in advance
        return written


def missing_files(directory: Path, names: Iterable[str]) -> list[str]:
    """The ones of `names` that are not files in the directory."""
    return [name for name in names if not (directory / name).is_file()]


def cached_files(cache: Path, repository: str, commit: str) -> FileSet:
    """All cached files of the commit."""
    directory = FileSet(repository, commit, cache, {}).directory
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return FileSet(repository, commit, cache, {str(path.relative_to(directory)): path.stat().st_size for path in files})


def cached_commit(cache: Path, repository: str, revision: str) -> str | None:
    """The commit of `revision` at its last look-up. `revision` itself when it is a cached commit, else None."""
    folder = _folder(cache, repository)
    with suppress(OSError):
        return (folder / "refs" / revision).read_text().strip()
    return revision if (folder / "snapshots" / revision).is_dir() else None


def write_ref(cache: Path, repository: str, revision: str, commit: str) -> None:
    """Write the ref of `revision`, for starts without a network. Errors are ignored: the cache may be read-only."""
    if revision == commit or cached_commit(cache, repository, revision) == commit:
        return
    ref = _folder(cache, repository) / "refs" / revision
    draft = ref.with_name(f"{ref.name}.{os.getpid()}")
    with suppress(OSError):
        ref.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(commit)
        draft.rename(ref)


def _folder(cache: Path, repository: str) -> Path:
    """The repository's folder."""
    return cache / _name(repository)


def _name(repository: str) -> str:
    return "models--" + repository.replace("/", "--")
