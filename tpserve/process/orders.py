"""The coordinator's orders to one rank. The control thread applies them, and the main thread reads them or waits for them.

    Start   form the mesh        Drain   finish the open requests
    Run     run plans            Leave   the epoch is over: take part in the next one
                                 Stop    end, with this exit code; Reconfigure: end, and start again with other flags

Owns the state of the orders and the eventfd that signals a new one. Invariant: an order counts once. A repeated order, or one of
another epoch, changes nothing.
"""

import contextlib
import os
import threading
from collections.abc import Callable

from tpserve.errors import EngineFailure
from tpserve.types.messages import RESTART_CODE, CoordinatorMessage, Drain, Leave, Reconfigure, Run, Start, Stop


class Stopped(Exception):
    """Stop arrived while the main thread was waiting for something else."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason or "stopped")
        self.code = code
        self.reason = reason


class EpochOver(Exception):
    """Leave arrived: this rank is sound and takes part in the next epoch as a new incarnation."""


class Orders:
    """The orders of one incarnation. Start is ignored until `hello_sent`: it answers this rank's Hello."""

    def __init__(self) -> None:
        self.hello_sent = False
        self.start: Start | None = None
        self.run: Run | None = None
        self.draining = False
        self.leave: Leave | None = None
        self.stop: Stop | None = None
        self._changed = threading.Condition()
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    @property
    def epoch(self) -> int:
        """The epoch of Start; 0 before Start."""
        return self.start.epoch if self.start is not None else 0

    def apply(self, message: CoordinatorMessage) -> bool:
        """Apply an order. Returns False when it changes nothing."""
        with self._changed:
            match message:
                case Start() if self.start is None and self.hello_sent:
                    self.start = message
                case Run(epoch) if self.run is None and epoch == self.epoch:
                    self.run = message
                case Drain() if not self.draining:
                    self.draining = True
                case Leave() if self.leave is None:
                    self.leave = message
                case Stop() if self.stop is None:
                    self.stop = message
                case Reconfigure() if self.stop is None:
                    self.stop = Stop(RESTART_CODE, message.reason)
                case _:
                    return False
            self._changed.notify_all()
        os.eventfd_write(self._eventfd, 1)
        return True

    @property
    def over(self) -> bool:
        """Whether this incarnation has to end: Stop or Leave has arrived."""
        return self.stop is not None or self.leave is not None

    def raise_if_over(self) -> None:
        """Raise Stopped or EpochOver when one of them has arrived."""
        if self.stop is not None:
            raise Stopped(self.stop.code, self.stop.reason)
        if self.leave is not None:
            raise EpochOver(self.leave.reason)

    def wait(self, condition: Callable[[], bool], timeout_s: float | None, what: str) -> None:
        """Wait until `condition` holds. Raises Stopped, EpochOver, or after `timeout_s` EngineFailure that names `what`."""
        with self._changed:
            in_time = self._changed.wait_for(lambda: self.over or condition(), timeout_s)
        self.raise_if_over()
        if not in_time:
            raise EngineFailure(f"waited {timeout_s:g} s for {what}")

    def wait_over(self, timeout_s: float) -> None:
        """Wait for Stop or Leave, at most `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self.over, timeout_s)

    def fileno(self) -> int:
        """A descriptor that is readable from a new order until `clear`."""
        return self._eventfd

    def clear(self) -> None:
        """Make the descriptor unreadable until the next order."""
        drain_eventfd(self._eventfd)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._eventfd)


def drain_eventfd(eventfd: int) -> None:
    """Reset an eventfd to zero."""
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(eventfd)
