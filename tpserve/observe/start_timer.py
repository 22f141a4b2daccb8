"""How long each part of a start took: laps from the moment the agent was started, told in one line.

Owns the laps of one process. Reads the clock and /proc and nothing else.
"""

import os
import time
from pathlib import Path

LEAST_S = 0.05
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class StartTimer:
    """The first laps are over already: the agent's, until it started this process, and the interpreter's, until now."""

    def __init__(self, agent_pid: int) -> None:
        self._now_s = began_s(os.getpid())
        self._phases: list[tuple[str, float]] = []
        agent_s = began_s(agent_pid)
        if agent_s is not None and self._now_s is not None:
            self._phases.append(("agent", self._now_s - agent_s))
        self.mark("interpreter")

    def mark(self, name: str) -> None:
        """What was done since the last lap is called `name`."""
        now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        if self._now_s is not None:
            self._phases.append((name, now_s - self._now_s))
        self._now_s = now_s

    def line(self) -> str:
        """The laps that took `LEAST_S`, in order."""
        parts = ", ".join(f"{name} {took_s:.1f}" for name, took_s in self._phases if took_s >= LEAST_S)
        return f"start: {parts}, together {sum(took_s for _, took_s in self._phases):.1f} s"


def began_s(pid: int) -> float | None:
    """When a process was started, on CLOCK_BOOTTIME; None when it is not there."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19]) * _TICK_S
