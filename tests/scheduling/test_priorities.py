"""Priorities: lower numbers first, then the order of arrival; and which sequences are preempted."""

import pytest
from msgspec import structs

from tests.scheduling.simulator import SimulatedDevice
from tests.scheduling.small import config, plan_of, request, run, step_result
from tpserve.scheduling.scheduler import Scheduler
from tpserve.types.messages import Done
from tpserve.types.packed import unpack
from tpserve.types.plan import StepPlan
from tpserve.types.request import Request


def ranked(id: int, priority: int, **changes: int) -> Request:
    return structs.replace(request(id, **changes), priority=priority)


def prompts(plan: StepPlan) -> list[int]:
    """Ids of the requests that a plan admits."""
    return [unpack(a.tokens)[0] // 1000 for a in plan.new_sequences]


def test_lower_numbers_are_admitted_first_and_equal_ones_in_order_of_arrival() -> None:
    scheduler = Scheduler(config(max_num_seqs=1, depth=1))
    for id, priority in enumerate([0, 7, -3, 7, 0, -3]):
        scheduler.add(ranked(id, priority, max_tokens=1), 0.0)
    order = []
    while not scheduler.idle:
        plan = plan_of(scheduler)
        order += prompts(plan)
        scheduler.apply(step_result(plan), 0.0)
    assert order == [2, 5, 0, 4, 1, 3]


def test_a_missing_slot_preempts_the_last_sequence_of_a_higher_number() -> None:
    scheduler = Scheduler(config(max_num_seqs=2))
    scheduler.add(ranked(1, 5, max_tokens=9), 0.0)
    scheduler.add(ranked(2, 5, max_tokens=9), 0.0)
    first = plan_of(scheduler)
    scheduler.add(ranked(3, 4), 0.0)
    assert scheduler.schedule(0.0) is None, "a plan in flight names them both"
    scheduler.apply(step_result(first), 0.0)
    plan = plan_of(scheduler)
    assert prompts(plan) == [3] and plan.releases == (1,) and scheduler.stats().preemptions == 1
    scheduler.add(ranked(4, 5), 0.0)
    scheduler.apply(step_result(plan), 0.0)
    assert prompts(plan_of(scheduler)) == [], "an equal number takes nothing from anybody"
    assert scheduler.stats().preemptions == 1


def test_only_as_many_as_needed_are_preempted_and_resume_in_order() -> None:
    sizes = config(num_blocks=8, max_num_seqs=8)
    scheduler, device = Scheduler(sizes), SimulatedDevice(sizes)
    for id in (1, 2, 3):
        scheduler.add(ranked(id, 9, prompt_len=7, max_tokens=2), 0.0)
    device.submit(plan_of(scheduler), 0.0)
    scheduler.add(ranked(4, 1, prompt_len=20, max_tokens=4), 1.0)
    scheduler.apply(device.collect(9.0), 9.0)
    plans = [plan_of(scheduler)]
    device.submit(plans[0], 9.0)
    assert prompts(plans[0]) == [4] and scheduler.stats().preemptions == 2, "five blocks are needed, two were free"
    plans += run(scheduler, device)
    assert [id for plan in plans[1:] for id in prompts(plan)] == [2, 3]
    assert [o.finish for o in scheduler.take_outputs() if isinstance(o, Done)] == ["length"] * 4


def test_no_preemption_that_frees_too_few_blocks() -> None:
    """Preemption would free too few blocks, so the request waits for sequences of its own number."""
    scheduler = Scheduler(config(num_blocks=8))
    scheduler.add(ranked(1, 0, prompt_len=19, max_tokens=2), 0.0)
    scheduler.add(ranked(2, 9, prompt_len=3, max_tokens=2), 0.0)
    scheduler.apply(step_result(plan_of(scheduler)), 0.0)
    scheduler.add(ranked(3, 0, prompt_len=17, max_tokens=2), 0.0)
    assert prompts(plan_of(scheduler)) == [] and scheduler.stats().preemptions == 0


def test_a_shortage_preempts_the_highest_number_whenever_it_arrived() -> None:
    scheduler = Scheduler(config(num_blocks=6, block_size=2, depth=1))
    for id, priority in ((1, 2), (2, 0), (3, 1)):
        scheduler.add(ranked(id, priority, prompt_len=1, max_tokens=7), 0.0)
    while not scheduler.stats().preemptions:
        plan = plan_of(scheduler)
        scheduler.apply(step_result(plan), 0.0)
    assert scheduler.stats().waiting == 1
    scheduler.abort(1, 0.0)
    assert scheduler.stats().waiting == 0, "it was the one of priority 2"


def test_prompts_in_progress_are_computed_in_order() -> None:
    scheduler = Scheduler(config(max_num_batched_tokens=8, depth=1))
    scheduler.add(ranked(1, 3, prompt_len=6), 0.0)
    scheduler.add(ranked(2, 3, prompt_len=30), 0.0)
    scheduler.apply(step_result(plan_of(scheduler)), 0.0)
    scheduler.add(ranked(3, 1, prompt_len=30), 0.0)
    plan = plan_of(scheduler)
    scheduler.apply(step_result(plan), 0.0)
    assert list(unpack(plan.counts)) == [1, 7], "a started prompt is not interrupted while there is room for both"


@pytest.mark.parametrize(("owner", "waits"), [(0, True), (1, True), (2, False)])
def test_a_sequence_waits_for_a_prefix_of_equal_or_higher_priority_only(owner: int, waits: bool) -> None:
    scheduler = Scheduler(config())
    first = ranked(1, owner, prompt_len=9)
    scheduler.add(first, 0.0)
    plan_of(scheduler)
    scheduler.add(structs.replace(first, id=2, priority=1), 0.0)
    plan = plan_of(scheduler)
    assert len(plan.new_sequences) == (not waits)
