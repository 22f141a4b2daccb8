"""When a rank's control thread ends its process. Pure: times are arguments, in seconds of any monotonic clock.

Stop                    the main thread has `GRACE_S` to leave, after a failure `FAILED_GRACE_S`
Leave                   it has `BLOCKED_S`: it may be in a collective that never ends
no coordinator          `GONE_S` out of reach are the end of this rank, or of its epoch where another frontend will come
the agent is gone       the end at once
a sibling is dead       the time to report that
"""

import math
from typing import NamedTuple

from tpserve.process.orders import Orders
from tpserve.types.messages import RESTART_CODE, Leave

GRACE_S, FAILED_GRACE_S = 2.0, 0.5
"""How long the main thread may take to leave after Stop. After a failure it has nothing to finish."""
SIBLING_REPORT_S = 0.5
"""How long a rank that ends may take to report why."""
GONE_S = 5.0
"""The coordinator is gone when it is out of reach for this long. ZeroMQ reports a dead connection after 5 s of silence."""
CONNECT_S = 30.0
"""How long the first connection may take."""
BLOCKED_S = 3.0
"""How long the main thread may take to leave an epoch that is over."""
ENDED_CODE = 3
"""The exit code after Stop(1) where an agent of ours reads it: the service has failed, so nobody is started again."""
FRONTEND, AGENT = "the frontend", "the agent that started this rank"


class ExitNow(NamedTuple):
    """End the process with `code`. `why`: for the log; empty when nothing is to be said. `failed`: nobody ordered it."""

    code: int
    why: str = ""
    failed: bool = False


class ExitRules:
    """The rules of one incarnation."""

    def __init__(
        self,
        rank: int,
        address: str,
        orders: Orders,
        now: float,
        failure_code: int = 1,
        frontend_returns_s: float | None = None,
    ) -> None:
        """`address`: of the coordinator, for messages. `failure_code`: the exit code for Stop(1). `frontend_returns_s`: how long
        to wait for another frontend when this one is gone; None: end."""
        self._rank, self._address = rank, address
        self._orders = orders
        self._failure_code, self._frontend_returns_s = failure_code, frontend_returns_s
        self._over_s, self._ends_s = 0.0, math.inf
        self._away_s: float | None = now
        self._connected = False

    @property
    def stop_code(self) -> int:
        """The exit code for the Stop that has arrived; 0 before."""
        stop = self._orders.stop
        return 0 if stop is None else self._failure_code if stop.code == 1 else stop.code

    def note_over(self, now: float) -> None:
        """Stop or Leave has arrived."""
        self._over_s = now

    def note_sibling_dead(self, now: float) -> None:
        """Another rank of the node is dead, and the agent ends this one, too."""
        self._ends_s = now + SIBLING_REPORT_S

    def note_connection(self, connected: bool, now: float) -> None:
        """The connection to the coordinator has been made or lost."""
        self._away_s = None if connected else (self._away_s or now)
        self._connected = self._connected or connected

    def discount_delay(self, now: float) -> None:
        """This process was suspended: the time in which it heard nothing proves nothing."""
        if self._away_s is not None:
            self._away_s = now

    def due(self, gone: str, now: float) -> ExitNow | None:
        """What is due at `now`; None: go on. `gone`: FRONTEND or AGENT if that process has ended, else empty.

        Without a coordinator, where another one will come, the epoch of this rank is over: the rules give it Leave.
        """
        orders = self._orders
        if orders.stop is not None and now - self._over_s > (FAILED_GRACE_S if orders.stop.code else GRACE_S):
            return ExitNow(self.stop_code)
        if now >= self._ends_s:
            return ExitNow(1)
        if orders.stop is not None:
            return None
        if gone and (gone != FRONTEND or self._frontend_returns_s is None):
            return ExitNow(1, f"rank {self._rank} ends: {gone} is gone", failed=True)
        away_s = 0.0 if self._away_s is None else now - self._away_s
        out_of_reach = ExitNow(1, f"rank {self._rank} ends: the coordinator at {self._address} cannot be reached")
        if gone or (away_s > GONE_S and self._connected):
            if self._frontend_returns_s is None:
                return out_of_reach
            if orders.apply(Leave(orders.epoch, f"{gone or 'the coordinator'} cannot be reached")):
                self._over_s = now
        elif away_s > (CONNECT_S if self._frontend_returns_s is None else self._frontend_returns_s):
            return out_of_reach
        if orders.leave is not None and now - self._over_s > BLOCKED_S:
            return ExitNow(RESTART_CODE, f"rank {self._rank} is stuck in an epoch that is over: it starts again")
        return None
