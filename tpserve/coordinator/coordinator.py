"""The owner of the epoch: which ranks take part, whether plans may flow, and why it ended. Sans-I/O, with a single writer.

Theory of operation. Each event is a method call that takes `now` (seconds of any monotonic clock) and returns the actions to
carry out, in order. Nothing is awaited, opened or read here. The table `NEXT_STATE` has every transition:

    FORMING   some ranks have not said Hello           -> STARTING   once all have: epoch + 1, Start to all
    STARTING  ranks form the mesh and load             -> RUN        once all are Ready: Run to all, EpochReady
    RUN       plans flow                               -> DRAINING   on Drain from the frontend or from a rank that got a signal
    DRAINING  open requests finish                     -> STOPPED    once the request table is empty: Stop(0) to all, Finished
    STOPPED   the last state; every later message of a rank is answered with Stop

The one rule of recovery: a fault of a rank leads from STARTING, RUN and DRAINING back to FORMING. The rank that failed gets
Stop(RESTART_CODE), or is dead; its agent starts it again. All others get Leave, keep their weights and say Hello once more. Open
requests wait meanwhile, and are sent to the engine again after EpochReady. The service ends (Stop(code) to all, EpochFailed) when

    the user can mend it       a rank reports a fault of kind user
    it has never worked        before the first RUN, a rank reports an error of its own
    it does not come back      no rank makes progress for `recovery_timeout_s`, before the first RUN for `form_timeout_s`
    it fails again and again   more faults with a cause of their own than `restart_intensity` allows, and no token in between
    nobody restarts ranks      `restarts` is false: any fault

Invariants
- A process of a rank, or one attempt of it, is an *incarnation*. The roster numbers them in the order of arrival. Only the
  highest number of a rank counts; a lower one gets Stop.
- An incarnation takes part in at most one epoch: Start of epoch e + 1 needs, for every rank, an incarnation that was not part of
  e. So every rank has left an epoch before the next one runs.
- Every message may be lost, repeated or late. Ranks repeat Hello until Start, Ready until Run, Drain until Drain, and each gets
  an answer every time; a rank whose epoch is over gets Leave for every heartbeat. A message of another epoch or of an older
  incarnation changes nothing.
- The first failure is the reason. Its consequences (lost connections, more faults) do not replace it.
- An overdue step is no fault while a rank reports that it compiles, for as long as a start may take.
"""

from collections.abc import Callable

from tpserve.coordinator.actions import (
    Action,
    Cause,
    EpochFailed,
    EpochFinished,
    EpochLost,
    EpochReady,
    EpochStarting,
    RankLost,
    SendMessage,
)
from tpserve.coordinator.config_check import mismatch
from tpserve.coordinator.epoch_state import NEXT_STATE, EpochEvent, EpochState
from tpserve.coordinator.restart_intensity import RestartIntensity, cause_of_exit
from tpserve.coordinator.roster import Peer, RankInfo, Roster
from tpserve.observe.table import of_ranks
from tpserve.types.messages import (
    RESTART_CODE,
    CoordinatorMessage,
    Drain,
    ExpertLoad,
    Fault,
    Heartbeat,
    Hello,
    Leave,
    LogLines,
    MemoryLedger,
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
_SILENT_ADVICE = "it hangs or was stopped, or its node or the link to it is down: look at that node's log, `dmesg` and network"
_FAULT_ADVICE = "--log-level debug shows where"
_SIBLING_ADVICE = "look at the last lines of its node's log"
_CAUSE_OF_FAULT: dict[str, Cause] = {"engine": "error", "overdue": "unclear"}


class Coordinator:
    """See the module docstring. Call `tick` several times a second."""

    def __init__(
        self,
        world_size: int,
        now: float,
        *,
        restarts: bool = True,
        form_timeout_s: float = 600.0,
        recovery_timeout_s: float = 120.0,
        drain_timeout_s: float = 25.0,
        epoch: int = 0,
        facts: dict[str, int] | None = None,
    ) -> None:
        """`restarts`: somebody starts dead ranks again. `form_timeout_s` bounds the first start and `recovery_timeout_s` a
        recovery, counted from the last progress of any rank (it may be downloading weights). `drain_timeout_s` bounds DRAINING
        (torchrun kills its ranks 30 s after a SIGTERM). `epoch`, `facts`: of a coordinator before this one.
        """
        self.state = EpochState.FORMING
        self.epoch = epoch
        self.reason = self.advice = ""
        self.code = 0
        self.restarts = restarts
        self.facts = facts or {}
        """Facts of the loaded model, from rank 0's Ready; empty before the first RUN."""
        self.last_fault = ""
        self.recoveries = 0
        """Epochs that ran after a fault."""
        self._roster = Roster(world_size)
        self._ledgers: list[MemoryLedger] = []
        """Of every rank, as the ranks agreed in the first epoch; empty before."""
        self._intensity = RestartIntensity()
        self._form_timeout_s, self._recovery_timeout_s = form_timeout_s, recovery_timeout_s
        self._drain_timeout_s = drain_timeout_s
        self._draining_s: float | None = None
        self._progress_s = self._ticked_s = now
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
    def recovering(self) -> bool:
        """Whether the ranks form an epoch after one that has run."""
        return self.state in (EpochState.FORMING, EpochState.STARTING) and bool(self.facts)

    @property
    def draining(self) -> bool:
        """Whether the service takes no new requests, also while it recovers."""
        return self._draining_s is not None

    @property
    def phase(self) -> str:
        """What the start waits for, in a few words: the missing ranks while FORMING, the slowest rank's phase while STARTING."""
        if self.state is EpochState.FORMING:
            return self._roster.forming_phase()
        if self.state is EpochState.STARTING:
            return self._roster.slowest(forming=False).phase or "starting"
        return {EpochState.RUN: "ready", EpochState.DRAINING: "draining"}.get(self.state, "stopped")

    @property
    def percent(self) -> int:
        """The progress of the slowest rank's start, 0 to 100."""
        if self.state in (EpochState.FORMING, EpochState.STARTING):
            return self._roster.slowest(forming=self.state is EpochState.FORMING).percent
        return 100 if self.state in (EpochState.RUN, EpochState.DRAINING) else 0

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
            actions = self._register(peer, now)
        elif not roster.is_current(peer):
            return [self._stop_replaced(peer)]
        roster[peer.rank].last_message_s = now
        if self.state is EpochState.STOPPED:
            return [*actions, SendMessage(peer, Stop(self.code, self.reason))]
        return actions + self._handlers[type(message)](peer, message, now)

    def _register(self, peer: Peer, now: float) -> list[Action]:
        """The first message of an incarnation. The one before it gets Stop: after Leave it would take the place again."""
        roster, old = self._roster, self._roster.peer(peer.rank)
        took_part, name = roster[peer.rank].hello is not None, roster.describe(peer.rank)
        roster.register(peer)
        if not took_part:
            return []
        return [self._stop_replaced(old), *self._fail_epoch(f"{name} is gone: a new process has taken its place", now)]

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
        reason = " ".join(filter(None, (self._roster.describe(peer.rank), how, why)))
        rank.over, rank.hello = True, None
        return self._fail_epoch(reason, now, advice)

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        blocked, self._ticked_s = now - self._ticked_s > BLOCKED_S, now
        if blocked:
            self._roster.reset_timers(now)
        if self.state is EpochState.STOPPED:
            return []
        limit_s = LOST_S if self.state in (EpochState.RUN, EpochState.DRAINING) or self.recovering else LOST_STARTING_S
        for i, rank in enumerate(self._roster):
            if (rank.hello is not None or rank.over) and not rank.lost and now - rank.last_message_s > limit_s:
                rank.lost = True
                silent = self._roster.peer(i)
                return [RankLost(silent), *self.lost(silent, f"has been silent for {limit_s:g} s", now, _SILENT_ADVICE)]
        if self._draining_s is not None and now - self._draining_s > self._drain_timeout_s:
            self.reason = f"requests were still open after a drain of {self._drain_timeout_s:g} s"
            return self._enter_state("drained", now)
        return self._tick_forming(now) if self.state in (EpochState.FORMING, EpochState.STARTING) else []

    def drain(self, now: float) -> list[Action]:
        """Let open requests finish, then end the service."""
        if self.state is EpochState.STOPPED or self._draining_s is not None:
            return []
        self._draining_s = now
        if self.state is EpochState.RUN:
            return self._enter_state("drain", now)
        return [] if self.facts else self._enter_state("drained", now)

    def drained(self, now: float) -> list[Action]:
        """No request is open. Has no effect unless the service drains."""
        if self._draining_s is None or self.state is EpochState.STOPPED:
            return []
        return self._enter_state("drained", now)

    def note_token(self) -> None:
        """The engine has produced a token: faults before it do not count any more."""
        self._intensity.note_token()

    def fail(self, code: int, reason: str, now: float, advice: str = "") -> list[Action]:
        """Something outside the ranks ends the service at once: the agent has ended, or a second signal came."""
        return self._end(code, reason, now, advice)

    # One handler for each message type. The peer is the current incarnation of its rank; the state is not STOPPED

    def _on_hello(self, peer: Peer, message: Hello, now: float) -> list[Action]:
        rank = self._roster[peer.rank]
        if rank.over:
            return [self._leave(peer)]
        if self.state is not EpochState.FORMING:
            return [self._start(peer)] if rank.hello is not None and rank.ready is None else []
        if rank.hello is not None:
            return []
        why = mismatch(self._roster.taking_part(), message)
        rank.hello, self._progress_s = message, now
        if why:
            return self._end(2, why, now)
        if too_many := self._intensity.note_fault(cause_of_exit(message.last_exit), now):
            return self._end_after(too_many, now)
        return self._enter_state("all_joined", now) if self._roster.complete else []

    def _on_ready(self, peer: Peer, message: Ready, now: float) -> list[Action]:
        rank = self._roster[peer.rank]
        if message.epoch != self.epoch or rank.hello is None:
            return []
        if self.state is EpochState.STARTING:
            rank.ready = message
            return self._enter_state("all_ready", now) if all(r.ready for r in self._roster) else []
        return [SendMessage(peer, Run(self.epoch))] if self.state in (EpochState.RUN, EpochState.DRAINING) else []

    def _on_heartbeat(self, peer: Peer, message: Heartbeat, now: float) -> list[Action]:
        if self._roster.record_heartbeat(peer.rank, message, now):
            self._progress_s = now
        rank = self._roster[peer.rank]
        earlier = message.epoch > 0 and rank.hello is None  # in an epoch of the coordinator before this one, which was killed
        return [self._leave(peer)] if rank.over or earlier else []

    def _on_log_lines(self, peer: Peer, message: LogLines, now: float) -> list[Action]:
        self._roster.record_error(peer.rank, message.last_error, now)
        return [message]

    def _on_fault(self, peer: Peer, message: Fault, now: float) -> list[Action]:
        rank = self._roster[peer.rank]
        if message.kind == "user":
            return self._end(2, message.text, now)
        if rank.over:
            return [self._leave(peer)]
        if message.kind == "overdue" and self._roster.is_compiling(now, self._form_timeout_s):
            return []
        reason = f"{self._roster.describe(peer.rank)}: {message.text}"
        advice = _SIBLING_ADVICE if message.kind == "sibling" else _FAULT_ADVICE
        cause = _CAUSE_OF_FAULT.get(message.kind, "outside")
        if message.kind == "engine" and not self.facts:
            return self._end(1, reason, now, advice)
        rank.over, restart = True, list[Action]()
        if message.kind == "engine" and self.restarts:
            rank.hello, restart = None, [SendMessage(peer, Stop(RESTART_CODE, reason))]
        actions = self._fail_epoch(reason, now, advice, cause)
        rank.hello = None
        return [*restart, *actions]

    def _on_drain(self, peer: Peer, message: Drain, now: float) -> list[Action]:
        if self.state is EpochState.DRAINING:
            return [SendMessage(peer, Drain())]
        return self.drain(now)

    # Transitions

    def _enter_state(self, event: EpochEvent, now: float) -> list[Action]:
        """Follow the table and return the actions with which the new state begins."""
        self.state = self._next(event)
        self._progress_s = now
        if event in ("all_ready", "drain"):
            self.reason = ""  # that of an earlier fault
        if self.state is EpochState.STARTING:
            self.epoch += 1
            return [EpochStarting(self.epoch), *(self._start(peer) for peer in self._roster.peers)]
        if self.state is EpochState.RUN:
            self._note_ready()
            actions = [*self._to_all(Run(self.epoch)), EpochReady(self.epoch, self._intensity.take_worst())]
            return actions if self._draining_s is None else [*actions, *self._enter_state("drain", now)]
        if self.state is EpochState.DRAINING:
            return self._to_all(Drain())
        if self.state is EpochState.FORMING:
            leaving = [peer for peer in self._roster.peers if self._roster[peer.rank].hello is not None]
            for rank in self._roster:
                rank.over, rank.hello, rank.ready = rank.over or rank.hello is not None, None, None
            return [self._leave(peer) for peer in leaving]
        end = EpochFailed(self.code, self.reason, self.advice) if self.code else EpochFinished()
        return [*self._to_all(Stop(self.code, self.reason)), end]

    def _next(self, event: EpochEvent) -> EpochState:
        return NEXT_STATE[self.state, event]

    def _note_ready(self) -> None:
        """Keep what later epochs and operators need of the ranks that are ready."""
        readies = [rank.ready for rank in self._roster if rank.ready is not None]
        self.recoveries += bool(self.facts)
        self.facts, self._ledgers = dict(readies[0].facts), [ready.ledger for ready in readies]

    def _fail_epoch(self, reason: str, now: float, advice: str = "", cause: Cause = "outside") -> list[Action]:
        """A fault of one rank. Ends the epoch, or the service where nobody restarts ranks."""
        if self.state is EpochState.STOPPED:
            return []
        if not self.restarts:
            return self._end(1, reason, now, advice)
        if self.state is EpochState.FORMING:
            return []  # nothing runs yet; the failed rank is missing, as before
        self.reason, self.advice, self.last_fault = reason, advice, reason
        if too_many := self._intensity.note_fault(cause, now):
            return self._end_after(too_many, now)
        epoch = self.epoch
        return [*self._enter_state("fault", now), EpochLost(epoch, reason)]

    def _end_after(self, faults: str, now: float) -> list[Action]:
        return self._end(1, f"{faults}, the last: {self.reason}", now, self.advice)

    def _end(self, code: int, reason: str, now: float, advice: str = "") -> list[Action]:
        """End the service and keep the reason."""
        if self.state is EpochState.STOPPED:
            return []
        self.reason, self.advice, self.code = reason, advice, code
        return self._enter_state("fatal", now)

    def _tick_forming(self, now: float) -> list[Action]:
        """End a start that makes no progress."""
        limit_s = self._recovery_timeout_s if self.recovering else self._form_timeout_s
        if now - self._progress_s <= limit_s:
            return []
        waited_for = of_ranks(self._roster.missing or self._roster.loading)
        why = f"{waited_for} did not come {'back ' * self.recovering}within {limit_s:g} s"
        why = f"{why}, after {self.reason}" if self.recovering and self.reason else why
        return self._end(1, why, now, self.advice or "see what the log of each node says")

    # Helpers

    def _start(self, peer: Peer) -> SendMessage:
        first = self._roster[0].hello
        assert first is not None
        return SendMessage(peer, Start(self.epoch, first.endpoints, self._ledger(peer.rank)))

    def _ledger(self, rank: int) -> MemoryLedger | None:
        """What an earlier epoch agreed on: as this coordinator knows it, or a rank that was part of it."""
        if self._ledgers:
            return self._ledgers[rank]
        own = self._roster[rank].hello
        survivors = [own, *self.hellos]
        return next((hello.ledger for hello in survivors if hello is not None and hello.ledger is not None), None)

    def _stop_replaced(self, peer: Peer) -> SendMessage:
        """The code asks for a restart: it may be the newer one after all, if messages have overtaken others."""
        code = RESTART_CODE if self.restarts else 1
        return SendMessage(peer, Stop(code, f"a newer process has taken the place of rank {peer.rank}"))

    def _leave(self, peer: Peer) -> SendMessage:
        return SendMessage(peer, Leave(self.epoch, self.reason))

    def _to_all(self, message: CoordinatorMessage) -> list[Action]:
        return [SendMessage(peer, message) for peer in self._roster.peers]
