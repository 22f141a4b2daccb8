"""The owner of the epoch: which ranks take part, whether plans may flow, and why it ended. Sans-I/O, with a single writer.

Theory of operation. Each event is a method call that takes `now` (seconds of any monotonic clock) and returns the actions to
carry out, in order. Nothing is awaited, opened or read here. The table `_NEXT` has every transition:

    FORMING   some ranks have not said Hello           -> STARTING   once all have: epoch + 1, Start to all
    STARTING  ranks form the mesh and load             -> RUN        once all are Ready: Run to all, Ready
    RUN       plans flow                               -> DRAINING   on Drain from the frontend or from a rank that got a signal
    DRAINING  open requests finish                     -> STOPPED    once the request table is empty: Stop(0) to all, Finished
    STOPPED   the last state; every later message of a rank is answered with Stop

A fault in any state leads to STOPPED: Stop(code) to all, Failed. With `survive`, a fault of the engine leads to FORMING.

Invariants
- A process of a rank, or one attempt of it, is an *incarnation*. The roster numbers them in the order of arrival. Only the
  highest number of a rank counts; a lower one gets Stop.
- An incarnation takes part in at most one epoch: Start of epoch e + 1 needs, for every rank, an incarnation that was not part of
  e. So every rank has left an epoch before the next one runs.
- Every message may be lost, repeated or late. Ranks repeat Hello until Start, Ready until Run, Drain until Drain, and each gets
  an answer every time. A message of another epoch or of an older incarnation changes nothing.
- The first failure is the reason. Its consequences (lost connections, more faults) do not replace it.
- An overdue step is no fault while a rank reports that it compiles, for as long as a start may take.
"""

from collections.abc import Callable
from enum import Enum
from typing import Literal

from msgspec import Struct

from tpserve.coordinator.config_check import mismatch
from tpserve.coordinator.roster import Peer, RankInfo, Roster
from tpserve.observe.table import of_ranks
from tpserve.types.messages import (
    CoordinatorMessage,
    Drain,
    ExpertLoad,
    Fault,
    Heartbeat,
    Hello,
    LogLines,
    RankMessage,
    Ready,
    Run,
    Start,
    Stop,
)

LOST_S = 4.0
"""A rank without a message for this long while serving is lost; it sends a heartbeat every 0.5 s."""
LOST_STARTING_S = 30.0
"""The same while starting, where a long call into a library may delay heartbeats. A death is still noticed at once."""
BLOCKED_S = 1.0
"""A coordinator that was itself blocked for this long cannot tell which ranks were silent, and resets all timers."""
REJOIN_S = 5.0
"""With `survive`: a rank that has not left a failed epoch after this long is blocked in it and gets Stop."""


class SendMessage(Struct, frozen=True):
    """Deliver `message` to `peer`. Delivery may fail silently, since ranks repeat what needs an answer."""

    peer: Peer
    message: CoordinatorMessage


class EpochReady(Struct, frozen=True):
    """Plans of `epoch` may flow."""

    epoch: int


class Draining(Struct, frozen=True):
    """The service takes no new requests and lets the open ones finish."""


class RankLost(Struct, frozen=True):
    """This incarnation is silent and no longer counts: kill its process if it runs on this host."""

    peer: Peer


class EpochFailed(Struct, frozen=True):
    """A fault ended the service: open requests get `reason`, and the process exits with `code` (1 engine, 2 user).

    `advice` is what an operator can do.
    """

    code: int
    reason: str
    advice: str = ""


class EpochFinished(Struct, frozen=True):
    """The service ended on request: exit code 0."""


Action = SendMessage | EpochReady | Draining | RankLost | EpochFailed | EpochFinished | ExpertLoad | LogLines


class EpochState(Enum):
    """See the table in the module docstring."""

    FORMING = "forming"
    STARTING = "starting"
    RUN = "run"
    DRAINING = "draining"
    STOPPED = "stopped"


EpochEvent = Literal["all_joined", "all_ready", "drain", "drained", "fault", "fatal"]

_NEXT: dict[tuple[EpochState, EpochEvent], EpochState] = {
    (EpochState.FORMING, "all_joined"): EpochState.STARTING,
    (EpochState.FORMING, "drain"): EpochState.STOPPED,
    (EpochState.STARTING, "all_ready"): EpochState.RUN,
    (EpochState.STARTING, "drain"): EpochState.STOPPED,
    (EpochState.RUN, "drain"): EpochState.DRAINING,
    (EpochState.DRAINING, "drained"): EpochState.STOPPED,
    **{(state, "fault"): EpochState.STOPPED for state in EpochState},
    **{(state, "fatal"): EpochState.STOPPED for state in EpochState},
}
_NEXT_SURVIVING = _NEXT | {
    (state, "fault"): EpochState.FORMING for state in (EpochState.FORMING, EpochState.STARTING, EpochState.RUN)
}


_SILENT_ADVICE = "it hangs or was stopped, or its node or the link to it is down: look at that node's log, `dmesg` and network"
_FAULT_ADVICE = "--log-level debug shows where"
_SIBLING_ADVICE = "look at the last lines of its node's log"


class Coordinator:
    """See the module docstring. Call `tick` several times a second."""

    def __init__(
        self, world_size: int, now: float, *, survive: bool = False, form_timeout_s: float = 600.0, drain_timeout_s: float = 25.0
    ) -> None:
        """`form_timeout_s` bounds FORMING, counted from the last progress of any rank (a rank may be downloading weights).

        `drain_timeout_s` bounds DRAINING (torchrun kills its ranks 30 s after a SIGTERM). `survive`: a fault of the engine leads
        back to FORMING instead of STOPPED.
        """
        self.state = EpochState.FORMING
        self.epoch = 0
        self.reason = self.advice = ""
        self.code = 0
        self._next = _NEXT_SURVIVING if survive else _NEXT
        self._roster = Roster(world_size)
        self._form_timeout_s = form_timeout_s
        self._drain_timeout_s = drain_timeout_s
        self._entered_s = self._progress_s = now
        self._ticked_s = now
        self._handlers: dict[type, Callable[..., list[Action]]] = {
            Hello: self._on_hello,
            Ready: self._on_ready,
            Heartbeat: self._on_heartbeat,
            ExpertLoad: lambda peer, message, now: [message],  # for operators only; it decides nothing
            LogLines: self._on_log_lines,
            Fault: self._on_fault,
            Drain: self._on_drain,
        }

    # What the frontend shows

    @property
    def phase(self) -> str:
        """What the start waits for, in a few words: the missing ranks while FORMING, the slowest rank's phase while STARTING."""
        if self.state is EpochState.FORMING:
            return self._roster.forming_phase()
        if self.state is EpochState.STARTING:
            return self._roster.slowest(forming=False).phase or "starting"
        return {EpochState.RUN: "ready", EpochState.DRAINING: "draining"}.get(self.state, "stopped")

    @property
    def survives_faults(self) -> bool:
        """Whether the service continues after a fault of the engine."""
        return self._next is _NEXT_SURVIVING

    @property
    def percent(self) -> int:
        """The progress of the slowest rank's start, 0 to 100."""
        if self.state in (EpochState.FORMING, EpochState.STARTING):
            return self._roster.slowest(forming=self.state is EpochState.FORMING).percent
        return 100 if self.state in (EpochState.RUN, EpochState.DRAINING) else 0

    @property
    def facts(self) -> dict[str, int]:
        """Facts of the loaded model, from rank 0's Ready; empty before."""
        ready = self._roster[0].ready
        return dict(ready.facts) if ready else {}

    @property
    def ranks(self) -> list[RankInfo]:
        """Every rank as it is known now, in rank order."""
        return self._roster.ranks

    @property
    def hellos(self) -> list[Hello]:
        """The Hello of every rank that takes part, in rank order."""
        return self._roster.hellos

    def is_current(self, peer: Peer) -> bool:
        """Whether `peer` is the newest incarnation of its rank."""
        return self._roster.is_current(peer)

    # Events

    def receive(self, peer: Peer, message: RankMessage, now: float) -> list[Action]:
        """A message has arrived from `peer`."""
        roster = self._roster
        if not roster.in_world(peer):
            return [SendMessage(peer, Stop(2, f"rank {peer.rank} is outside the world size of {len(roster)}"))]
        actions: list[Action] = []
        if roster.is_new(peer):
            if roster[peer.rank].hello is not None:
                actions = self._fail_epoch(1, f"{roster.describe(peer.rank)} is gone: a new process has taken its place", now)
            roster.register(peer)
        elif not roster.is_current(peer):
            return [SendMessage(peer, Stop(1, f"a newer process has taken the place of rank {peer.rank}"))]
        roster[peer.rank].last_message_s = now
        if self.state is EpochState.STOPPED:
            return [*actions, SendMessage(peer, Stop(self.code, self.reason))]
        return actions + self._handlers[type(message)](peer, message, now)

    def lost(self, peer: Peer, how: str, now: float, advice: str = "", unexplained: str = "") -> list[Action]:
        """The process of an incarnation has ended, or its connection has. `how` completes "rank 1 on host (pid 7) ...".

        The reason ends with the error that the rank has just logged, or with `unexplained` where there is none.
        """
        if not self._roster.is_current(peer) or self.state is EpochState.STOPPED:
            return []
        rank = self._roster[peer.rank]
        if rank.hello is None:
            return []
        error = self._roster.recent_error(peer.rank, now)
        why = f"after the error: {error}" if error else unexplained
        rank.over = True
        actions = self._fail_epoch(1, " ".join(filter(None, (self._roster.describe(peer.rank), how, why))), now, advice)
        rank.hello = None
        return actions

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        blocked, self._ticked_s = now - self._ticked_s > BLOCKED_S, now
        if blocked:
            self._roster.reset_timers(now)
        if self.state is EpochState.STOPPED:
            return []
        limit_s = LOST_S if self.state in (EpochState.RUN, EpochState.DRAINING) else LOST_STARTING_S
        for i, rank in enumerate(self._roster):
            if rank.hello is not None and now - rank.last_message_s > limit_s:
                silent = self._roster.peer(i)
                return [RankLost(silent), *self.lost(silent, f"has been silent for {limit_s:g} s", now, _SILENT_ADVICE)]
        elapsed_s = now - self._entered_s
        if self.state is EpochState.FORMING:
            return self._tick_forming(elapsed_s, now)
        if self.state is EpochState.DRAINING and elapsed_s > self._drain_timeout_s:
            self.reason = f"requests were still open after a drain of {self._drain_timeout_s:g} s"
            return self._enter_state("drained", now)
        return []

    def drain(self, now: float) -> list[Action]:
        """Let open requests finish, then end the service."""
        return self._enter_state("drain", now) if (self.state, "drain") in self._next else []

    def drained(self, now: float) -> list[Action]:
        """No request is open. Has no effect unless the service drains."""
        return self._enter_state("drained", now) if self.state is EpochState.DRAINING else []

    def fail(self, code: int, reason: str, now: float, advice: str = "") -> list[Action]:
        """Something outside the ranks ends the service at once: the agent has ended, or a second signal came."""
        return self._end("fatal", code, reason, now, advice)

    # One handler for each message type. The peer is the current incarnation of its rank; the state is not STOPPED

    def _on_hello(self, peer: Peer, message: Hello, now: float) -> list[Action]:
        rank = self._roster[peer.rank]
        if rank.over:
            return []
        if self.state is not EpochState.FORMING:
            return [self._start(peer)] if rank.hello is not None and rank.ready is None else []
        if rank.hello is not None:
            return []
        why = mismatch(self.hellos, message)
        rank.hello = message
        if why:
            return self._end("fatal", 2, why, now)
        return [] if self._roster.missing else self._enter_state("all_joined", now)

    def _on_ready(self, peer: Peer, message: Ready, now: float) -> list[Action]:
        rank = self._roster[peer.rank]
        if message.epoch != self.epoch or rank.hello is None:
            return []
        if self.state is EpochState.STARTING:
            rank.ready = message
            return self._enter_state("all_ready", now) if all(r.ready for r in self._roster) else []
        return [SendMessage(peer, Run(self.epoch))] if self.state in (EpochState.RUN, EpochState.DRAINING) else []

    def _on_heartbeat(self, peer: Peer, message: Heartbeat, now: float) -> list[Action]:
        progressed = self._roster.record_heartbeat(peer.rank, message, now)
        if self.state is EpochState.FORMING and progressed:
            self._progress_s = now
        return []

    def _on_log_lines(self, peer: Peer, message: LogLines, now: float) -> list[Action]:
        self._roster.record_error(peer.rank, message.last_error, now)
        return [message]

    def _on_fault(self, peer: Peer, message: Fault, now: float) -> list[Action]:
        rank = self._roster[peer.rank]
        if message.kind == "user":
            return self._end("fatal", 2, message.text, now)
        if rank.over or (message.kind == "overdue" and self._roster.is_compiling(now, self._form_timeout_s)):
            return []
        rank.over = True
        advice = _SIBLING_ADVICE if message.kind == "sibling" else _FAULT_ADVICE
        actions = self._fail_epoch(1, f"{self._roster.describe(peer.rank)}: {message.text}", now, advice)
        rank.hello = None
        return actions

    def _on_drain(self, peer: Peer, message: Drain, now: float) -> list[Action]:
        if self.state is EpochState.DRAINING:
            return [SendMessage(peer, Drain())]
        return self.drain(now)

    # Transitions

    def _enter_state(self, event: EpochEvent, now: float) -> list[Action]:
        """Follow the table and return the actions with which the new state begins."""
        self.state = self._next[self.state, event]
        self._entered_s = self._progress_s = now
        if event in ("all_ready", "drain"):
            self.reason = ""  # that of an earlier fault
        if self.state is EpochState.STARTING:
            self.epoch += 1
            return [self._start(peer) for peer in self._roster.peers]
        if self.state is EpochState.RUN:
            return [*self._to_all(Run(self.epoch)), EpochReady(self.epoch)]
        if self.state is EpochState.DRAINING:
            return [*self._to_all(Drain()), Draining()]
        if self.state is EpochState.FORMING:
            for rank in self._roster:
                if rank.hello is not None:  # the state before was an epoch of all ranks
                    rank.over, rank.hello = True, None
                rank.ready = None
            return []
        end = EpochFailed(self.code, self.reason, self.advice) if self.code else EpochFinished()
        return [*self._to_all(Stop(self.code, self.reason)), end]

    def _fail_epoch(self, code: int, reason: str, now: float, advice: str = "") -> list[Action]:
        """A fault of one rank. Ends the service, or with `survive` the epoch."""
        if self.state is EpochState.FORMING and self.survives_faults:
            return []  # nothing runs yet; the failed rank is missing, as before
        return self._end("fault", code, reason, now, advice)

    def _end(self, event: EpochEvent, code: int, reason: str, now: float, advice: str = "") -> list[Action]:
        """Take the transition of a fault and keep its reason."""
        if self.state is EpochState.STOPPED:
            return []
        self.reason, self.advice = reason, advice
        self.code = code if self._next[self.state, event] is EpochState.STOPPED else 0
        return self._enter_state(event, now)

    def _tick_forming(self, elapsed_s: float, now: float) -> list[Action]:
        missing = self._roster.missing
        if now - self._progress_s > self._form_timeout_s:
            why = f"{of_ranks(missing)} did not come within {self._form_timeout_s:g} s"
            return self._end("fatal", 1, why, now, "see what the log of each node says")
        if self.epoch and elapsed_s > REJOIN_S:
            stop = Stop(1, self.reason)
            return [SendMessage(self._roster.peer(i), stop) for i in missing if self._roster[i].over]
        return []

    # Helpers

    def _start(self, peer: Peer) -> SendMessage:
        first = self._roster[0].hello
        assert first is not None
        return SendMessage(peer, Start(self.epoch, first.endpoints))

    def _to_all(self, message: CoordinatorMessage) -> list[Action]:
        return [SendMessage(peer, message) for peer in self._roster.peers]
