"""The rules of the prefix cache one at a time: hits, pending prefixes, sharing, eviction."""

from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from tests.scheduling.simulator import SimulatedDevice, SimulatedWorker, continuation, score
from tests.scheduling.small import config, plan_of, request, run, step_result
from tpserve.scheduling.scheduler import Scheduler
from tpserve.types.messages import Delta, Done, EngineOutput, PromptLogprobsChunk
from tpserve.types.packed import pack, unpack
from tpserve.types.plan import Chunk, NewSequence, StepPlan
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams


class Engine:
    """A scheduler on the simulated device. `serve` runs requests to their ends and returns their Dones in order; `cached`
    is the number of their prompt tokens that were in the cache."""

    def __init__(self, **changes: Any) -> None:
        self.scheduler = Scheduler(config(**changes))
        self.device = SimulatedDevice(self.scheduler.config)
        self.outputs: list[EngineOutput] = []
        self.plans: list[StepPlan] = []

    def serve(self, *requests: Request) -> list[Done]:
        for item in requests:
            self.scheduler.add(item, 0.0)
        self.plans = run(self.scheduler, self.device)
        self.outputs = self.scheduler.take_outputs()
        dones = {o.id: o for o in self.outputs if isinstance(o, Done)}
        assert self.scheduler.stats().blocks_used == 0
        return [dones[item.id] for item in requests]

    def cached(self, *requests: Request) -> list[int]:
        self.serve(*requests)
        first = {o.id: o.cached_tokens for o in self.outputs if isinstance(o, Delta) and o.start == 0}
        return [first[item.id] for item in requests]

    def computed(self) -> int:
        """Number of positions that the last `serve` computed."""
        return sum(plan.num_tokens() for plan in self.plans)


def prompt(id: int, tokens: Sequence[int], **changes: Any) -> Request:
    return structs.replace(request(id), prompt=pack(tokens), **changes)


def test_a_prefix_is_found_block_by_block() -> None:
    engine = Engine()
    assert engine.cached(prompt(1, range(10))) == [0]
    assert engine.cached(prompt(2, [*range(7), 99, 99, 99])) == [4], "blocks of 4: the second differs in its end"
    assert engine.plans[0].chunks()[0] == Chunk(engine.plans[0].chunks()[0].slot, 4, 6, True)
    assert engine.cached(prompt(3, [99, *range(1, 10)])) == [0], "a block is known by all that stands before it"
    stats = engine.scheduler.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (30, 4)


def test_the_output_is_a_prefix_of_the_next_turn() -> None:
    engine, first = Engine(), prompt(1, range(6))
    engine.serve(first)
    said = continuation(first, 4, 1000)
    assert engine.cached(prompt(2, [*range(6), *said, 5])) == [8], "9 of its 10 tokens are computed, two blocks are full"


def test_a_fully_cached_prompt_computes_its_last_block_again() -> None:
    engine = Engine()
    engine.serve(prompt(1, range(8)))
    assert engine.cached(prompt(2, range(8))) == [4]
    assert engine.cached(prompt(3, range(9))) == [8]
    engine.serve(prompt(4, range(8), seed=1))
    assert engine.computed() == 4 + 3


def test_what_is_drawn_again_is_computed_again() -> None:
    engine, fresh = Engine(), structs.replace(request(1), prompt=pack(range(6)), params=EngineSamplingParams(max_tokens=30))
    engine.serve(fresh)
    resumed = structs.replace(fresh, output=pack(continuation(fresh, 24, 1000)))
    engine.serve(resumed)
    assert engine.plans[0].chunks()[0] == Chunk(engine.plans[0].chunks()[0].slot, 12, 18, True, redraw=16), "of 30 tokens"
    assert engine.computed() == 18 + 5 and engine.scheduler.stats().resume_mismatches == 0
    engine = Engine()
    short = structs.replace(resumed, prompt=pack(range(4)), output=pack(range(12)))
    engine.serve(*(structs.replace(short, id=id) for id in range(3)))
    assert len(engine.plans[0].new_sequences) == 3, "nobody waits for a block that it computes anyway"


def test_different_cache_salts_share_nothing() -> None:
    engine = Engine()
    assert engine.cached(prompt(1, range(9), cache_salt="a")) == [0]
    assert engine.cached(prompt(2, range(9))) == [0]
    assert engine.cached(prompt(3, range(9), cache_salt="b")) == [0]
    assert engine.cached(prompt(4, range(9), cache_salt="a"), prompt(5, range(9))) == [8, 8]


def test_without_the_cache_nothing_is_found_or_counted() -> None:
    engine = Engine(prefix_caching=False)
    assert engine.cached(prompt(1, range(9))) == [0]
    assert engine.cached(prompt(2, range(9)), prompt(3, range(9))) == [0, 0]
    assert engine.scheduler.stats().prefix_cache_queries == 0


def test_choices_wait_for_the_prompt_and_share_it() -> None:
    scheduler = Scheduler(config(max_num_batched_tokens=8))
    for choice in range(4):
        scheduler.add(prompt(choice, range(13), choice=choice), 0.0)
    first, second = plan_of(scheduler), plan_of(scheduler)
    assert [len(unpack(plan.slots)) for plan in (first, second)] == [1, 1], "the others wait"
    assert scheduler.stats().waiting == 3
    scheduler.apply(step_result(first), 0.0)
    scheduler.apply(step_result(second), 0.0)
    assert list(unpack(plan_of(scheduler).counts)) == [1, 1, 1, 1], "one decodes, the others compute what is no full block"
    assert scheduler.stats().blocks_used == 3 + 4, "three shared, and one each"


def test_sequences_that_wait_for_a_prefix_do_not_block_others() -> None:
    scheduler = Scheduler(config(max_num_batched_tokens=12))
    for item in (prompt(1, range(9)), prompt(2, range(9)), request(3, prompt_len=2)):
        scheduler.add(item, 0.0)
    assert list(unpack(plan_of(scheduler).counts)) == [9, 2]


@pytest.mark.parametrize("end", ["abort", "stop"])
def test_a_pending_prefix_ends_with_its_owner(end: str) -> None:
    scheduler = Scheduler(config(eos_ids=(3,), max_num_batched_tokens=4))
    scheduler.add(prompt(1, range(9)), 0.0)
    scheduler.add(prompt(2, range(9)), 0.0)
    plan = plan_of(scheduler)
    assert list(unpack(plan.starts)) == [0] and scheduler.stats().waiting == 1
    if end == "abort":
        scheduler.abort(1, 0.0)
    else:
        scheduler.truncate(1, 0, 0.0)
    assert plan_of(scheduler).chunks()[0].start == 0, "nothing is known of the block: computed again"
    scheduler.apply(step_result(plan), 0.0)
    assert scheduler.stats().running == 1


def test_a_block_is_not_shared_before_its_result_is_applied() -> None:
    scheduler = Scheduler(config(depth=3))
    scheduler.add(prompt(1, range(9), params=EngineSamplingParams(max_tokens=9)), 0.0)
    first = plan_of(scheduler)
    scheduler.add(prompt(2, range(9)), 0.0)
    assert len(unpack(plan_of(scheduler).slots)) == 1
    scheduler.apply(step_result(first), 0.0)
    chunks = plan_of(scheduler).chunks()
    assert [(c.start, c.count) for c in chunks] == [(10, 1), (8, 1)]


def test_eviction_takes_the_least_recently_used_block_and_the_end_of_a_prefix_first() -> None:
    engine = Engine(num_blocks=6, block_size=2)
    old, new = prompt(1, range(7)), prompt(2, range(50, 53))
    one = EngineSamplingParams(max_tokens=1)
    engine.serve(structs.replace(old, params=one))  # 0..5 in three blocks
    engine.serve(structs.replace(new, params=one))  # 50, 51 in one
    engine.serve(prompt(3, range(90, 97), params=one))  # three blocks and one that is thrown away: two of them were blank
    assert engine.cached(structs.replace(new, id=4, params=one)) == [2]
    assert engine.cached(structs.replace(old, id=5, params=one)) == [2], "its last two blocks gave way"


def test_a_shortage_takes_cached_blocks_before_it_preempts() -> None:
    engine = Engine(num_blocks=4)
    engine.serve(request(1, prompt_len=12))
    (done,) = engine.serve(request(2, prompt_len=4, max_tokens=12))
    assert done.finish == "length" and engine.scheduler.stats().preemptions == 0


def test_a_preempted_sequence_finds_its_blocks_in_the_cache() -> None:
    engine = Engine(num_blocks=16, block_size=2)
    engine.serve(*(request(id, prompt_len=8, max_tokens=5) for id in range(3)))
    assert engine.scheduler.stats().preemptions > 0
    readmitted = [(a, p) for p in engine.plans for a in p.new_sequences if len(unpack(a.tokens)) > a.prompt_len]
    starts = {c.slot: c.start for a, p in readmitted for c in p.chunks() if c.slot == a.slot}
    assert list(starts.values()) == [8], "the others took its last blocks only"
    assert engine.scheduler.stats().prefix_cache_queries == 24, "a preemption is no query"


def scored(outputs: list[EngineOutput], id: int) -> list[float]:
    """Scores of one request, which come in order and before its tokens."""
    values: list[float] = []
    told = [o for o in outputs if isinstance(o, PromptLogprobsChunk | Delta) and o.id == id]
    for output in told:
        if isinstance(output, PromptLogprobsChunk):
            assert output.start == len(values) + 1
            values += array("f", output.logprobs.chosen)
    assert sorted(told, key=lambda o: isinstance(o, Delta)) == told
    return values


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("prompt_len", [2, 4, 5, 21])
def test_a_prompt_is_scored_chunk_by_chunk_without_the_prefix_cache(prompt_len: int, max_tokens: int) -> None:
    engine, tokens = Engine(max_num_batched_tokens=6), range(prompt_len)
    engine.serve(prompt(1, tokens))
    params = EngineSamplingParams(max_tokens=max_tokens, prompt_logprobs=0)
    (done,) = engine.serve(prompt(2, tokens, params=params))
    assert (done.finish, done.num_tokens) == ("length", max_tokens)
    assert not any(o.cached_tokens for o in engine.outputs if isinstance(o, Delta))
    assert scored(engine.outputs, 2) == [score(tokens, position) for position in range(1, prompt_len)]
    assert engine.computed() == max(prompt_len - 1, prompt_len + max_tokens - 1 if max_tokens else 0)
    assert engine.scheduler.stats().prefix_cache_queries == prompt_len, "only the first one asked"
    assert engine.cached(prompt(3, [*tokens, 7])) == [prompt_len // 4 * 4], "but what it computes is kept"


def test_a_prompt_of_one_token_has_no_scores() -> None:
    engine = Engine()
    (done,) = engine.serve(prompt(1, [5], params=EngineSamplingParams(max_tokens=0, prompt_logprobs=0)))
    assert (done.finish, engine.outputs, engine.plans) == ("length", [done], [])


def test_prompt_logprobs_are_sent_once_across_a_preemption() -> None:
    engine = Engine(num_blocks=7, max_num_batched_tokens=3, block_size=2)
    early, late = (
        request(1, prompt_len=2, max_tokens=9),
        prompt(2, range(8), params=EngineSamplingParams(prompt_logprobs=0, max_tokens=2)),
    )
    engine.serve(early, structs.replace(late, priority=1))
    assert scored(engine.outputs, 2) == [score(range(8), position) for position in range(1, 8)]


def test_a_prompt_that_fills_the_context_can_be_scored() -> None:
    engine = Engine(max_model_len=8, num_blocks=2)
    (done,) = engine.serve(prompt(1, range(8), params=EngineSamplingParams(max_tokens=0, prompt_logprobs=0)))
    assert done.finish == "length" and len(scored(engine.outputs, 1)) == 7
    (done,) = engine.serve(prompt(2, range(9), params=EngineSamplingParams(max_tokens=0, prompt_logprobs=0)))
    assert done.finish == "error"


def sent(step: int, slot: int, table: Sequence[int], start: int, count: int) -> StepPlan:
    new_sequence = NewSequence(slot, pack(range(6)), 6, EngineSamplingParams(), 0, 0, (pack(table),))
    return StepPlan.of(0, step, [Chunk(slot, start, count, start + count == 6)], [new_sequence])


@pytest.mark.parametrize(
    ("message", "plan"),
    [
        ("does not hold what", sent(1, 1, (1, 2), 4, 2)),
        ("held by slots", sent(1, 1, (0, 1), 0, 6)),
        ("shared whole", sent(1, 1, (0, 2), 5, 1)),
    ],
)
def test_the_simulated_worker_notices_wrong_sharing(message: str, plan: StepPlan) -> None:
    worker = SimulatedWorker(config())
    worker.execute(sent(0, 0, (0, 1), 0, 6))
    with pytest.raises(AssertionError, match=message):
        worker.execute(plan)


def test_the_simulated_device_notices_early_sharing() -> None:
    device = SimulatedDevice(replace(config(), depth=2))
    device.submit(sent(0, 0, (0, 1), 0, 6), 0.0)
    with pytest.raises(AssertionError, match="before it is known to be full"):
        device.submit(sent(1, 1, (0, 2), 4, 2), 0.0)
