"""What a rank tells the coordinator with every heartbeat: that it lives, how far it is, and what has not been answered yet.

    Hello until Start, Ready until Run, Drain until Drain, Fault until Stop; a Heartbeat always

The main thread writes the fields, the control thread makes messages of them. Each field is one reference: no lock is needed.
"""

from typing import Literal

from tpserve.process.orders import Orders
from tpserve.types.messages import Drain, Fault, Heartbeat, Hello, RankMessage, Ready

FAULT_CHARS = 2000
"""So much of an error reaches a client."""


class HeartbeatState:
    """What one rank reports, for one incarnation."""

    def __init__(self, rank: int, orders: Orders) -> None:
        self.rank = rank
        self._orders = orders
        self.hello: Hello | None = None
        self.ready: Ready | None = None
        self.fault: Fault | None = None
        self.asked_to_end = False
        """A signal has come: the coordinator shall drain."""
        self.phase, self.percent, self.step = "", 0, -1
        self.busy = ""
        """What long work the main thread does inside a step, such as compiling a kernel."""
        self.due: tuple[int, float] | None = None
        """The oldest plan in flight and when (monotonic) it is overdue."""

    def fail(self, kind: Literal["user", "engine", "sibling"], text: str) -> None:
        """Report why going on is pointless. The first reason counts."""
        self.fault = self.fault or Fault(self.rank, self._orders.epoch, kind, sendable(text))

    def forgive(self, until_s: float) -> None:
        """This process was held up: nothing is overdue before `until_s`."""
        if self.due is not None:
            self.due = (self.due[0], max(self.due[1], until_s))

    def messages(self, now: float) -> list[RankMessage]:
        """All that is to be told at `now` (monotonic)."""
        orders, told = self._orders, list[RankMessage]()
        if self.hello is not None and orders.start is None:
            told.append(self.hello)
        if self.ready is not None and orders.run is None:
            told.append(self.ready)
        if self.asked_to_end and self.fault is None and not orders.draining:
            told.append(Drain(self.rank))
        due = self.due
        if self.fault is not None:
            told.append(self.fault)
        elif due is not None and now >= due[1]:  # no fault of this rank's: it is over once the step comes back
            told.append(Fault(self.rank, orders.epoch, "overdue", f"step {due[0]} does not come back: a rank hangs"))
        return [*told, Heartbeat(self.rank, orders.epoch, self.phase, self.percent, self.step, self.busy)]


def sendable(text: str) -> str:
    """Text that a frame can hold: cut to `FAULT_CHARS`, and without the bytes in it that are no text (of a file's name)."""
    return text[:FAULT_CHARS].encode(errors="replace").decode()
