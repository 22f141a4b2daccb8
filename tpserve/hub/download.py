"""Files of a repository, downloaded by one process while the others wait.

    ensure   `tpserve serve` and the first rank of a node: takes the repository's lock in the cache, downloads what is missing
    wait     the other ranks of the node: until the files are there

Owns the lock, the order of processes and the count of bytes; huggingface_hub owns the transfer, which takes a broken connection
up again. The lock is the kernel's and lies in the cache, so that it holds between the nodes that share one, and ends with its
holder. A file is in the snapshot only once it is whole, so that whoever finds all files needs neither lock nor network.
Somebody who waits gives up when nothing has arrived for `timeout_s`, however long the whole may take.
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
from tpserve.hub.refusal import refusal

log = logging.getLogger(__name__)

POLL_S = 0.25
NUM_CONNECTIONS = 4
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system without flock says."""

ReportProgress = Callable[[int, int], None]
"""Told how many bytes of how many are there."""


def ensure(file_set: FileSet, timeout_s: float, report: ReportProgress) -> None:
    """Have all files. UserError when they cannot be had, EngineFailure when whoever downloads them makes no progress."""
    if not file_set.missing():
        return
    with _alone(file_set, timeout_s, report):
        if missing := file_set.missing():
            check_room(file_set)
            _transfer(file_set, missing, report)


def wait(file_set: FileSet, timeout_s: float, report: ReportProgress) -> None:
    """Wait until another process has all files. EngineFailure when it makes no progress."""
    _watch(lambda: not file_set.missing(), file_set, timeout_s, report)


def _watch(done: Callable[[], bool], file_set: FileSet, timeout_s: float, report: ReportProgress) -> None:
    had, moved_s = -1, time.monotonic()
    while not done():
        have = file_set.have()
        if have != had:
            had, moved_s = have, time.monotonic()
        if time.monotonic() - moved_s > timeout_s:
            raise EngineFailure(
                f"another process has the download of {file_set.repository} into {file_set.cache} ({file_set.lock}), and nothing "
                f"has arrived for {timeout_s:g} s: end it, or raise --start-timeout"
            )
        report(have, file_set.total)
        time.sleep(POLL_S)


@contextmanager
def _alone(file_set: FileSet, timeout_s: float, report: ReportProgress) -> Iterator[None]:
    """Be the only process, on all nodes that share the cache, that downloads this repository."""
    try:
        file_set.lock.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(file_set.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(
            f"{file_set.repository} is not wholly in the cache {file_set.cache}, which cannot be written: {error.strerror}: "
            "choose another with --download-dir or HF_HOME"
        ) from error
    try:
        if not _taken(lock):
            log.info("waiting for another process that downloads %s into %s", file_set.repository, file_set.cache)
            _watch(lambda: _taken(lock), file_set, timeout_s, report)
        os.utime(lock)
        yield
    finally:
        os.close(lock)


def _taken(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("the cache has no locks (%s): nodes that share it may download the same file twice", error.strerror)
    return True


def check_room(file_set: FileSet) -> None:
    """UserError when what is missing cannot fit into the cache, which exists."""
    needed, free = file_set.total - file_set.have(), shutil.disk_usage(file_set.cache).free
    if needed > free:
        raise UserError(
            f"{file_set.repository} needs {needed:,} more bytes in {file_set.cache}, where {free:,} are free: make room, "
            "or choose another directory with --download-dir or HF_HOME"
        )


def _transfer(file_set: FileSet, missing: list[str], report: ReportProgress) -> None:
    """Over a few connections at a time. The threads are daemons: a file that is still on its way keeps no process from ending."""
    todo: SimpleQueue[str] = SimpleQueue()
    ended: SimpleQueue[UserError | None] = SimpleQueue()
    for name in missing:
        todo.put(name)

    def carry() -> None:
        with suppress(Empty):
            while True:
                ended.put(_file(file_set, todo.get_nowait()))

    for _ in missing[:NUM_CONNECTIONS]:
        threading.Thread(target=carry, name="download", daemon=True).start()
    left = len(missing)
    while left:
        with suppress(Empty):
            failed = ended.get(timeout=POLL_S)
            if failed is not None:
                todo = SimpleQueue()  # no further file is begun
                raise failed
            left -= 1
        report(file_set.have(), file_set.total)


def _file(file_set: FileSet, name: str) -> UserError | None:
    """Download one file; returns what kept it from coming."""
    from huggingface_hub import hf_hub_download

    use_our_log()
    try:
        hf_hub_download(file_set.repository, name, revision=file_set.commit, cache_dir=file_set.cache)
    except Exception as error:  # of whatever carries HTTP in this version of huggingface_hub
        return refusal(error, file_set.repository, file_set.commit, file_set.cache, name)
    return None


def use_our_log() -> None:
    """No bars and no log of huggingface_hub's own: its warnings are lines of our log."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    library = logging.getLogger("huggingface_hub")
    library.handlers.clear()
    library.propagate = True
