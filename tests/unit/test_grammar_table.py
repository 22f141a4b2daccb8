"""Grammars on rank 0: who waits, what plans say about them, when they are dropped."""

import pytest

from tpserve.scheduling.grammars import MAX_UNUSED, GrammarTable
from tpserve.scheduling.scheduler import Scheduler
from tpserve.scheduling.scheduler_config import SchedulerConfig
from tpserve.scheduling.sequence import Sequence
from tpserve.types.messages import Delta, Done
from tpserve.types.packed import pack
from tpserve.types.plan import StepPlan, StepResult
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams

LIMITS = SchedulerConfig(
    max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, num_blocks=32, block_size=8, depth=2, sync_sampling=False,
    eos_ids=(9,),
)  # fmt: skip


def request(id: int, grammar: str = "", **params: int) -> Request:
    return Request(id, pack([1, 2, 3]), EngineSamplingParams(max_tokens=5, grammar=grammar, **params), seed=0)


def sequence(id: int, grammar: str) -> Sequence:
    return Sequence.of(request(id, grammar), 64, 0.0, id)


def result(plan: StepPlan, token: int = 7, compiled: tuple[tuple[int, str], ...] = (), ends: bool = False) -> StepResult:
    chunks = plan.chunks()
    tokens = pack([token if chunk.sample else -1 for chunk in chunks])
    return StepResult(0, plan.step, tokens, grammar_ends=((0, ""),) if ends else (), compiled=compiled)


def planned(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule(0.0)
    assert plan is not None
    return plan


def test_a_sequence_waits_until_all_ranks_have_compiled_and_its_grammar_ends_it() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(request(1, "g"), 0.0)
    assert scheduler.stats().waiting == 1 and not scheduler.idle
    asked = planned(scheduler)
    assert asked.grammars.new == ((0, "g"),) and asked.grammars.asked == (0,) and not asked.slots
    assert scheduler.schedule(0.0) is None, "one question at a time"
    scheduler.apply(result(asked), 0.0)
    again = planned(scheduler)
    assert again.grammars.new == () and again.grammars.asked == (0,)
    scheduler.apply(result(again, compiled=((0, ""),)), 0.0)
    admission = planned(scheduler)
    (new,) = admission.new_sequences
    assert new.grammar == 0 and new.params.grammar == "" and admission.grammars.asked == ()
    scheduler.apply(result(admission, ends=True), 0.0)
    delta, done = scheduler.take_outputs()
    assert isinstance(delta, Delta) and isinstance(done, Done)
    assert (done.finish, done.num_tokens, done.by_grammar) == ("stop", 1, True)


def test_others_are_planned_while_one_waits() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(request(1, "g"), 0.0)
    scheduler.add(request(2), 0.0)
    first = planned(scheduler)
    assert len(first.new_sequences) == 1 and first.grammars.asked == (0,)
    second = planned(scheduler)
    assert second.slots and second.grammars.asked == (0,)
    scheduler.apply(result(first, compiled=((0, ""),)), 0.0)
    scheduler.apply(result(second, compiled=((0, ""),)), 0.0)
    assert any(new.grammar == 0 for new in planned(scheduler).new_sequences)


def test_a_failure_answers_all_that_waited_and_the_text_may_be_tried_again() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(request(1, "g"), 0.0)
    scheduler.add(request(2, "g"), 0.0)
    scheduler.apply(result(planned(scheduler), compiled=((0, "no"),)), 0.0)
    outputs = scheduler.take_outputs()
    assert [(o.id, o.finish, o.error) for o in outputs if isinstance(o, Done)] == [
        (id, "error", "the grammar cannot be compiled: no") for id in (1, 2)
    ]
    scheduler.add(request(3, "g"), 0.0)
    plan = planned(scheduler)
    assert plan.grammars.new == ((1, "g"),) and plan.grammars.dropped == (0,)


def test_an_aborted_sequence_no_longer_waits() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(request(1, "g"), 0.0)
    plan = planned(scheduler)
    scheduler.abort(1, 0.0)
    (done,) = scheduler.take_outputs()
    assert isinstance(done, Done) and done.finish == "abort"
    scheduler.apply(result(plan, compiled=((0, ""),)), 0.0)
    assert scheduler.idle and scheduler.schedule(0.0) is None


def test_an_eos_has_no_text_though_the_grammar_ends_there() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(request(1, "g"), 0.0)
    scheduler.apply(result(planned(scheduler), compiled=((0, ""),)), 0.0)
    scheduler.apply(result(planned(scheduler), token=9, ends=True), 0.0)
    done = scheduler.take_outputs()[-1]
    assert isinstance(done, Done) and (done.finish, done.by_grammar) == ("stop", False)


def test_a_grammar_that_cannot_be_followed_is_the_requests_own_error() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(request(1, "g"), 0.0)
    scheduler.apply(result(planned(scheduler), compiled=((0, ""),)), 0.0)
    plan = planned(scheduler)
    scheduler.apply(StepResult(0, plan.step, pack([7]), grammar_ends=((0, "too many items"),)), 0.0)
    done = scheduler.take_outputs()[-1]
    assert isinstance(done, Done) and (done.finish, done.by_grammar) == ("error", True)
    assert done.error == "the grammar is refused: too many items"


def test_sequences_share_a_grammar_and_the_oldest_unused_are_dropped() -> None:
    table = GrammarTable()
    first, second = sequence(0, "g0"), sequence(1, "g0")
    assert table.hold(first) and table.hold(second) and first.grammar == second.grammar == 0
    table.orders()
    assert table.compiled(0) == [first, second] and not table.hold(sequence(2, "g0"))
    dropped: list[int] = []
    for number in range(1, MAX_UNUSED + 3):
        one = sequence(10 + number, f"g{number}")
        assert table.hold(one)
        dropped += table.orders().dropped
        assert table.compiled(number) == [one]
        table.release(one)
    dropped += table.orders().dropped
    assert dropped == [1, 2], "g0 is in use"
    assert table.hold(sequence(500, "g1")) and not table.hold(sequence(501, "g4"))


@pytest.mark.parametrize("size", [1 << 20, 3 << 20])
def test_a_plan_carries_a_bounded_amount_of_text(size: int) -> None:
    table, left = GrammarTable(), 5
    for id in range(5):
        table.hold(sequence(id, str(id) * size))
    while left:
        new = table.orders().new
        assert len(new) > 0 and (len(new) == 1 or sum(len(text) for _, text in new) <= 4 << 20)
        left -= len(new)
