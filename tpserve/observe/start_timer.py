"""How long each phase of a start took, from the start of the agent on, in one line. Reads the clock and /proc."""

import os
import time
from pathlib import Path

LEAST_S = 0.05
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class StartTimer:
    """The phases of one process. The first two are over: the agent, until it started this process, and the interpreter."""

    def __init__(self, agent_pid: int) -> None:
        self.first = True
        """Whether this is the start of the process, and not a later recovery in it."""
        self._now_s = start_time_s(os.getpid())
        self._phases: list[tuple[str, float]] = []
        agent_s = start_time_s(agent_pid)
        if agent_s is not None and self._now_s is not None:
            self._phases.append(("agent", self._now_s - agent_s))
        self.mark("interpreter")

    def mark(self, name: str) -> None:
        """End a phase: the time since the last mark is called `name`."""
        now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        if self._now_s is not None:
            self._phases.append((name, now_s - self._now_s))
        self._now_s = now_s

    def restart(self) -> None:
        """The phases of a recovery follow."""
        self.first, self._phases = False, []
        self._now_s = time.clock_gettime(time.CLOCK_BOOTTIME)

    def line(self) -> str:
        """The phases of at least `LEAST_S` in order, and the total of all."""
        parts = [f"{name} {took_s:.1f}" for name, took_s in self._phases if took_s >= LEAST_S]
        parts.append(f"together {sum(took_s for _, took_s in self._phases):.1f} s")
        return f"{'start' if self.first else 'recovery'}: {', '.join(parts)}"


def start_time_s(pid: int) -> float | None:
    """The start time of a process on CLOCK_BOOTTIME, in seconds; None without such a process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19]) * _TICK_S
