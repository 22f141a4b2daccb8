"""Ranks as forks of the test process: torch is imported once for all of them."""

import os
import signal
import traceback
from collections.abc import Callable

import torch


def run(world_size: int, rank_main: Callable[[int], None], timeout_s: float = 30.0) -> list[int]:
    """Run `rank_main(rank)` in a process each; returns their exit codes (0, 1 for an exception, negative for a signal)."""
    pids = [_fork(rank, rank_main, timeout_s) for rank in range(world_size)]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _fork(rank: int, rank_main: Callable[[int], None], timeout_s: float) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)  # a hang is a death by SIGALRM
        torch.set_num_threads(1)
        rank_main(rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
