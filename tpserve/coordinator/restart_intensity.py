"""How many faults a service may have before it ends: Erlang's restart intensity, over faults that have a cause of their own."""

from collections import deque

from tpserve.coordinator.actions import Cause
from tpserve.types.messages import RESTART_CODE

MAX_FAULTS, FAULTS_S = 10, 300.0
"""So many faults in so many seconds, without a token in between, end the service. A rank that was killed from outside (SIGKILL,
SIGTERM) has no cause of its own and does not count."""
_OUTSIDE = ("SIGKILL", "SIGTERM", f"exit code {RESTART_CODE}")
"""How a process ends that an operator has ended, or the kernel for lack of memory, or that asked to be started again: it has
reported its own error, or was stuck after that of another rank."""
_CAUSES: tuple[Cause, ...] = ("outside", "unclear", "error")
"""From the least to the worst."""


class RestartIntensity:
    """The faults of late, and `worst`, the worst cause of one since the last epoch that ran."""

    def __init__(self) -> None:
        self.worst: Cause = "outside"
        self._faults: deque[float] = deque()

    def note_fault(self, cause: Cause, now: float) -> str:
        """Count a fault, unless it came from outside. Returns how many there were when they are too many, else ""."""
        if cause == "outside":
            return ""
        self.worst = max(self.worst, cause, key=_CAUSES.index)
        self._faults.append(now)
        while now - self._faults[0] > FAULTS_S:
            self._faults.popleft()
        return f"{len(self._faults)} faults within {FAULTS_S:g} s" if len(self._faults) > MAX_FAULTS else ""

    def note_token(self) -> None:
        """The engine works: earlier faults do not count any more."""
        if self._faults:
            self._faults.clear()

    def take_worst(self) -> Cause:
        """The worst cause, forgotten: an epoch runs."""
        worst, self.worst = self.worst, "outside"
        return worst


def cause_of_exit(last_exit: str) -> Cause:
    """What the end of a process says about its cause. `last_exit`: as in Hello, "" for none."""
    if not last_exit or last_exit.endswith(_OUTSIDE):
        return "outside"
    return "error" if "exit code" in last_exit else "unclear"
