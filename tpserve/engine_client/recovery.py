"""The coordinator and the request table as one state machine: what an epoch means for the open requests. Sans-I/O.

    event                        the engine                             the open requests
    EpochReady                   rank 0's new incarnation is the engine  are sent to it as `Quarantine` orders
    EpochLost                    there is none                           wait
    EpochFailed, EpochFinished   -                                       fail with the reason
    outputs                      -                                       grow; a token forgives earlier faults

Each method takes an event and returns what its owner has to carry out, in order. Never touches a socket or a clock. Called from
one event loop, and every other writer of the coordinator and of the table is on the same one.

Invariant: an engine gets requests only after its epoch is ready, and each of them at most once.
"""

from collections import deque
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from tpserve.coordinator.actions import Action, Cause, EpochFailed, EpochFinished, EpochLost, EpochReady
from tpserve.coordinator.coordinator import Coordinator
from tpserve.engine_client.requests import RequestTable
from tpserve.engine_client.server_info import INVARIANT, numerics
from tpserve.engine_client.status import FaultRecord
from tpserve.types.messages import EngineInput, EngineOutput

SHUTTING_DOWN = "the server is shutting down"
MAX_FAULTS = 20


Resumption = Literal["exact", "seamless, not identical"]
EXACT: Resumption = "exact"
SEAMLESS: Resumption = "seamless, not identical"


class Attach(Struct, frozen=True):
    """Rank 0's incarnation `identity` is the engine from now on; nothing that another one sends counts."""

    identity: int


class Detach(Struct, frozen=True):
    """There is no engine: what is sent meanwhile is dropped, and what the last one has still sent does not count."""


class SendInputs(Struct, frozen=True):
    """Send `inputs` to the engine."""

    inputs: list[EngineInput]


class Recovered(Struct, frozen=True):
    """`epoch` runs after a fault, or after a reload that was `planned`, `took_s` seconds later."""

    epoch: int
    took_s: float
    planned: bool = False


EngineAction = Attach | Detach | SendInputs | Recovered


class Recovery:
    """See the module."""

    def __init__(self, coordinator: Coordinator, request_table: RequestTable) -> None:
        self._coordinator = coordinator
        self._request_table = request_table
        self._lost_s: float | None = None
        """When the last epoch ended by a fault; None while one runs."""
        self._numerics: list[object] = []
        """What the ranks of the first epoch, or of the first after a reload, computed with."""
        self._planned = False
        """Whether a reload has ended the last epoch."""
        self.resumption: Resumption | None = None
        """How an answer that a fault interrupts goes on; None before the first epoch runs."""
        self.last_resumption: Resumption | None = None
        """How those went on that were open when the last epoch began."""
        self.faults: deque[FaultRecord] = deque(maxlen=MAX_FAULTS)
        """The last faults, oldest first."""
        request_table.suspend()  # requests of an earlier frontend may come before the first engine

    def on_action(self, action: Action, now: float) -> list[EngineAction]:
        """The coordinator has decided `action`."""
        table = self._request_table
        match action:
            case EpochReady():
                self._note_numerics()
                recovered = self._recovered(action, now)
                return [Attach(self._coordinator.hellos[0].identity), *recovered, *self._resubmit(action.cause)]
            case EpochLost(epoch, reason, planned):
                if self._lost_s is None:
                    self._lost_s, self._planned = now, planned
                    if not planned:
                        self.faults.append(FaultRecord(epoch, reason, now))
                table.suspend()
                return [Detach()]
            case EpochFailed(_, reason, _):
                table.fail_all(reason, 500)
            case EpochFinished():
                table.fail_all(self._coordinator.reason or SHUTTING_DOWN, 503)
        return []

    def on_outputs(self, outputs: Sequence[EngineOutput]) -> list[EngineAction]:
        """The engine has sent one frame."""
        if self._request_table.receive(outputs):
            self._coordinator.note_token()
        return []

    def poll(self, now: float) -> list[Action]:
        """What no event reports: a drain is over when no request is open."""
        return self._coordinator.drained(now) if self._request_table.num_open == 0 else []

    def _note_numerics(self) -> None:
        """An answer goes on exactly where a row's bits do not depend on its company, on the processors with which it began.

        After a reload to other weights that holds for answers that begin from now on.
        """
        ranks = self._coordinator.ranks
        now = [(rank.hello and (rank.hello.processor, rank.hello.answers), rank.ready and rank.ready.numerics) for rank in ranks]
        other_weights = self._planned and self._numerics != now
        if other_weights:
            self._request_table.note_other_weights()
        if other_weights or not self._numerics:
            self._numerics = list(now)
        exact = numerics(ranks) == INVARIANT and self._numerics == now
        self.resumption = EXACT if exact else SEAMLESS
        self.last_resumption = SEAMLESS if other_weights else self.resumption

    def _recovered(self, ready: EpochReady, now: float) -> list[EngineAction]:
        if self._lost_s is None:
            return []
        took_s, self._lost_s = now - self._lost_s, None
        planned, self._planned = self._planned, False
        if not planned:
            self.faults[-1].took_s = took_s
            self._request_table.metrics.recovered(ready.cause, took_s)
        return [Recovered(ready.epoch, took_s, planned)]

    def _resubmit(self, cause: Cause) -> list[EngineAction]:
        """A new engine knows nothing."""
        inputs = self._request_table.resubmission(cause)
        return [SendInputs(inputs)] if inputs else []
