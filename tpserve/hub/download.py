"""Download files of a repository in one process, while other processes wait.

    download            `tpserve serve` and local rank 0: take the repository's lock in the cache and download the missing files
    wait_for_download   the other ranks of the node: wait until the files are cached

Owns the lock and the progress. huggingface_hub owns the transfer and resumes broken connections. The lock is a kernel lock on a
file in the cache: it works between nodes that share a cache, and ends with its process.

Invariants: a file is in the snapshot only once it is complete, so a process that finds all files needs no lock and no network. A
waiting process gives up when no byte has arrived for `timeout_s`, and has no limit on the whole download.
"""

import errno
import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue

from tpserve.errors import EngineFailure, UserError
from tpserve.hub.cache import FileSet
from tpserve.hub.errors import to_user_error

log = logging.getLogger(__name__)

POLL_S = 0.25
NUM_CONNECTIONS = 4
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""The errors of a file system without flock."""

ReportProgress = Callable[[int, int], None]
"""Called with the cached bytes and the total bytes."""


def download(file_set: FileSet, timeout_s: float, report: ReportProgress) -> None:
    """Download the missing files. Raises UserError for a failed download, EngineFailure when another process stalls in it."""
    if not file_set.missing():
        return
    with _repository_lock(file_set, timeout_s, report):
        if missing := file_set.missing():
            check_disk_space(file_set)
            _transfer(file_set, missing, report)


def wait_for_download(file_set: FileSet, timeout_s: float, report: ReportProgress) -> None:
    """Wait until another process has downloaded all files. Raises EngineFailure when it stalls."""
    _wait_until(lambda: not file_set.missing(), file_set, timeout_s, report)


def _wait_until(done: Callable[[], bool], file_set: FileSet, timeout_s: float, report: ReportProgress) -> None:
    """Wait until `done`, and report progress. Raises EngineFailure when no byte has arrived for `timeout_s`."""
    last_bytes, progress_s = -1, time.monotonic()
    while not done():
        cached = file_set.cached_bytes()
        if cached != last_bytes:
            last_bytes, progress_s = cached, time.monotonic()
        if time.monotonic() - progress_s > timeout_s:
            raise EngineFailure(
                f"another process has the download of {file_set.repository} into {file_set.cache} ({file_set.lock}), and nothing "
                f"has arrived for {timeout_s:g} s: end it, or raise --start-timeout"
            )
        report(cached, file_set.total_bytes)
        time.sleep(POLL_S)


@contextmanager
def _repository_lock(file_set: FileSet, timeout_s: float, report: ReportProgress) -> Iterator[None]:
    """Lock the repository against other processes, on all nodes that share the cache."""
    try:
        file_set.lock.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(file_set.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(
            f"{file_set.repository} is not wholly in the cache {file_set.cache}, which cannot be written: {error.strerror}: "
            "choose another with --download-dir or HF_HOME"
        ) from error
    try:
        if not _try_lock(lock):
            log.info("waiting for another process that downloads %s into %s", file_set.repository, file_set.cache)
            _wait_until(lambda: _try_lock(lock), file_set, timeout_s, report)
        os.utime(lock)
        yield
    finally:
        os.close(lock)


def _try_lock(lock: int) -> bool:
    """Take the lock without blocking. True also on a file system without locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("the cache has no locks (%s): nodes that share it may download the same file twice", error.strerror)
    return True


def check_disk_space(file_set: FileSet) -> None:
    """Raise UserError when the missing files do not fit into the cache, which must exist."""
    needed, free = file_set.total_bytes - file_set.cached_bytes(), shutil.disk_usage(file_set.cache).free
    if needed > free:
        raise UserError(
            f"{file_set.repository} needs {needed:,} more bytes in {file_set.cache}, where {free:,} are free: make room, "
            "or choose another directory with --download-dir or HF_HOME"
        )


def _transfer(file_set: FileSet, missing: list[str], report: ReportProgress) -> None:
    """Download files over `NUM_CONNECTIONS` connections. The threads are daemons, so they do not delay the end of the process."""
    todo: SimpleQueue[str] = SimpleQueue()
    done: SimpleQueue[UserError | None] = SimpleQueue()
    for name in missing:
        todo.put(name)

    def work() -> None:
        with suppress(Empty):
            while True:
                done.put(_download_file(file_set, todo.get_nowait()))

    for _ in missing[:NUM_CONNECTIONS]:
        threading.Thread(target=work, name="download", daemon=True).start()
    left = len(missing)
    while left:
        with suppress(Empty):
            error = done.get(timeout=POLL_S)
            if error is not None:
                todo = SimpleQueue()  # start no further file
                raise error
            left -= 1
        report(file_set.cached_bytes(), file_set.total_bytes)


def _download_file(file_set: FileSet, name: str) -> UserError | None:
    """Download one file. Returns the error when it fails."""
    from huggingface_hub import hf_hub_download

    redirect_hub_log()
    try:
        hf_hub_download(file_set.repository, name, revision=file_set.commit, cache_dir=file_set.cache)
    except Exception as error:  # of the HTTP library of this version of huggingface_hub
        return to_user_error(error, file_set.repository, file_set.commit, file_set.cache, name)
    return None


def redirect_hub_log() -> None:
    """Turn off huggingface_hub's progress bars and pass its warnings to our log."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    library = logging.getLogger("huggingface_hub")
    library.handlers.clear()
    library.propagate = True
