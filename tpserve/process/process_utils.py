"""Facts about processes on this host, read from the kernel. Owns no socket. Kills only stopped processes, and its own.

A pidfd names a process, not a number that the kernel may reuse. It becomes readable when the process ends.
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

STOPPED_S, CHECK_S = 4.5, 0.5
"""A process that is stopped (SIGSTOP, Ctrl-Z) for `STOPPED_S` is killed, because every other process notices its end.
Longer than the coordinator's heartbeat timeout, whose error has more detail."""
_PR_SET_PDEATHSIG = 1


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent `parent_pid` dies; end at once if it has died already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def allow_many_files() -> None:
    """Raise the limit of open files of this process and its children to the hard limit.

    The usual 1,024 allow as many connections, and gloo aborts the process when it cannot accept one.
    """
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))


def open_pidfd(pid: int) -> int | None:
    """Open a descriptor that becomes readable when the process ends. None when it has ended."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def has_ended(pidfd: int) -> bool:
    """Whether the process of a pidfd has ended."""
    poll = select.poll()  # select() fails for descriptors above 1023
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def live_children(pid: int) -> list[int] | None:
    """The live children of a process, without zombies. None when the kernel does not list them."""
    try:
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return None
    if not lists:
        return None
    return [int(child) for text in lists for child in text.split() if _is_alive(int(child))]


def reap_children() -> dict[int, int]:
    """Wait for all children that have ended, adopted ones included: pid -> exit code, negative for a signal, as of `Popen`."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = os.waitstatus_to_exitcode(found[1])
    return ended


def end_all_children() -> None:
    """Kill all descendants and wait for them. This process must adopt orphans, so the loop ends when none is left."""
    while True:
        with contextlib.suppress(ProcessLookupError):
            for pid in _all_children():
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _all_children() -> list[int]:
    me, found = str(os.getpid()), []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[1] == me and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def exit_text(code: int) -> str:
    """How a process ended, for its exit code as of `Popen`: "was killed by SIGKILL", "ended with exit code 1"."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def kill_stopped_in_background(find: Callable[[], Mapping[int, str]], report: Callable[[int, str], None]) -> None:
    """Start a thread that kills processes that are stopped for `STOPPED_S`.

    `find` returns the processes to check, pid to name. `report` gets each pid and a sentence about it before the kill. The thread
    counts its own checks instead of time, so that a process that was stopped together with this one is not killed.
    """
    threading.Thread(target=_kill_stopped_loop, args=(find, report), name="stopped processes", daemon=True).start()


def kill_stopped(pids: Iterable[int]) -> None:
    """Kill the processes that are stopped now."""
    for pid in pids:
        if _state(pid) == "T":
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _kill_stopped_loop(find: Callable[[], Mapping[int, str]], report: Callable[[int, str], None]) -> None:
    checks: dict[int, int] = {}
    while True:
        time.sleep(CHECK_S)
        found = find()
        checks = {pid: checks.get(pid, 0) + 1 for pid in found if _state(pid) == "T"}
        for pid in [pid for pid, count in checks.items() if count * CHECK_S >= STOPPED_S]:
            report(pid, f"{found[pid]} (pid {pid}) has been stopped for {STOPPED_S:g} s")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _is_alive(pid: int) -> bool:
    return _state(pid) not in ("", "Z", "X")


def _state(pid: int) -> str:
    """The state letter in /proc/PID/stat; empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def log_error_from_thread(text: str) -> None:
    """Log an error without blocking, even when a stuck main thread holds the lock of the log."""
    logger = threading.Thread(target=log.error, args=("%s", text), daemon=True)
    logger.start()
    logger.join(0.5)


def exit_now(code: int, why: str = "") -> NoReturn:
    """End this process at once, whatever its other threads do. `why` is logged as an error."""
    if why:
        log_error_from_thread(why)
    os._exit(code)
