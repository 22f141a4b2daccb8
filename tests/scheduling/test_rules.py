"""The rules of plans in flight, one at a time, on histories small enough to read."""

from itertools import pairwise
from typing import Any

import pytest
from msgspec import structs

from tests.scheduling.simulator import SimulatedDevice, SimulatedWorker, continuation
from tests.scheduling.small import config, plan_of, request, run, slots, step_result
from tpserve.scheduling.scheduler import Scheduler
from tpserve.types.messages import Delta, Done, PhaseTimes
from tpserve.types.packed import pack, unpack
from tpserve.types.plan import Chunk, NewSequence, StepPlan
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams
from tpserve.wire import codec


def test_without_pipelining_a_plan_is_sent_before_the_result_it_continues_is_applied() -> None:
    scheduler, device = Scheduler(config()), SimulatedDevice(config())
    scheduler.add(request(1, max_tokens=20), 0.0)
    plans = run(scheduler, device)
    assert len(plans) == 20
    for plan, after in pairwise(plans):
        assert device.sent_s[after.step] < device.applied_s[plan.step]
    for span, after_span in pairwise(device.spans):
        assert span.end_s == after_span.start_s, "the device never waits for the host"


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_under_pipelining_stage_0_runs_the_next_plan_while_the_last_stage_runs_this_one(stages: int) -> None:
    sizes = config(depth=stages + 1, sync_sampling=True)
    scheduler, device = Scheduler(sizes), SimulatedDevice(sizes, stages=stages)
    for id in range(8):
        scheduler.add(request(id, max_tokens=20), 0.0)
    plans = run(scheduler, device)
    last_ends = {s.step: s.end_s for s in device.spans if s.stage == stages - 1}
    first_starts = {s.step: s.start_s for s in device.spans if s.stage == 0}
    steady = [(p.step, n.step) for p, n in pairwise(plans)][1:-stages]
    assert len(steady) > 20
    assert all(first_starts[after] < last_ends[step] for step, after in steady)
    busy = [s for s in device.spans if s.stage == 0 and s.step in {step for step, _ in steady}]
    assert all(s.end_s == after.start_s for s, after in pairwise(busy)), "the way back to rank 0 is hidden"


def test_decodes_are_spread_over_the_plans_in_flight() -> None:
    sizes = config(depth=3, sync_sampling=True)
    scheduler = Scheduler(sizes)
    for id in range(7):
        scheduler.add(request(id, max_tokens=9), 0.0)
    scheduler.apply(step_result(plan_of(scheduler)), 0.0)
    assert [len(slots(plan_of(scheduler))) for _ in range(3)] == [3, 2, 2]
    assert scheduler.schedule(0.0) is None, "three plans are in flight"


def test_a_sampled_token_comes_back_in_the_next_chunk_under_pipelining() -> None:
    scheduler = Scheduler(config(depth=3, sync_sampling=True))
    scheduler.add(request(1), 0.0)
    plan = plan_of(scheduler)
    assert plan.chunks() == [Chunk(0, 0, 4, True)]
    assert scheduler.schedule(0.0) is None, "its token is not back"
    scheduler.apply(step_result(plan, token=7), 0.0)
    assert plan_of(scheduler).chunks() == [Chunk(0, 4, 1, True, (7,), ((1,),))]


def test_prefill_chunks_follow_each_other_and_decodes_go_first() -> None:
    scheduler = Scheduler(config(max_num_batched_tokens=6))
    scheduler.add(request(1, prompt_len=2, max_tokens=9), 0.0)
    scheduler.add(request(2, prompt_len=10), 0.0)
    first, second = plan_of(scheduler), plan_of(scheduler)
    assert first.chunks() == [Chunk(0, 0, 2, True), Chunk(1, 0, 4, False)]
    assert second.chunks() == [Chunk(0, 2, 1, True), Chunk(1, 4, 5, False)]
    scheduler.apply(step_result(first), 0.0)
    assert plan_of(scheduler).chunks() == [Chunk(0, 3, 1, True), Chunk(1, 9, 1, True)]


def test_known_ends_are_never_planned_past() -> None:
    scheduler = Scheduler(config(max_model_len=6))
    scheduler.add(request(1, prompt_len=4, max_tokens=50), 0.0)
    plans = [plan_of(scheduler), plan_of(scheduler)]
    for plan in plans:
        scheduler.apply(step_result(plan), 0.0)
        assert scheduler.schedule(0.0) is None
    assert [type(o) for o in scheduler.take_outputs()] == [Delta, Delta, Done]


def test_a_stop_drops_later_tokens_and_keeps_the_slot_until_they_arrive() -> None:
    scheduler = Scheduler(config(eos_ids=(3,), max_num_seqs=1))
    scheduler.add(request(1), 0.0)
    scheduler.add(request(2), 0.0)
    first, second = plan_of(scheduler), plan_of(scheduler)
    scheduler.apply(step_result(first, token=3), 0.0)
    delta, done = scheduler.take_outputs()
    assert delta == Delta(1, 0, (3,)) and isinstance(done, Done) and (done.finish, done.stop_id) == ("stop", None)
    assert scheduler.schedule(0.0) is None, "the second plan still names the only slot"
    scheduler.apply(step_result(second), 0.0)
    assert scheduler.take_outputs() == []
    third = plan_of(scheduler)
    assert third.releases == (0,) and [a.slot for a in third.new_sequences] == [0], "released and taken in one plan"


@pytest.mark.parametrize(
    ("params", "finish", "stop_id"),
    [
        ({}, "stop", None),
        ({"ignore_eos": True}, "length", None),
        ({"stop_token_ids": (5,)}, "stop", None),
        ({"stop_token_ids": (5,), "ignore_eos": True}, "stop", 5),
        ({"stop_token_ids": (6,), "ignore_eos": True}, "length", None),
    ],
)
def test_what_ends_a_sequence(params: dict[str, Any], finish: str, stop_id: int | None) -> None:
    scheduler = Scheduler(config(eos_ids=(5,), depth=1))
    scheduler.add(request(1, max_tokens=1 + (finish == "stop"), **params), 0.0)
    scheduler.apply(step_result(plan_of(scheduler), token=5), 0.0)
    done = scheduler.take_outputs()[-1]
    assert isinstance(done, Done) and (done.finish, done.stop_id, done.num_tokens) == (finish, stop_id, 1)


def test_an_abort_frees_blocks_within_a_step() -> None:
    scheduler = Scheduler(config())
    scheduler.add(request(1), 0.0)
    plan = plan_of(scheduler)
    scheduler.abort(1, 0.0)
    assert scheduler.stats().blocks_used == 1, "a plan in flight writes to it"
    scheduler.apply(step_result(plan), 0.0)
    assert scheduler.stats().blocks_used == 0 and scheduler.idle
    scheduler.add(request(2), 0.0)
    scheduler.apply(step_result(plan_of(scheduler)), 0.0)
    scheduler.abort(2, 0.0)
    assert scheduler.stats().blocks_used == 0, "nothing in flight: at once"
    scheduler.abort(2, 0.0)
    scheduler.abort(77, 0.0)
    assert [o.finish for o in scheduler.take_outputs() if isinstance(o, Done)] == ["abort", "abort"]


def test_a_truncated_request_counts_the_tokens_of_its_client() -> None:
    scheduler = Scheduler(config(depth=1))
    scheduler.add(request(1, max_tokens=9), 0.0)
    for _ in range(4):
        scheduler.apply(step_result(plan_of(scheduler)), 0.0)
    scheduler.truncate(1, 2, 0.0)
    scheduler.truncate(1, 1, 0.0)
    done = scheduler.take_outputs()[4:]
    assert len(done) == 1 and isinstance(done[0], Done) and (done[0].finish, done[0].num_tokens) == ("stop", 2)


def test_a_shortage_waits_for_results_and_then_preempts_the_youngest() -> None:
    scheduler = Scheduler(config(num_blocks=6, block_size=2))
    for id in (1, 2, 3):
        scheduler.add(request(id, prompt_len=1, max_tokens=7), 0.0)
    flights = [plan_of(scheduler), plan_of(scheduler)]
    for _ in range(2):  # positions 2 and 3 of each take the other three blocks
        scheduler.apply(step_result(flights.pop(0)), 0.0)
        flights.append(plan_of(scheduler))
    assert scheduler.stats().blocks_used == 6
    scheduler.apply(step_result(flights.pop(0)), 0.0)
    assert scheduler.schedule(0.0) is None, "a plan is in flight: its result may end somebody"
    assert scheduler.stats().preemptions == 0
    scheduler.apply(step_result(flights.pop(0)), 0.0)
    plan = plan_of(scheduler)
    assert slots(plan) == [0, 1] and plan.releases == (2,)
    assert (scheduler.stats().preemptions, scheduler.stats().waiting) == (1, 1)


def test_a_preempted_sequence_resumes_first_and_keeps_its_output() -> None:
    sizes = config(num_blocks=6, block_size=2, max_num_seqs=3)
    scheduler, device = Scheduler(sizes), SimulatedDevice(sizes)
    for id in range(4):
        scheduler.add(request(id, prompt_len=1, max_tokens=5), 0.0)
    plans = run(scheduler, device)
    admitted = [(a.tokens, a.prompt_len) for p in plans for a in p.new_sequences]
    assert [len(unpack(tokens)) for tokens, _ in admitted] == [1, 1, 1, 5, 1] and {n for _, n in admitted} == {1}
    assert [o.id for o in scheduler.take_outputs() if isinstance(o, Done)] == [0, 1, 2, 3]


def test_an_admission_reserves_a_block_for_each_growing_sequence() -> None:
    scheduler = Scheduler(config(num_blocks=4, block_size=2))
    scheduler.add(request(1, prompt_len=4, max_tokens=4), 0.0)
    scheduler.add(request(2, prompt_len=4, max_tokens=4), 0.0)
    assert len(slots(plan_of(scheduler))) == 1, "both prompts fit, and their first decodes would not"


def test_admissions_of_one_long_cached_prefix_fit_their_frames() -> None:
    """256 copies of a prompt of 70,000 tokens are 72 MB; a frame holds 64 MiB."""
    sizes = config(
        max_num_seqs=257, max_num_batched_tokens=80_000, max_model_len=80_000, num_blocks=2000, block_size=100, depth=1
    )
    scheduler, prompt = Scheduler(sizes), pack(range(70_000))
    scheduler.add(Request(0, prompt, EngineSamplingParams(max_tokens=20), seed=0), 0.0)
    scheduler.apply(step_result(plan_of(scheduler)), 0.0)
    for id in range(1, 257):
        scheduler.add(Request(id, prompt, EngineSamplingParams(max_tokens=20), seed=id), 0.0)
    admitted = []
    while sum(admitted) < 256:
        plan = plan_of(scheduler)
        assert len(codec.PLAN.encode([plan])) < codec.PLAN.max_bytes
        admitted.append(len(plan.new_sequences))
        scheduler.apply(step_result(plan), 0.0)
    assert len(admitted) == 3 and min(admitted) > 0


def test_an_admission_larger_than_its_share_of_a_plan_is_refused_and_the_next_one_served() -> None:
    scheduler = Scheduler(config(max_admission_bytes=300))
    scheduler.add(request(1, allowed_token_ids=tuple(range(1000))), 0.0)
    scheduler.add(request(2), 0.0)
    (done,) = scheduler.take_outputs()
    assert isinstance(done, Done) and done.finish == "error" and "bytes of a plan" in done.error
    assert len(plan_of(scheduler).new_sequences) == 1


HOSTILE: dict[str, dict[str, Any]] = {
    "a token": {"prompt": pack([1, 1000])},
    "stop_token_ids": {"stop_token_ids": (-1,)},
    "logit_bias": {"logit_bias": ((5, 1.0), (5, 2.0))},
    "logit_bias ": {"logit_bias": ((1000, 1.0),)},
    "allowed_token_ids": {"allowed_token_ids": (-1,)},
    "bad_words": {"bad_words": ((),)},
    "bad_words ": {"bad_words": ((3, 2**40),)},
    "a sampling parameter": {"temperature": float("nan")},
    "a sampling parameter ": {"top_p": 0.0},
    "repetition_penalty": {"repetition_penalty": 0.0},
    "a count": {"max_tokens": -1},
    "a count ": {"top_k": 2**40},
    "logprobs": {"prompt_logprobs": 21},
    "the seed": {"seed": -1},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_invalid_content_is_refused_before_it_is_planned(name: str) -> None:
    fields = dict(HOSTILE[name])
    prompt, seed = fields.pop("prompt", pack([1, 2])), fields.pop("seed", 0)
    scheduler = Scheduler(config(vocab_size=1000))
    scheduler.add(Request(1, prompt, EngineSamplingParams(**fields), seed), 0.0)
    (done,) = scheduler.take_outputs()
    assert isinstance(done, Done) and done.finish == "error" and done.error.startswith(name.strip()), done
    assert scheduler.idle


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "word"), [(0, 4, "no tokens"), (64, 1, "max_model_len 64"), (30, 4, "KV blocks")]
)
def test_what_can_never_fit_is_answered_at_once(prompt_len: int, max_tokens: int, word: str) -> None:
    scheduler = Scheduler(config(num_blocks=8))
    scheduler.add(request(1, prompt_len, max_tokens), 0.0)
    (done,) = scheduler.take_outputs()
    assert isinstance(done, Done) and done.finish == "error" and word in done.error
    assert scheduler.idle and scheduler.schedule(0.0) is None


def test_a_resubmitted_request_continues_its_counts() -> None:
    fresh = request(1, max_tokens=5)
    output = continuation(fresh, 5, 1000)
    scheduler, device = Scheduler(config()), SimulatedDevice(config())
    scheduler.add(Request(1, fresh.prompt, fresh.params, fresh.seed, output=pack(output[:3])), 0.0)
    run(scheduler, device)
    *deltas, done = scheduler.take_outputs()
    assert deltas == [Delta(1, 3, (output[3],)), Delta(1, 4, (output[4],))]
    assert isinstance(done, Done) and (done.finish, done.num_tokens) == ("length", 5)


def resumed(id: int, prompt_len: int, num_output: int) -> Request:
    fresh = request(id, prompt_len=prompt_len, max_tokens=30)
    return structs.replace(fresh, output=pack(continuation(fresh, num_output, 1000)))


def test_the_last_tokens_of_a_resumed_request_are_drawn_again() -> None:
    sizes = config(max_num_batched_tokens=10)
    scheduler, device = Scheduler(sizes), SimulatedDevice(sizes)
    scheduler.add(resumed(1, prompt_len=4, num_output=20), 0.0)
    plans = run(scheduler, device)
    assert [(chunk.start, chunk.count, chunk.redraw, chunk.sample) for plan in plans[:4] for chunk in plan.chunks()] == [
        (0, 10, 3, False), (10, 10, 10, False), (20, 4, 3, True), (24, 1, 0, True),
    ], "those of positions 8 to 23"  # fmt: skip
    assert not any(plan.redraw for plan in plans[3:])
    assert (scheduler.stats().resumed, scheduler.stats().resume_mismatches, scheduler.take_mismatches()) == (1, 0, [])


def test_a_known_token_that_differs_is_counted_and_stays() -> None:
    wrong = resumed(1, prompt_len=4, num_output=20)
    wrong = structs.replace(wrong, output=wrong.output[:-4] + pack([1000]))
    scheduler, device = Scheduler(config()), SimulatedDevice(config())
    scheduler.add(wrong, 0.0)
    scheduler.add(resumed(2, prompt_len=4, num_output=3), 0.0)
    (first, *_) = run(scheduler, device)
    assert unpack(first.new_sequences[0].tokens)[-1] == 1000
    assert (scheduler.stats().resumed, scheduler.stats().resume_mismatches) == (2, 1)
    assert scheduler.take_mismatches() == [(1, 1, 16)] and scheduler.take_mismatches() == []
    deltas = [output for output in scheduler.take_outputs() if isinstance(output, Delta) and output.id == 1]
    assert [delta.tokens[0] for delta in deltas] == continuation(wrong, 30, 1000)[20:], "it goes on from the known tokens"


def test_phase_times_and_totals() -> None:
    scheduler = Scheduler(config(depth=1))
    scheduler.add(request(1, prompt_len=4, max_tokens=3), 10.0)
    for now in (12.0, 20.0, 30.0):
        scheduler.apply(step_result(plan_of(scheduler, now)), now + 3.0)
    done, stats = scheduler.take_outputs()[-1], scheduler.stats()
    assert isinstance(done, Done) and done.times == PhaseTimes(queue_s=2.0, prefill_s=3.0, decode_s=18.0)
    assert (stats.steps, stats.prompt_tokens, stats.generation_tokens, stats.preemptions) == (3, 4, 3, 0)


def test_results_out_of_order_are_an_assertion_error() -> None:
    scheduler = Scheduler(config())
    scheduler.add(request(1), 0.0)
    plan_of(scheduler)
    with pytest.raises(AssertionError, match="step order"):
        scheduler.apply(step_result(plan_of(scheduler)), 0.0)


def sent(*chunks: Chunk, admit: int | None = None, step: int = 0, table: tuple[int, ...] = (0,)) -> StepPlan:
    new_sequences = [] if admit is None else [NewSequence(admit, pack([1, 2]), 2, EngineSamplingParams(), 0, 0, (pack(table),))]
    return StepPlan.of(0, step, chunks, new_sequences)


def test_the_simulated_worker_notices() -> None:
    """A simulated worker is only useful if it fails when a rule is broken."""
    broken = {
        "held by slots": [sent(Chunk(0, 0, 2, True), admit=0), sent(Chunk(1, 0, 2, True), admit=1, step=1)],
        "computed once": [sent(Chunk(0, 0, 2, True), admit=0), sent(Chunk(0, 1, 1, True), step=1)],
        "known or drawn": [sent(Chunk(0, 0, 3, True), admit=0)],
        "at most once": [sent(Chunk(0, 0, 1, False), Chunk(0, 1, 1, True), admit=0)],
        "in order": [sent(Chunk(0, 0, 2, True), admit=0, step=1)],
        "a chunk in its first plan": [
            StepPlan.of(0, 0, [Chunk(0, 0, 1, False)], [*sent(admit=0).new_sequences, *sent(admit=1, table=(1,)).new_sequences])
        ],
        "is taken": [sent(Chunk(0, 0, 2, True), admit=0), sent(Chunk(0, 0, 2, True), admit=0, step=1)],
    }
    for message, plans in broken.items():
        worker = SimulatedWorker(config())
        with pytest.raises(AssertionError, match=message):
            for plan in plans:
                worker.execute(plan)
