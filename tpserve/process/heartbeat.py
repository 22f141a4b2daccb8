"""The state that a rank sends with every heartbeat. Unanswered messages are repeated.

    Hello until Start, Ready until Run, Drain until Drain, Fault until Leave or Stop; a Heartbeat always

Owns the state and the messages made of it. Never touches a socket. The main thread writes the fields and the control thread reads
them; each field is one reference, so no lock is needed.
"""

from typing import Literal

from tpserve.process.orders import Orders
from tpserve.types.messages import Drain, Fault, Heartbeat, Hello, RankMessage, Ready

FAULT_CHARS = 2000
"""The longest error text that is sent, in characters."""


class HeartbeatState:
    """The state of one incarnation of a rank."""

    def __init__(self, rank: int, orders: Orders) -> None:
        self.rank = rank
        self._orders = orders
        self.hello: Hello | None = None
        self.ready: Ready | None = None
        self.fault: Fault | None = None
        self.drain_requested = False
        """A signal has arrived and the coordinator should drain."""
        self.phase, self.percent, self.step = "", 0, -1
        self.busy = ""
        """Long work inside a step, such as compiling a kernel; empty when there is none."""
        self.due: tuple[int, float] | None = None
        """The oldest plan in flight and its deadline (monotonic seconds); step -1: none, and the loop's own deadline."""

    def fail(self, kind: Literal["user", "engine", "peer", "sibling"], text: str) -> None:
        """Report an error that this rank cannot recover from. The first one counts."""
        self.fault = self.fault or Fault(self.rank, self._orders.epoch, kind, truncate_error(text))

    def extend_deadline(self, until_s: float) -> None:
        """Move the deadline of the plan in flight to `until_s` or later, because this process was suspended."""
        if self.due is not None:
            self.due = (self.due[0], max(self.due[1], until_s))

    def messages(self, now: float) -> list[RankMessage]:
        """The messages to send at `now` (monotonic seconds)."""
        orders, messages = self._orders, list[RankMessage]()
        if self.hello is not None and orders.start is None:
            messages.append(self.hello)
        if self.ready is not None and orders.run is None:
            messages.append(self.ready)
        if self.drain_requested and self.fault is None and not orders.draining:
            messages.append(Drain(self.rank))
        due = self.due
        if self.fault is not None and orders.leave is None:
            messages.append(self.fault)
        elif due is not None and now >= due[1] and not orders.over:  # not a fault of this rank; it clears when the step finishes
            what = f"step {due[0]} does not come back: a rank hangs" if due[0] >= 0 else "its loop does not come back: it hangs"
            messages.append(Fault(self.rank, orders.epoch, "overdue", what))
        return [*messages, Heartbeat(self.rank, orders.epoch, self.phase, self.percent, self.step, self.busy)]


def truncate_error(text: str) -> str:
    """`text` cut to `FAULT_CHARS`, with undecodable bytes, such as those of a file name, replaced."""
    return text[:FAULT_CHARS].encode(errors="replace").decode()
