"""How long the event loop of a server in this process stands still.

A gap is the time between two turns of the loop, as far as this process had the processor: the least of wall time and CPU time of
all its threads. On a shared machine, time in which nobody here ran is no fault of the server's. Others also take caches
and memory bandwidth, so a gap counts when it comes at each of three tries; what a request costs by itself it costs every time.
"""

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from tests.http.inprocess import Server

MAX_GAP_S = 0.1
TRIES = 3
T = TypeVar("T")


class Gaps:
    """The longest time between two turns of a loop."""

    def __init__(self) -> None:
        self.worst_s = 0.0
        self.stopped = False

    async def watch(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        while not self.stopped:
            await asyncio.sleep(0.001)
            now, used = time.perf_counter(), time.process_time()
            self.worst_s = max(self.worst_s, min(now - wall, used - cpu))
            wall, cpu = now, used


def without_gap(server: Server, work: Callable[[], T], limit_s: float = MAX_GAP_S) -> T:
    """What `work` gives, while the server's loop turns. AssertionError when it stood still each time."""
    worst_s = []
    for _ in range(TRIES):
        gaps = Gaps()
        watch = asyncio.run_coroutine_threadsafe(gaps.watch(), server.loop)
        try:
            result = work()
        finally:
            gaps.stopped = True
            watch.result(60)
        if gaps.worst_s < limit_s:
            return result
        worst_s.append(gaps.worst_s)
    raise AssertionError(f"the loop stood still for {min(worst_s):.3f} s at least")
