"""Facts about processes on this host, straight from the kernel. Owns no thread and no socket; never signals anybody.

A pidfd names a process, not a number that may be given away again; it becomes readable when the process ends.
"""

import ctypes
import logging
import os
import resource
import signal
import threading
from pathlib import Path

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent `parent_pid` dies; end at once if it has died already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def allow_many_files() -> None:
    """Raise this process's limit of open files, and its children's, to the most that is allowed.

    The usual 1,024 are used up by as many connections, and gloo ends its process when it cannot accept one more.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def open_pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None when it has."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def live_children(pid: int) -> list[int] | None:
    """The children of a process that live (dead ones that nobody has waited for do not); None when the kernel does not tell."""
    try:
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return None
    if not lists:
        return None
    return [int(child) for text in lists for child in text.split() if _is_alive(int(child))]


def _is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def tell(text: str) -> None:
    """Log an error from a thread that must not block, even if the main thread is stuck with the lock of the log in hand."""
    teller = threading.Thread(target=log.error, args=("%s", text), daemon=True)
    teller.start()
    teller.join(0.5)


def exit_now(code: int, why: str = "") -> None:
    """End this process whatever its other threads do."""
    if why:
        tell(why)
    os._exit(code)
