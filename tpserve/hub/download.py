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
from tpserve.hub.cache import Wanted
from tpserve.hub.refusal import refusal

log = logging.getLogger(__name__)

POLL_S = 0.25
NUM_CONNECTIONS = 4
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system without flock says."""

Report = Callable[[int, int], None]
"""Told how many bytes of how many are there."""


def ensure(wanted: Wanted, timeout_s: float, report: Report) -> None:
    """Have all files. UserError when they cannot be had, EngineFailure when whoever downloads them makes no progress."""
    if not wanted.missing():
        return
    with _alone(wanted, timeout_s, report):
        if missing := wanted.missing():
            check_room(wanted)
            _transfer(wanted, missing, report)


def wait(wanted: Wanted, timeout_s: float, report: Report) -> None:
    """Wait until another process has all files. EngineFailure when it makes no progress."""
    _watch(lambda: not wanted.missing(), wanted, timeout_s, report)


def _watch(done: Callable[[], bool], wanted: Wanted, timeout_s: float, report: Report) -> None:
    had, moved_s = -1, time.monotonic()
    while not done():
        have = wanted.have()
        if have != had:
            had, moved_s = have, time.monotonic()
        if time.monotonic() - moved_s > timeout_s:
            raise EngineFailure(
                f"another process has the download of {wanted.repository} into {wanted.cache} ({wanted.lock}), and nothing has "
                f"arrived for {timeout_s:g} s: end it, or raise --start-timeout"
            )
        report(have, wanted.total)
        time.sleep(POLL_S)


@contextmanager
def _alone(wanted: Wanted, timeout_s: float, report: Report) -> Iterator[None]:
    """Be the only process, on all nodes that share the cache, that downloads this repository."""
    try:
        wanted.lock.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(wanted.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(
            f"{wanted.repository} is not wholly in the cache {wanted.cache}, which cannot be written: {error.strerror}: "
            "choose another with --download-dir or HF_HOME"
        ) from error
    try:
        if not _taken(lock):
            log.info("waiting for another process that downloads %s into %s", wanted.repository, wanted.cache)
            _watch(lambda: _taken(lock), wanted, timeout_s, report)
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


def check_room(wanted: Wanted) -> None:
    """UserError when what is missing cannot fit into the cache, which exists."""
    needed, free = wanted.total - wanted.have(), shutil.disk_usage(wanted.cache).free
    if needed > free:
        raise UserError(
            f"{wanted.repository} needs {needed:,} more bytes in {wanted.cache}, where {free:,} are free: make room, "
            "or choose another directory with --download-dir or HF_HOME"
        )


def _transfer(wanted: Wanted, missing: list[str], report: Report) -> None:
    """Over a few connections at a time. The threads are daemons: a file that is still on its way keeps no process from ending."""
    todo: SimpleQueue[str] = SimpleQueue()
    ended: SimpleQueue[UserError | None] = SimpleQueue()
    for name in missing:
        todo.put(name)

    def carry() -> None:
        with suppress(Empty):
            while True:
                ended.put(_file(wanted, todo.get_nowait()))

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
        report(wanted.have(), wanted.total)


def _file(wanted: Wanted, name: str) -> UserError | None:
    """Download one file; returns what kept it from coming."""
    from huggingface_hub import hf_hub_download

    use_our_log()
    try:
        hf_hub_download(wanted.repository, name, revision=wanted.commit, cache_dir=wanted.cache)
    except Exception as error:  # of whatever carries HTTP in this version of huggingface_hub
        return refusal(error, wanted.repository, wanted.commit, wanted.cache, name)
    return None


def use_our_log() -> None:
    """No bars and no log of huggingface_hub's own: its warnings are lines of our log."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    library = logging.getLogger("huggingface_hub")
    library.handlers.clear()
    library.propagate = True
