"""Facts about processes on this host, straight from the kernel. Owns no socket, and signals only who was stopped.

A pidfd names a process, not a number that may be given away again; it becomes readable when the process ends.
"""

import contextlib
import ctypes
import logging
import os
import resource
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NoReturn

log = logging.getLogger(__name__)

STOPPED_S, LOOK_S = 4.5, 0.5
"""Who was stopped for so long (SIGSTOP, Ctrl-Z) is ended: nobody can wait for it, and only its end is noticed by everybody.
Longer than the coordinator waits for a heartbeat, whose reason says more."""
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


def has_ended(pidfd: int) -> bool:
    """Whether the process of a pidfd has."""
    poll = select.poll()  # select() knows no descriptor above 1023
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def live_children(pid: int) -> list[int] | None:
    """The children of a process that live (dead ones that nobody has waited for do not); None when the kernel does not tell."""
    try:
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return None
    if not lists:
        return None
    return [int(child) for text in lists for child in text.split() if _is_alive(int(child))]


def kill_stopped_in_background(find: Callable[[], Mapping[int, str]], tell: Callable[[int, str], None]) -> None:
    """Start a thread that kills whoever of the processes in `find` (with what they are called) was stopped for `STOPPED_S`;
    `log_error_from_thread` hears of each before, with a sentence about it.

    It counts its own looks and not the time: what was stopped and went on together with this process is not to be blamed.
    """
    threading.Thread(target=_kill_stopped_loop, args=(find, tell), name="stopped neighbours", daemon=True).start()


def kill_stopped(pids: Iterable[int]) -> None:
    """Kill those of them that are stopped now."""
    for pid in pids:
        if _state(pid) == "T":
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _kill_stopped_loop(find: Callable[[], Mapping[int, str]], tell: Callable[[int, str], None]) -> None:
    looks: dict[int, int] = {}
    while True:
        time.sleep(LOOK_S)
        found = find()
        looks = {pid: looks.get(pid, 0) + 1 for pid in found if _state(pid) == "T"}
        for pid in [pid for pid, count in looks.items() if count * LOOK_S >= STOPPED_S]:
            tell(pid, f"{found[pid]} (pid {pid}) has been stopped for {STOPPED_S:g} s")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _is_alive(pid: int) -> bool:
    return _state(pid) not in ("", "Z", "X")


def _state(pid: int) -> str:
    """The kernel's letter for it; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def log_error_from_thread(text: str) -> None:
    """Log an error from a thread that must not block, even if the main thread is stuck with the lock of the log in hand."""
    teller = threading.Thread(target=log.error, args=("%s", text), daemon=True)
    teller.start()
    teller.join(0.5)


def exit_now(code: int, why: str = "") -> NoReturn:
    """End this process whatever its other threads do."""
    if why:
        log_error_from_thread(why)
    os._exit(code)
