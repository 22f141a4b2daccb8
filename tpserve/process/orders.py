"""What the coordinator has ordered. The control thread takes orders in, the main thread reads them and waits for them.

    Start   form the mesh        Drain   finish the open requests
    Run     run plans            Stop    leave, with this exit code

An order counts once; what repeats it, or belongs to another epoch, changes nothing.
"""

import contextlib
import os
import threading
from collections.abc import Callable

from tpserve.errors import EngineFailure
from tpserve.types.messages import CoordinatorMessage, Drain, Run, Start, Stop


class Stopped(Exception):
    """The coordinator said Stop while the main thread waited for something else."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason or "stopped")
        self.code = code
        self.reason = reason


class Orders:
    """See the module docstring. `start` counts only once `expected`: this rank has said Hello."""

    def __init__(self) -> None:
        self.expected = False
        self.start: Start | None = None
        self.run: Run | None = None
        self.draining = False
        self.stop: Stop | None = None
        self._changed = threading.Condition()
        self._news = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    @property
    def epoch(self) -> int:
        """The epoch of Start; 0 before."""
        return self.start.epoch if self.start is not None else 0

    def take(self, message: CoordinatorMessage) -> bool:
        """Note an order; False when it changes nothing."""
        with self._changed:
            match message:
                case Start() if self.start is None and self.expected:
                    self.start = message
                case Run(epoch) if self.run is None and epoch == self.epoch:
                    self.run = message
                case Drain() if not self.draining:
                    self.draining = True
                case Stop() if self.stop is None:
                    self.stop = message
                case _:
                    return False
            self._changed.notify_all()
        os.eventfd_write(self._news, 1)
        return True

    def wait(self, condition: Callable[[], bool], timeout_s: float | None, what: str) -> None:
        """Wait until `condition` holds. Raises Stopped, or EngineFailure when the time is over. `what` completes "waited for"."""
        with self._changed:
            in_time = self._changed.wait_for(lambda: self.stop is not None or condition(), timeout_s)
        if self.stop is not None:
            raise Stopped(self.stop.code, self.stop.reason)
        if not in_time:
            raise EngineFailure(f"waited {timeout_s:g} s for {what}")

    def wait_stop(self, timeout_s: float) -> Stop | None:
        """Stop, if it comes in time."""
        with self._changed:
            self._changed.wait_for(lambda: self.stop is not None, timeout_s)
        return self.stop

    def fileno(self) -> int:
        """A descriptor that is readable while there is an order that `clear` has not taken note of."""
        return self._news

    def clear(self) -> None:
        """The main thread has looked at the orders."""
        empty(self._news)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._news)


def empty(eventfd: int) -> None:
    """Take note of what an eventfd tells; nothing if it tells nothing."""
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(eventfd)
