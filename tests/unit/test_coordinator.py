"""The coordinator's transitions, one by one."""

import msgspec
import pytest

from tpserve.coordinator.actions import (
    EpochFailed,
    EpochFinished,
    EpochLost,
    EpochReady,
    EpochStarting,
    RankLost,
    SendMessage,
)
from tpserve.coordinator.coordinator import Coordinator
from tpserve.coordinator.epoch_state import EpochState
from tpserve.coordinator.roster import Peer
from tpserve.types.messages import (
    RESTART_CODE,
    Drain,
    Fault,
    Heartbeat,
    Hello,
    Leave,
    LogLines,
    MemoryLedger,
    Ready,
    Run,
    Start,
    Stop,
)

ENDPOINTS = {"store": "127.0.0.1:1"}


def hello(rank: int, incarnation: int = 1, **fingerprint: str) -> Hello:
    return Hello(rank, incarnation, 100 + rank, f"node{rank}", ENDPOINTS if rank == 0 else {}, fingerprint)


def up(rank: int, epoch: int = 1, num_blocks: int = 8) -> Ready:
    return Ready(rank, epoch, MemoryLedger(0, 0, 0, 0, 0, 0, 0, num_blocks, 16, 256), {"vocab_size": 320} if rank == 0 else {})


def running(world_size: int = 2, *, restarts: bool = False) -> Coordinator:
    c = Coordinator(world_size, 0.0, restarts=restarts)
    for rank in range(world_size):
        c.receive(Peer(rank, 1), hello(rank), 0.0)
    for rank in range(world_size):
        c.receive(Peer(rank, 1), up(rank, 1, 10 - rank), 0.0)
    assert c.state is EpochState.RUN
    return c


def beat_all(c: Coordinator, now: float, ranks: range) -> None:
    for rank in ranks:
        c.receive(Peer(rank, 1), Heartbeat(rank, 1, "", 0, 0), now)


def advance(c: Coordinator, start: float, end: float, beating: range) -> list[object]:
    """Tick every 0.1 s while some ranks beat."""
    actions: list[object] = []
    for i in range(round((end - start) * 10)):
        now = start + (i + 1) * 0.1
        beat_all(c, now, beating)
        actions += c.tick(now)
    return actions


def test_hello_start_up_run() -> None:
    c = Coordinator(2, 0.0)
    assert c.phase == "waiting for ranks 0-1"
    assert c.receive(Peer(0, 1), hello(0), 0.0) == []
    assert c.phase == "waiting for rank 1"
    start = Start(1, ENDPOINTS)
    actions = c.receive(Peer(1, 1), hello(1), 0.0)
    assert actions == [EpochStarting(1), SendMessage(Peer(0, 1), start), SendMessage(Peer(1, 1), start)]
    c.receive(Peer(0, 1), Heartbeat(0, 1, "loading weights", 80, 0), 0.0)
    c.receive(Peer(1, 1), Heartbeat(1, 1, "loading weights", 40, 0), 0.0)
    assert (c.state, c.phase, c.percent) == (EpochState.STARTING, "loading weights", 40)
    assert c.receive(Peer(1, 1), up(1, 1, 7), 0.0) == []
    actions = c.receive(Peer(0, 1), up(0), 0.0)
    assert actions == [SendMessage(Peer(0, 1), Run(1)), SendMessage(Peer(1, 1), Run(1)), EpochReady(1)]
    assert c.facts == {"vocab_size": 320}
    assert [seen.ready and seen.ready.ledger.num_blocks for seen in c.ranks] == [8, 7]
    assert (c.phase, c.percent) == ("ready", 100)


def test_a_rank_that_downloads_is_told_of_and_waited_for() -> None:
    c = Coordinator(3, 0.0, form_timeout_s=10.0)
    c.receive(Peer(0, 1), hello(0), 0.0)
    for second in range(1, 31):
        c.receive(Peer(0, 1), Heartbeat(0, 0, "waiting for all ranks", 0, -1), float(second))
        c.receive(Peer(1, 1), Heartbeat(1, 0, "downloading org/tiny", 50 + second, -1), float(second))
        c.receive(Peer(2, 1), Heartbeat(2, 0, "downloading org/tiny", second, -1), float(second))
        assert c.tick(float(second)) == []
    assert (c.state, c.phase, c.percent) == (EpochState.FORMING, "waiting for ranks 1-2: downloading org/tiny", 30)
    heartbeat = Heartbeat(2, 0, "downloading org/tiny", 30, -1)
    actions = [
        action for second in range(31, 42) for action in [*c.receive(Peer(2, 1), heartbeat, second), *c.tick(float(second))]
    ]
    assert EpochFailed(1, "ranks 1-2 did not come within 10 s", "see what the log of each node says") in actions


def test_lost_orders_are_given_again() -> None:
    c = Coordinator(2, 0.0)
    c.receive(Peer(0, 1), hello(0), 0.0)
    c.receive(Peer(1, 1), hello(1), 0.0)
    assert c.receive(Peer(1, 1), hello(1), 0.5) == [SendMessage(Peer(1, 1), Start(1, ENDPOINTS))]
    c.receive(Peer(0, 1), up(0), 0.5)
    assert c.receive(Peer(0, 1), hello(0), 0.5) == []  # a late Hello of one who is up already
    c.receive(Peer(1, 1), up(1), 0.5)
    assert c.receive(Peer(1, 1), up(1), 0.5) == [SendMessage(Peer(1, 1), Run(1))]
    c.drain(1.0)
    assert c.receive(Peer(1, 1), Drain(1), 1.0) == [SendMessage(Peer(1, 1), Drain())]
    c.drained(1.0)
    assert c.receive(Peer(1, 1), Heartbeat(1, 1, "", 0, 0), 1.0) == [SendMessage(Peer(1, 1), Stop(0, ""))]


def test_a_rank_that_is_told_to_end_drains_everyone() -> None:
    c = running()
    assert c.drained(1.0) == [] and c.state is EpochState.RUN
    assert c.receive(Peer(1, 1), Drain(1), 1.0) == [
        SendMessage(Peer(0, 1), Drain()),
        SendMessage(Peer(1, 1), Drain()),
    ]
    assert c.state is EpochState.DRAINING
    assert c.drained(2.0) == [SendMessage(Peer(0, 1), Stop(0, "")), SendMessage(Peer(1, 1), Stop(0, "")), EpochFinished()]


def test_a_drain_before_the_first_step_stops_at_once() -> None:
    c = Coordinator(2, 0.0)
    c.receive(Peer(0, 1), hello(0), 0.0)
    assert c.drain(1.0) == [SendMessage(Peer(0, 1), Stop(0, "")), EpochFinished()]
    assert c.drain(1.0) == []


def test_a_drain_does_not_last_for_ever() -> None:
    c = running()
    c.drain(0.0)
    actions = advance(c, 0.0, 26.0, range(2))
    assert isinstance(actions[-1], EpochFinished) and "25 s" in c.reason


def test_the_first_failure_is_the_reason() -> None:
    c = running(3)
    actions = c.receive(Peer(1, 1), Fault(1, 1, "engine", "out of memory"), 1.0)
    reason = "rank 1 on node1 (pid 101): out of memory"
    assert actions[:-1] == [SendMessage(Peer(r, 1), Stop(1, reason)) for r in range(3)]
    assert isinstance(failed := actions[-1], EpochFailed) and (failed.code, failed.reason) == (1, reason)
    assert c.receive(Peer(2, 1), Fault(2, 1, "engine", "connection closed by peer"), 1.1) == [
        SendMessage(Peer(2, 1), Stop(1, reason))
    ]
    assert c.lost(Peer(0, 1), "died", 1.2) == []
    assert c.reason == reason


def test_a_user_fault_is_one_plain_line_and_code_2_even_when_surviving() -> None:
    c = running(restarts=True)
    actions = c.receive(Peer(1, 1), Fault(1, 1, "user", "no file /x: give a directory"), 1.0)
    assert actions[-1] == EpochFailed(2, "no file /x: give a directory")


def test_a_silent_rank_is_lost_after_four_seconds() -> None:
    c = running()
    assert advance(c, 0.0, 3.9, range(1)) == []
    actions = advance(c, 3.9, 4.5, range(1))
    assert actions[0] == RankLost(Peer(1, 1)), "its process is of no more use"
    assert isinstance(failed := actions[-1], EpochFailed) and failed.reason == "rank 1 on node1 (pid 101) has been silent for 4 s"
    assert "its node or the link to it is down" in failed.advice


def test_a_late_tick_forgives_all_timers() -> None:
    c = running()
    advance(c, 0.0, 1.0, range(2))
    assert c.tick(60.0) == [] and c.state is EpochState.RUN
    assert advance(c, 60.0, 63.9, range(0)) == []
    assert advance(c, 63.9, 64.5, range(0)) != []


def test_a_difference_is_a_user_fault_that_names_both() -> None:
    c = Coordinator(2, 0.0)
    c.receive(Peer(1, 1), hello(1, version="1.1", config="a"), 0.0)
    actions = c.receive(Peer(0, 1), hello(0, version="1.0", config="a"), 0.0)
    assert isinstance(actions[-1], EpochFailed) and actions[-1].code == 2
    assert "rank 1 on node1 has version 1.1, rank 0 on node0 has version 1.0" in actions[-1].reason


@pytest.mark.parametrize("second", [4, 9])
def test_incarnations_are_numbered_as_they_come(second: int) -> None:
    """Whatever number they call themselves: of a clock that was set back, it would be a lower one."""
    c = Coordinator(2, 0.0, restarts=True)
    c.receive(Peer(1, 5), hello(1, 5), 0.0)
    c.receive(Peer(1, second), hello(1, second), 1.0)
    (action,) = c.receive(Peer(1, 5), hello(1, 5), 1.1)
    assert isinstance(action, SendMessage) and action.peer == Peer(1, 5) and isinstance(action.message, Stop)
    assert [hello.identity for hello in c.hellos] == [second] and c.is_current(Peer(1, second))
    assert c.phase == "waiting for rank 0"


def test_what_a_rank_has_just_logged_explains_its_end() -> None:
    for age_s, text in ((1.0, "ended after the error: disk is full"), (60.0, "ended without a word")):
        c = running()
        assert c.receive(Peer(1, 1), LogLines(1, 0, ("x",), "disk is full"), 5.0)
        c.receive(Peer(1, 1), LogLines(1, 1, ("y",)), 5.1)
        c.lost(Peer(1, 1), "ended", 5.0 + age_s, "look", "without a word")
        assert c.reason == f"rank 1 on node1 (pid 101) {text}"


def test_an_overdue_step_waits_for_a_rank_that_compiles_but_not_for_ever() -> None:
    fault = Fault(0, 1, "overdue", "step 3 does not come back: a rank hangs")

    def at(c: Coordinator, now: float, busy: str) -> EpochState:
        c.receive(Peer(1, 1), Heartbeat(1, 1, "", 0, 0, busy), now)
        c.receive(Peer(0, 1), fault, now)
        return c.state

    c = running()
    assert at(c, 1.0, "") is EpochState.STOPPED and c.reason.endswith("step 3 does not come back: a rank hangs")
    c = running()
    assert at(c, 1.0, "compiling attention") is EpochState.RUN
    assert at(c, 599.0, "compiling attention") is EpochState.RUN
    assert at(c, 602.0, "compiling attention") is EpochState.STOPPED, "no longer than a start may take"
    c = running()
    assert at(c, 1.0, "compiling attention") is EpochState.RUN
    assert at(c, 2.0, "") is EpochState.RUN, "it has compiled, and the step has its time"
    assert at(c, 62.0, "") is EpochState.STOPPED


def test_a_new_incarnation_means_the_old_one_is_gone() -> None:
    c = running()
    actions = c.receive(Peer(1, 2), hello(1, 2), 1.0)
    assert EpochFailed(1, "rank 1 on node1 (pid 101) is gone: a new process has taken its place") in actions


def test_missing_ranks_are_named_when_forming_takes_too_long() -> None:
    c = Coordinator(5, 0.0, form_timeout_s=10.0)
    c.receive(Peer(0, 1), hello(0), 0.0)
    c.receive(Peer(2, 1), hello(2), 0.0)
    actions: list[object] = []
    for i in range(105):
        for rank in (0, 2):
            c.receive(Peer(rank, 1), Heartbeat(rank, 0, "", 0, 0), i / 10)
        actions += c.tick(i / 10)
    assert actions[-1] == EpochFailed(1, "ranks 1, 3-4 did not come within 10 s", "see what the log of each node says")


def test_a_rank_outside_the_world_is_sent_away() -> None:
    (action,) = Coordinator(2, 0.0).receive(Peer(2, 1), hello(2), 0.0)
    assert action == SendMessage(Peer(2, 1), Stop(2, "rank 2 is outside the world size of 2"))


LEDGERS = [MemoryLedger(0, 0, 0, 0, 0, 0, 0, 10 - rank, 16, 256) for rank in range(3)]


def test_surviving_a_death() -> None:
    c = running(restarts=True)
    leave, lost = SendMessage(Peer(0, 1), Leave(1, "rank 1 on node1 (pid 101) died")), "rank 1 on node1 (pid 101) died"
    assert c.lost(Peer(1, 1), "died", 1.0) == [leave, EpochLost(1, lost)]
    assert (c.state, c.epoch, c.recovering) == (EpochState.FORMING, 1, True)
    assert c.receive(Peer(0, 1), hello(0), 1.0) == [leave]  # a late Hello of the epoch that is over
    assert c.receive(Peer(0, 1), Fault(0, 1, "peer", "peer closed"), 1.0) == [leave] and "died" in c.reason
    assert c.receive(Peer(0, 1), Heartbeat(0, 1, "", 0, 0), 1.0) == [leave], "the first may be lost"
    c.receive(Peer(1, 2), hello(1, 2), 1.1)
    assert c.state is EpochState.FORMING
    actions = c.receive(Peer(0, 2), hello(0, 2), 1.2)
    assert actions[1:] == [SendMessage(Peer(rank, 2), Start(2, ENDPOINTS, LEDGERS[rank])) for rank in range(2)] and c.epoch == 2
    c.receive(Peer(0, 2), up(0, 1), 1.3)  # of the old epoch: says nothing
    c.receive(Peer(1, 2), up(1, 2), 1.3)
    assert c.state is EpochState.STARTING and c.facts == {"vocab_size": 320}, "what the model is stays known"
    assert c.receive(Peer(0, 2), up(0, 2), 1.3)[-1] == EpochReady(2)
    assert c.recoveries == 1


def test_a_rank_with_an_error_of_its_own_is_restarted_and_the_others_leave() -> None:
    c = running(3, restarts=True)
    actions = c.receive(Peer(1, 1), Fault(1, 1, "engine", "illegal instruction"), 1.0)
    reason = "rank 1 on node1 (pid 101): illegal instruction"
    assert actions == [
        SendMessage(Peer(1, 1), Stop(RESTART_CODE, reason)),
        *(SendMessage(Peer(rank, 1), Leave(1, reason)) for rank in (0, 2)),
        EpochLost(1, reason),
    ]


def test_a_rank_that_lost_a_peer_leaves_like_the_others() -> None:
    c = running(restarts=True)
    actions = c.receive(Peer(1, 1), Fault(1, 1, "peer", "connection reset"), 1.0)
    assert [a.message for a in actions if isinstance(a, SendMessage)] == [Leave(1, c.reason)] * 2


def test_before_the_first_run_an_error_ends_the_start_and_a_death_does_not() -> None:
    def starting() -> Coordinator:
        c = Coordinator(2, 0.0)
        for rank in range(2):
            c.receive(Peer(rank, 1), hello(rank), 0.0)
        return c

    c = starting()
    assert c.receive(Peer(1, 1), Fault(1, 1, "engine", "no such kernel"), 1.0)[-1] == EpochFailed(
        1, "rank 1 on node1 (pid 101): no such kernel", "--log-level debug shows where"
    )
    c = starting()
    assert isinstance(c.lost(Peer(1, 1), "ended", 1.0)[-1], EpochLost) and not c.recovering


def test_a_recovery_without_progress_ends_the_service() -> None:
    c = Coordinator(2, 0.0, recovery_timeout_s=20.0)
    for rank in range(2):
        c.receive(Peer(rank, 1), hello(rank), 0.0)
    for rank in range(2):
        c.receive(Peer(rank, 1), up(rank), 0.0)
    c.lost(Peer(1, 1), "died", 1.0)
    c.receive(Peer(0, 2), hello(0, 2), 1.5)
    actions: list[object] = []
    for tenth in range(15, 400):
        c.receive(Peer(0, 2), Heartbeat(0, 0, "", 0, -1), tenth / 10)
        actions += c.tick(tenth / 10)
    failed = next(a for a in actions if isinstance(a, EpochFailed))
    assert failed.reason == "rank 1 did not come back within 20 s, after rank 1 on node1 (pid 101) died"


def test_who_is_replaced_starts_again_and_does_not_say_hello_again() -> None:
    c = running(restarts=True)
    stop = SendMessage(Peer(1, 1), Stop(RESTART_CODE, "a newer process has taken the place of rank 1"))
    actions = c.receive(Peer(1, 2), hello(1, 2), 1.0)
    assert stop in actions and [a.peer for a in actions if isinstance(a, SendMessage) and isinstance(a.message, Leave)] == [
        Peer(0, 1)
    ]
    assert c.receive(Peer(1, 1), Heartbeat(1, 1, "", 0, 0), 1.1) == [stop]


def test_faults_of_their_own_without_a_token_end_the_service() -> None:
    def fail_once(c: Coordinator, number: int, last_exit: str) -> list[object]:
        now = float(number)
        found: list[object] = [*c.lost(Peer(1, number), "ended", now)]
        for rank in range(2):
            again = msgspec.structs.replace(hello(rank, number + 1), last_exit=last_exit if rank else "")
            found += c.receive(Peer(rank, number + 1), again, now)
        for rank in range(2):
            found += c.receive(Peer(rank, number + 1), up(rank, c.epoch), now)
        return found

    c = running(restarts=True)
    assert not [a for number in range(1, 50) for a in fail_once(c, number, "SIGKILL") if isinstance(a, EpochFailed)]
    c = running(restarts=True)
    assert not [a for number in range(1, 50) for a in fail_once(c, number, "exit code 75") if isinstance(a, EpochFailed)]
    c = running(restarts=True)
    for number in range(1, 11):
        assert not [a for a in fail_once(c, number, "SIGSEGV") if isinstance(a, EpochFailed)]
    c.note_token()
    assert not [a for number in range(11, 21) for a in fail_once(c, number, "SIGSEGV") if isinstance(a, EpochFailed)]
    (failed,) = [a for a in fail_once(c, 21, "SIGSEGV") if isinstance(a, EpochFailed)]
    assert failed.reason.startswith("11 faults within 300 s, the last: rank 1 on node1 (pid 101)") and failed.code == 1


def test_a_drain_goes_on_after_a_recovery() -> None:
    c = running(restarts=True)
    c.drain(1.0)
    c.lost(Peer(1, 1), "died", 2.0)
    assert c.draining and c.recovering
    for rank in range(2):
        c.receive(Peer(rank, 2), hello(rank, 2), 2.1)
    c.receive(Peer(0, 2), up(0, 2), 2.2)
    actions = c.receive(Peer(1, 2), up(1, 2), 2.2)
    assert EpochReady(2) in actions and actions[-1] == SendMessage(Peer(1, 2), Drain()) and c.state is EpochState.DRAINING
    assert c.drained(3.0)[-1] == EpochFinished()
    c = running(restarts=True)
    c.lost(Peer(1, 1), "died", 2.0)
    assert c.drain(2.5) == [] and c.drained(2.6)[-1] == EpochFinished(), "nothing is open, so nobody waits for the rank"


def test_a_coordinator_that_follows_another_recovers() -> None:
    c = Coordinator(2, 0.0, epoch=7, facts={"vocab_size": 320}, recovery_timeout_s=5.0)
    assert c.recovering and c.facts == {"vocab_size": 320}
    assert [type(a) for tenth in range(60) for a in c.tick(tenth / 10)] == [EpochFailed], "it waits as for a recovery"


def test_the_next_coordinator_learns_the_memory_from_a_survivor() -> None:
    c = Coordinator(2, 0.0, epoch=7)
    c.receive(Peer(0, 1), hello(0), 0.0)
    actions = c.receive(Peer(1, 1), msgspec.structs.replace(hello(1), ledger=LEDGERS[1]), 0.0)
    assert actions[0] == EpochStarting(8)
    assert actions[1:] == [SendMessage(Peer(rank, 1), Start(8, ENDPOINTS, LEDGERS[1])) for rank in range(2)]


def test_ranks_of_an_epoch_of_the_coordinator_before_are_told_to_leave_it() -> None:
    """On another host they may not even notice that there is another: they reach it at the same address."""
    c = Coordinator(2, 0.0, epoch=7)
    assert c.receive(Peer(1, 5), Heartbeat(1, 0, "", 0, 0), 0.0) == [], "it has just begun, and its Hello follows"
    assert c.receive(Peer(0, 5), Heartbeat(0, 7, "", 0, 0), 0.0) == [SendMessage(Peer(0, 5), Leave(7, ""))]
    c.receive(Peer(0, 6), hello(0), 0.1)
    assert c.receive(Peer(0, 6), Heartbeat(0, 0, "", 0, 0), 0.1) == []
