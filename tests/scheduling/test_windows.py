"""Rules of cache groups with a window, one at a time: allocation, freeing, prefix cache."""

from collections.abc import Sequence

import pytest
from msgspec import structs

from tests.scheduling.simulator import SimulatedDevice, SimulatedWorker
from tests.scheduling.small import config, plan_of, request, run, step_result
from tests.scheduling.test_prefixes import Engine, prompt
from tpserve.scheduling.scheduler import Scheduler
from tpserve.types.messages import Done
from tpserve.types.packed import pack, unpack
from tpserve.types.plan import Chunk, NewSequence, StepPlan
from tpserve.types.sampling import EngineSamplingParams
from tpserve.types.window import blocks_needed

ONE = EngineSamplingParams(max_tokens=1)


def peak(windows: tuple[int | None, ...], prompt_len: int, max_tokens: int, depth: int = 1, chunk: int = 8) -> int:
    """The most blocks in use while one sequence is served, blocks of 4."""
    sizes = config(windows=windows, max_num_batched_tokens=chunk, depth=depth)
    scheduler, device, most = Scheduler(sizes), SimulatedDevice(sizes), 0
    scheduler.add(request(1, prompt_len, max_tokens), 0.0)
    while not scheduler.idle:
        while plan := scheduler.schedule(0.0):
            device.submit(plan, 0.0)
        most = max(most, scheduler.stats().blocks_used)
        scheduler.apply(device.collect(1e9), 0.0)
    return most


@pytest.mark.parametrize("window", [2, 3, 4, 5, 10])
def test_a_group_allocates_its_window_and_the_chunks_in_flight(window: int) -> None:
    for depth in (1, 2, 3):
        held = peak((window,), prompt_len=60, max_tokens=1, depth=depth)
        assert held <= -(-(window - 1) // 4) + depth * 2, "what the first position of the oldest chunk sees, and the chunks"
        assert peak((window,), prompt_len=1, max_tokens=60) <= -(-(window - 1) // 4) + 1
        assert peak((None,), prompt_len=60, max_tokens=1) == 15
        assert peak((None, window), prompt_len=60, max_tokens=1, depth=depth) == 15 + held


def test_blocks_outside_the_window_are_freed_when_the_result_is_applied() -> None:
    scheduler = Scheduler(config(windows=(5,), max_num_batched_tokens=8))
    scheduler.add(request(1, prompt_len=30), 0.0)
    first, second = plan_of(scheduler), plan_of(scheduler)
    assert scheduler.stats().blocks_used == 4
    scheduler.apply(step_result(first), 0.0)
    assert scheduler.stats().blocks_used == 3, "position 8 sees 4 to 8: block 0 goes"
    scheduler.apply(step_result(second), 0.0)
    assert scheduler.stats().blocks_used == 1


@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize("windows", [(1,), (7,), (None, 5), (4, None, 9), (2, 3), (30, None)])
def test_a_sequence_alone_completes_with_min_blocks(windows: tuple[int | None, ...], block_size: int) -> None:
    for prompt_len, max_tokens in ((1, 25), (25, 1), (13, 13)):
        num_blocks = blocks_needed(25, windows, block_size)
        for depth in (1, 3):
            sizes = config(windows=windows, num_blocks=num_blocks, block_size=block_size, depth=depth, sync_sampling=depth == 3)
            scheduler = Scheduler(sizes)
            for id in (1, 2):
                scheduler.add(request(id, prompt_len, max_tokens), 0.0)
            run(scheduler, SimulatedDevice(sizes))
            assert [o.finish for o in scheduler.take_outputs() if isinstance(o, Done)] == ["length"] * 2
        scheduler = Scheduler(config(windows=windows, num_blocks=max(1, num_blocks - 1), block_size=block_size))
        if num_blocks == 1:
            continue
        scheduler.add(request(1, prompt_len, max_tokens), 0.0)
        (done,) = scheduler.take_outputs()
        assert isinstance(done, Done) and f"needs {num_blocks} KV blocks and there are {num_blocks - 1}" in done.error


def test_a_window_leaves_room_for_others() -> None:
    """With equal blocks, two groups without windows run two of these sequences; one with and one without a window run four."""
    together = []
    for windows in ((None, None), (None, 4)):
        scheduler = Scheduler(config(windows=windows, num_blocks=56, depth=1, max_num_batched_tokens=40))
        for id in range(6):
            scheduler.add(request(id, prompt_len=36, max_tokens=12), 0.0)
        most = 0
        while not scheduler.idle:
            scheduler.apply(step_result(plan_of(scheduler)), 0.0)
            most = max(most, scheduler.stats().running)
        assert scheduler.stats().preemptions == 0
        together.append(most)
    assert together == [2, 4]


def test_a_prefill_short_of_blocks_gets_a_smaller_chunk_or_waits() -> None:
    scheduler = Scheduler(config(windows=(8,), num_blocks=7, max_num_batched_tokens=16, depth=3))
    scheduler.add(request(1, prompt_len=60), 0.0)
    first, second = plan_of(scheduler), plan_of(scheduler)
    assert [c.count for plan in (first, second) for c in plan.chunks()] == [16, 12]
    assert scheduler.schedule(0.0) is None, "results will give blocks back"
    scheduler.apply(step_result(first), 0.0)
    assert [(c.start, c.count) for c in plan_of(scheduler).chunks()] == [(28, 8)]
    assert scheduler.stats().preemptions == 0


def test_a_prefill_without_blocks_does_not_stop_others() -> None:
    scheduler = Scheduler(config(windows=(8,), num_blocks=8, max_num_batched_tokens=40, depth=2))
    scheduler.add(request(1, prompt_len=4, max_tokens=8), 0.0)
    scheduler.add(request(2, prompt_len=60), 0.0)
    first = plan_of(scheduler)
    assert list(unpack(first.counts)) == [4, 24], "one block is left for the first to grow"
    assert list(unpack(plan_of(scheduler).counts)) == [1]
    scheduler.apply(step_result(first), 0.0)
    assert list(unpack(plan_of(scheduler).counts)) == [1, 16]


def test_a_prompt_is_admitted_when_its_window_fits() -> None:
    """A window of eight requires three blocks for any prompt; the first chunk then uses the blocks that are free."""
    for num_blocks, counts in ((4, [1]), (5, [1, 12]), (6, [1, 16]), (9, [1, 23])):
        scheduler = Scheduler(config(windows=(8,), num_blocks=num_blocks, max_num_batched_tokens=24))
        scheduler.add(request(1, prompt_len=1, max_tokens=30), 0.0)
        scheduler.add(request(2, prompt_len=60, max_tokens=1), 0.0)
        assert list(unpack(plan_of(scheduler).counts)) == counts, "one block is taken, one is left for the first to grow"


def table_of(plan: StepPlan, group: int) -> list[int]:
    return list(unpack(plan.new_sequences[0].tables[group]))


def test_a_prefix_is_found_by_its_window() -> None:
    engine = Engine(windows=(None, 6), max_num_batched_tokens=8)
    engine.serve(prompt(1, range(30), params=ONE))
    assert engine.cached(prompt(2, [*range(24), 99], params=ONE)) == [24]
    plan = engine.plans[0]
    assert 0 not in table_of(plan, 0)[1:] and table_of(plan, 1)[:4] == [0] * 4, "position 24 sees 19 to 24"
    assert engine.cached(prompt(3, [*range(10), 99], params=ONE)) == [8], "given back, and not needed since"


def test_a_prefix_without_its_window_is_not_shared() -> None:
    """The match is the longest prefix whose visible blocks are all cached, which may be shorter than the full group's."""
    engine = Engine(windows=(None, 6), num_blocks=16, max_num_batched_tokens=4)
    engine.serve(prompt(1, range(33), params=ONE))  # eight blocks and two
    engine.serve(prompt(2, range(100, 103), params=EngineSamplingParams(max_tokens=6)))
    shorter = prompt(3, [*range(20), 99], params=ONE)
    assert engine.cached(structs.replace(shorter, id=4)) == [0], "given back first, and taken first"
    engine = Engine(windows=(None, 6), num_blocks=16, max_num_batched_tokens=4)
    engine.serve(prompt(1, range(33), params=ONE))
    assert engine.cached(prompt(5, [*range(32), 99], params=ONE)) == [32]


def test_salts_priorities_and_choices_keep_their_rules() -> None:
    engine = Engine(windows=(4, None), max_num_batched_tokens=8)
    assert engine.cached(prompt(1, range(21), cache_salt="a"), prompt(2, range(21))) == [0, 0]
    assert engine.cached(prompt(3, range(21), cache_salt="a"), prompt(4, range(21), choice=1)) == [20, 20]
    fresh = Engine(windows=(4, None), max_num_batched_tokens=8)
    assert fresh.cached(*(prompt(choice, range(21), choice=choice) for choice in range(4))) == [0, 20, 20, 20]


def sent(step: int, slot: int, tables: Sequence[Sequence[int]], start: int, count: int, num_tokens: int = 12) -> StepPlan:
    packed = tuple(map(pack, tables))
    new_sequence = NewSequence(slot, pack(range(num_tokens)), num_tokens, EngineSamplingParams(), 0, 0, packed)
    return StepPlan.of(0, step, [Chunk(slot, start, count, start + count == num_tokens)], [new_sequence])


def more(step: int, slot: int, start: int, count: int, blocks: Sequence[Sequence[int]] = ()) -> StepPlan:
    return StepPlan.of(0, step, [Chunk(slot, start, count, False, (), tuple(map(tuple, blocks)))])


@pytest.mark.parametrize(
    ("message", "plan"),
    [
        ("held by slots and groups", sent(1, 1, [(7, 6, 5), (2, 3, 4)], 0, 12)),  # group 1 takes what group 0 holds
        ("held by slots and groups", sent(1, 1, [(7, 6, 5), (4, 9, 1)], 0, 12)),  # still in the window
        ("does not hold what", sent(1, 1, [(0, 1, 5), (0, 0, 6)], 8, 4)),  # another group's block
        ("there are no blocks", sent(1, 1, [(0, 1, 5), (0, 3, 6)], 8, 4)),
    ],
)
def test_the_simulated_worker_notices_wrong_windows(message: str, plan: StepPlan) -> None:
    worker = SimulatedWorker(config(windows=(None, 1 if "there are" in message else 2)))
    worker.execute(sent(0, 0, [(0, 1, 2), (8, 9)], 0, 8))
    with pytest.raises(AssertionError, match=message):
        worker.execute(plan)


def test_the_simulated_worker_notices_a_lost_block_of_a_window() -> None:
    """From position 8 on, a window of four no longer sees position 4, but a window of five does."""
    for window in (4, 5):
        worker = SimulatedWorker(config(windows=(window,)))
        worker.execute(sent(0, 0, [(0, 1)], 0, 8))
        worker.execute(sent(1, 1, [(0,)], 0, 4))
        worker._entries[1][0] = (0, 99)  # position 4
        if window == 4:
            worker.execute(more(2, 0, 8, 3, [(2,)]))
        else:
            with pytest.raises(AssertionError, match="does not hold the sequence"):
                worker.execute(more(2, 0, 8, 3, [(2,)]))


def test_the_simulated_device_notices_an_early_free() -> None:
    """Until the result arrives, blocks that the first position in flight sees stay allocated."""
    for window, applied, early in ((5, False, True), (4, True, False), (4, False, True)):
        device = SimulatedDevice(config(windows=(window,), depth=3))
        device.submit(sent(0, 0, [(0, 1)], 0, 8), 0.0)
        device.submit(more(1, 0, 8, 3, [(2,)]), 0.0)
        if applied:
            device.collect(1e9)
        if early:
            with pytest.raises(AssertionError, match="in flight was allocated"):
                device.submit(sent(2, 1, [(0,)], 0, 4), 0.0)
        else:
            device.submit(sent(2, 1, [(0,)], 0, 4), 0.0)
