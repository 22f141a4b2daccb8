"""The whole service under random schedules of faults (`tests.simulation.world` has what must hold), and defects that they find.

The mutants are defects put into the code on purpose: a simulation that does not notice them would prove nothing.
"""

from collections.abc import Callable, Iterator, Sequence

import pytest
from msgspec.structs import replace

from tests.simulation.schedule import run_schedule
from tests.simulation.world import quiet
from tpserve.coordinator import coordinator, restart_intensity
from tpserve.coordinator.coordinator import Coordinator
from tpserve.coordinator.roster import Member, Roster
from tpserve.engine.watchdog import StepWatchdog
from tpserve.engine_client import quarantine, recovery
from tpserve.engine_client.requests import RequestTable
from tpserve.process import exit_rules
from tpserve.types.messages import Add, EngineOutput, Stop
from tpserve.wire.channels import EngineServer

NUM_SCHEDULES, BLOCK = 2000, 100
MUTANT_SCHEDULES = 300
Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(autouse=True)
def without_a_log() -> Iterator[None]:
    quiet()
    yield
    quiet(False)


@pytest.mark.parametrize("first", range(0, NUM_SCHEDULES, BLOCK))
def test_schedules(first: int) -> None:
    for seed in range(first, first + BLOCK):
        check(seed)


def check(seed: int, size: int | None = None) -> None:
    """Run one schedule; a failure names it."""
    try:
        run_schedule(seed, size)
    except Exception as error:
        command = f"python -m tests.simulation.schedule --seed {seed}" + (f" --size {size}" if size else "")
        raise AssertionError(f"{command}: {error}") from error


def test_a_schedule_repeats() -> None:
    for seed in range(5):
        assert run_schedule(seed) == run_schedule(seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100))
def test_schedules_of_1024_ranks(seed: int) -> None:
    check(seed, 1024)


# Mutants


def old_incarnations_count(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Roster, "is_current", Roster.in_world)


def an_incarnation_takes_part_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Member, "over", property(lambda self: False, lambda self, value: None))


def resubmitted_without_output(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RequestTable, "_adds", lambda self, ids: [Add(self._open[id].request) for id in ids if id in self._open])


def resubmitted_with_too_little(patch: pytest.MonkeyPatch) -> None:
    real = RequestTable._adds

    def adds(self: RequestTable, ids: Sequence[int]) -> list[Add]:
        return [Add(replace(add.request, output=add.request.output[:-4])) for add in real(self, ids)]  # type: ignore[union-attr]

    patch.setattr(RequestTable, "_adds", adds)


def an_old_engine_is_heard(patch: pytest.MonkeyPatch) -> None:
    real = EngineServer.receive

    def receive(self: EngineServer) -> list[EngineOutput]:
        wanted, self._engine = self._engine, self.socket._arrived[0][0]  # type: ignore[attr-defined]
        outputs = real(self)
        self._engine = wanted
        return outputs

    patch.setattr(EngineServer, "receive", receive)


def leave_is_said_once(patch: pytest.MonkeyPatch) -> None:
    real = Coordinator._on_heartbeat
    patch.setattr(Coordinator, "_on_heartbeat", lambda self, *event: real(self, *event) and [])


def start_is_said_once(patch: pytest.MonkeyPatch) -> None:
    real = Coordinator._on_hello

    def on_hello(self: Coordinator, peer: object, message: object, now: float) -> list[object]:
        again = self.state is not coordinator.EpochState.FORMING
        actions = real(self, peer, message, now)  # type: ignore[arg-type]
        return [] if again else actions  # type: ignore[return-value]

    patch.setattr(Coordinator, "_on_hello", on_hello)


def requests_are_not_sent_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recovery.Recovery, "_resubmit", lambda self, cause: [])


def stuck_ranks_live_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(exit_rules, "BLOCKED_S", 1e9)


def silence_is_not_noticed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(coordinator, "LOST_S", 1e9)


def a_replaced_rank_ends_its_node(patch: pytest.MonkeyPatch) -> None:
    real = Coordinator.receive

    def receive(self: Coordinator, *event: object) -> list[object]:
        actions = real(self, *event)  # type: ignore[arg-type]
        return [
            replace(a, message=Stop(1, "")) if isinstance(getattr(a, "message", None), Stop) and a.message.code == 75 else a  # type: ignore[union-attr, type-var]
            for a in actions
        ]

    patch.setattr(Coordinator, "receive", receive)


def asking_for_a_restart_counts_as_a_fault(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(restart_intensity, "_OUTSIDE", restart_intensity._OUTSIDE[:2])


def an_engine_that_ends_while_it_is_greeted_fails_the_service(patch: pytest.MonkeyPatch) -> None:
    real = EngineServer.receive

    def receive(self: EngineServer) -> list[EngineOutput]:
        outputs = real(self)
        assert not (self._unsent and self._engine in self._connected), "rank 0's engine cannot be reached"
        return outputs

    patch.setattr(EngineServer, "receive", receive)


def a_loop_may_hang(patch: pytest.MonkeyPatch) -> None:
    real = StepWatchdog.deadline
    patch.setattr(StepWatchdog, "deadline", lambda self, now: real(self, now) if self._in_flight else (-1, 1e9))


def nobody_is_condemned(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(quarantine, "STRIKES", 1e9)


def a_first_fault_condemns(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(quarantine, "STRIKES", 1.0)


def quarantine_forgets_new_requests(patch: pytest.MonkeyPatch) -> None:
    """Those that come while others are under suspicion."""
    patch.setattr(quarantine.Quarantine, "_release", lambda self: [])


def requests_are_sent_twice(patch: pytest.MonkeyPatch) -> None:
    """Also to an engine whose epoch has ended, as far as the frontend knows."""
    patch.setattr(quarantine.Quarantine, "suspend", lambda self: None)
    patch.setattr(EngineServer, "detach", lambda self: None)
    patch.setattr(EngineServer, "attach", lambda self, identity: setattr(self, "_engine", b"engine-%d" % identity))


MUTANTS: tuple[Patch, ...] = (
    old_incarnations_count,
    an_incarnation_takes_part_twice,
    resubmitted_without_output,
    resubmitted_with_too_little,
    an_old_engine_is_heard,
    leave_is_said_once,
    start_is_said_once,
    requests_are_not_sent_again,
    stuck_ranks_live_on,
    silence_is_not_noticed,
    a_replaced_rank_ends_its_node,
    asking_for_a_restart_counts_as_a_fault,
    an_engine_that_ends_while_it_is_greeted_fails_the_service,
    a_loop_may_hang,
    nobody_is_condemned,
    a_first_fault_condemns,
    quarantine_forgets_new_requests,
    requests_are_sent_twice,
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_defect_is_found(mutant: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    size = 16 if mutant is asking_for_a_restart_counts_as_a_fault else None
    first = 580 if mutant is an_old_engine_is_heard else 0  # one in a hundred finds it
    for seed in range(first, first + MUTANT_SCHEDULES):
        try:
            run_schedule(seed, size)
        except Exception:
            return
    raise AssertionError(f"{MUTANT_SCHEDULES} schedules do not find it")
