"""Random histories of arrivals, aborts, truncations, pauses and late results under tight limits, over the simulated device.

Prompts are cut from a few stems, so that prefixes are shared, now and then by all choices of a request.
Of any history must hold: every Add has one Done, its tokens and scores are those of an undisturbed run alone, nothing is held
at idle.
A history is a function of one number, which a failure prints. The device and its worker assert the rest at every plan.
`--hypothesis-profile long` runs 10,000 histories.
"""

import dataclasses
from array import array
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduling.simulator import SimulatedDevice, continuation, num_different, score
from tpserve.scheduling.scheduler import Scheduler
from tpserve.scheduling.scheduler_config import MAX_ADMISSION_BYTES, SchedulerConfig
from tpserve.types.messages import Delta, Done, EngineOutput, PromptLogprobsChunk
from tpserve.types.packed import pack, unpack
from tpserve.types.plan import MAX_REDRAWN, NewSequence, StepPlan
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams
from tpserve.types.window import first_block, max_length

VOCAB = 50
Operation = Request | tuple[str, int]
EXAMPLES = 10_000 if settings.get_current_profile_name() == "long" else 1200
STEMS = [[Random(stem).randrange(VOCAB) for _ in range(40)] for stem in range(3)]


@dataclass
class History:
    """One engine's life. Time moves by a thousandth per operation; `events` is what a replay must repeat."""

    config: SchedulerConfig
    now: float = 0.0
    requests: dict[int, Request] = field(default_factory=dict)
    outputs: dict[int, list[int]] = field(default_factory=dict)
    scores: dict[int, list[float]] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    dones: dict[int, Done] = field(default_factory=dict)
    cuts: dict[int, int] = field(default_factory=dict)
    aborted: set[int] = field(default_factory=set)
    mismatches: list[tuple[int, int, int]] = field(default_factory=list)
    events: list[StepPlan | EngineOutput] = field(default_factory=list)
    pause: str = ""
    controls: int = 0
    kept: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config)
        self.device = SimulatedDevice(self.config, hop_s=0.0, cost_s=lambda plan: 0.0, vocab_size=VOCAB)

    def add(self, request: Request) -> None:
        self.requests[request.id] = request
        self.outputs[request.id] = list(unpack(request.output))
        self.scores[request.id] = []
        self.scheduler.add(request, self._tick())
        self._take()

    def abort(self, id: int) -> None:
        if id in self.requests and id not in self.dones:
            self.aborted.add(id)
        self.scheduler.abort(id, self._tick())
        self._take()

    def cut(self, id: int) -> None:
        """A stop string found in the middle of what the frontend has seen."""
        if id not in self.requests:
            return
        length = (len(self.outputs[id]) + 1) // 2
        if id not in self.dones:
            self.cuts[id] = length
        self.scheduler.truncate(id, length, self._tick())
        self._take()

    def control(self, what: str) -> None:
        """What an operator does: `keep` and `wait` are pauses, in which nothing begins."""
        match what:
            case "keep" | "wait":
                self.pause = what
                self.scheduler.pause(what)
            case "resume":
                self.pause = ""
                self.scheduler.resume()
            case _:
                self.scheduler.reset_prefix_cache()
        self.controls += 1
        assert self.scheduler.stats().controls == self.controls
        assert self.pause or not self.scheduler.paused

    def schedule(self) -> bool:
        started = {sequence.request.id for sequence in self.scheduler._waiting if sequence.begun}
        running = self.scheduler._running.keys() | started
        plan = self.scheduler.schedule(self._tick())
        assert not self.pause or self.scheduler._running.keys() <= running, "a pause lets something begin"
        if plan is not None:
            assert self.pause != "keep"
            self.device.submit(plan, self.now)
            self.events.append(plan)
        return plan is not None

    def apply(self) -> bool:
        if not self.device.in_flight:
            return False
        result = self.device.collect(self._tick())
        self.scheduler.apply(result, self.now)
        self.mismatches += self.scheduler.take_mismatches()
        self._take()
        return True

    def run(self, max_steps: int = 100_000) -> None:
        """Schedule as far ahead as allowed, apply one result, repeat until idle."""
        for _ in range(max_steps):
            while self.schedule():
                pass
            if not self.apply():
                break
        else:
            raise AssertionError("no progress")
        assert self.scheduler.idle, "work is left and nothing is planned"

    def go_on(self) -> None:
        """Reach the pause, if there is one, and end it."""
        if self.pause:
            while self.schedule() or self.apply():
                pass
            assert self.scheduler.paused and self.scheduler.stats().paused
            assert self.pause == "keep" or not self.scheduler._running
            self.kept = len(self.scheduler._running)
            self.control("resume")

    def check(self) -> None:
        """When idle: one Done per request, the tokens of a run alone, no slot and no block in use."""
        assert self.dones.keys() == self.requests.keys()
        for id, request in self.requests.items():
            self._check_request(request, self.outputs[id], self.dones[id])
        stats = self.scheduler.stats()
        assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
        free_slots = self.scheduler._free_slots
        assert sorted(free_slots) == list(range(self.config.max_num_seqs))
        assert not self.scheduler._blocks._pending_prefixes, "a promise outlives who gave it"
        self._check_redraws()

    def _check_redraws(self) -> None:
        """The last tokens of every resubmitted request that went on were drawn again, once, and the different ones counted."""
        resumed = [request for request in self.requests.values() if request.output]
        ended_early = self.aborted | self.cuts.keys()
        went_on = [r for r in resumed if self.dones[r.id].num_tokens > len(unpack(r.output)) and r.id not in ended_early]
        redrawn = sum(sum(event.redraw) for event in self.events if isinstance(event, StepPlan))
        assert self.scheduler.stats().resumed == len(resumed)
        told = {id: (different, count) for id, different, count in self.mismatches}
        assert len(told) == len(self.mismatches), "a request is told once"
        for request in went_on:
            different = num_different(request, VOCAB)
            assert told.pop(request.id, (0, 0))[0] == different
        assert told.keys() <= ended_early
        counted = self.scheduler.stats().resume_mismatches
        least = sum(num_different(request, VOCAB) for request in went_on)
        if not ended_early:
            assert redrawn == sum(min(MAX_REDRAWN, len(unpack(request.output))) for request in went_on)
            assert counted == least
        assert least <= counted <= sum(num_different(request, VOCAB) for request in resumed)

    def _check_request(self, request: Request, output: list[int], done: Done) -> None:
        assert output == continuation(request, len(output), VOCAB), "batching changed a token"
        if done.finish == "error":
            return
        self._check_scores(request, done)
        params = request.params
        ends = (() if params.ignore_eos else self.config.eos_ids) + params.stop_token_ids
        prompt_len, resumed = len(unpack(request.prompt)), len(unpack(request.output))
        most = min(params.max_tokens, self.config.max_model_len - prompt_len)
        assert not any(token in ends for token in output[max(resumed - 1, 0) : -1]), "generated past an end"
        if request.id in self.cuts:
            assert done.finish == "stop" and done.num_tokens == self.cuts[request.id]
        elif request.id in self.aborted:
            assert done.finish == "abort" and done.num_tokens == len(output)
        else:
            assert done.num_tokens == len(output)
            stopped = bool(output) and output[-1] in ends
            assert done.finish == ("stop" if stopped else "length")
            assert stopped or len(output) == max(most, resumed)

    def _check_scores(self, request: Request, done: Done) -> None:
        prompt, scores = unpack(request.prompt), self.scores[request.id]
        wanted = request.params.prompt_logprobs is not None and not request.output
        assert scores == [score(prompt, position) for position in range(1, 1 + len(scores))]
        assert len(scores) <= wanted * (len(prompt) - 1)
        if self.outputs[request.id] or done.finish == "length":
            assert len(scores) == wanted * (len(prompt) - 1), "scores come before tokens"
        cached = self.cached.get(request.id, 0)
        assert cached <= len(prompt)
        assert not cached or (self.config.prefix_caching and not (wanted and len(prompt) > 1))

    def _take(self) -> None:
        for output in self.scheduler.take_outputs():
            self.events.append(output)
            if isinstance(output, PromptLogprobsChunk):
                assert output.id not in self.dones and not self.outputs[output.id], "scores come before tokens"
                assert output.logprobs.num_tokens, "nothing is told twice"
                assert output.start == len(self.scores[output.id]) + 1, "scores are consecutive"
                self.scores[output.id] += array("f", output.logprobs.chosen)
            elif isinstance(output, Delta):
                assert output.id not in self.dones, "a Delta after Done"
                assert output.start == len(self.outputs[output.id]), "Deltas are consecutive"
                self.outputs[output.id].extend(output.tokens)
                assert self.cached.setdefault(output.id, output.cached_tokens) == output.cached_tokens or not output.cached_tokens
            else:
                assert isinstance(output, Done) and output.id not in self.dones, "Done twice"
                self.dones[output.id] = output

    def _tick(self) -> float:
        self.now += 0.001
        return self.now


def scenario(seed: int) -> tuple[SchedulerConfig, list[Operation]]:
    """Tight limits, and 10 to 80 operations on requests; most of them, not all, can be served."""
    random = Random(seed)
    windows = tuple(random.choice([None, None, random.randint(1, 12)]) for _ in range(random.choice([1, 1, 2, 3])))
    config = SchedulerConfig(
        max_num_seqs=random.randint(1, 6),
        max_num_batched_tokens=random.randint(1, 12),
        max_model_len=random.randint(2, 28),
        num_blocks=random.randint(len(windows), 12 + 4 * len(windows)),
        block_size=random.randint(1, 4),
        depth=random.randint(1, 5),
        sync_sampling=random.random() < 0.5,
        eos_ids=random.choice([(), (3,), (3, 4, 5)]),
        windows=windows,
        prefix_caching=random.random() < 0.9,
    )
    if random.random() < 0.3:  # room for one or two admissions, now and then for none of the longest
        size = config.admission_bytes(50, config.max_model_len)
        config = dataclasses.replace(config, max_admission_bytes=round(size * random.uniform(0.9, 2.5)))
    capacity = max_length(lambda length: config.min_blocks(length - 1) <= config.num_blocks, 1, config.max_model_len)
    operations: list[Operation] = []
    patience = random.choice([0.3, 0.5, 0.7])
    for _ in range(random.randint(10, 80)):
        kind = random.random()
        if kind < 0.25:
            request = a_request(random, len(operations), capacity)
            operations += [request, *choices_of(random, request)]
        elif kind < 0.32:
            operations.append((random.choice(["abort", "cut"]), random.randint(0, 15)))
        elif kind < 0.37:
            operations.append((random.choice(["keep", "wait", "resume", "resume", "reset"]), 0))
        else:
            operations.append(("schedule" if random.random() < patience else "apply", 0))
    return config, operations


def a_request(random: Random, id: int, capacity: int) -> Request:
    """A request; sometimes one resubmitted after a crash with its output so far, sometimes one that cannot fit."""
    prompt_len = random.randint(0 if random.random() < 0.05 else 1, max(1, capacity - random.randint(0, 6)))
    room = max(capacity - prompt_len, 0)
    params = EngineSamplingParams(
        max_tokens=room + 1 if random.random() < 0.05 else random.randint(0 if random.random() < 0.1 else min(1, room), room),
        ignore_eos=random.random() < 0.3,
        stop_token_ids=random.choice([(), (), (7, 8, 9)]),
        prompt_logprobs=0 if random.random() < 0.2 else None,
    )
    shared = random.randint(0, prompt_len)
    prompt = pack(random.choice(STEMS)[:shared] + [random.randrange(VOCAB) for _ in range(prompt_len - shared)])
    priority, salt = random.choice([0, 0, 0, 1, -1]), random.choice(["", "", "", "salt"])
    fresh = Request(id, prompt, params, random.getrandbits(64), random.randint(0, 3), priority=priority, cache_salt=salt)
    resumed = random.randint(1, params.max_tokens) if params.max_tokens and random.random() < 0.2 else 0
    output = continuation(fresh, resumed, VOCAB) if prompt_len else []
    if output and random.random() < 0.3:  # corrupted on the way
        output[random.randrange(resumed)] = random.randrange(VOCAB)
    return msgspec.structs.replace(fresh, output=pack(output))


def choices_of(random: Random, request: Request) -> list[Request]:
    """Sometimes further choices of a request, which arrive with it."""
    count = random.choice([0, 0, 0, 0, 1, 3])
    return [msgspec.structs.replace(request, id=1000 * i + request.id, choice=request.choice + i) for i in range(1, count + 1)]


def play(seed: int, **changes: Any) -> History:
    """Perform the operations, then let the engine run until it is idle. `changes`: to the configuration."""
    config, operations = scenario(seed)
    history = History(dataclasses.replace(config, **changes))
    for operation in operations:
        ids = list(history.requests) or [0]
        match operation:
            case Request():
                history.add(operation)
            case "abort", number:
                history.abort(ids[number % len(ids)])
            case "cut", number:
                history.cut(ids[number % len(ids)])
            case "schedule", _:
                history.schedule()
            case "apply", _:
                history.apply()
            case what, _:
                history.control(what)
    history.go_on()
    history.run()
    return history


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 2**64 - 1))
def test_any_history_ends_as_if_each_request_ran_alone(seed: int) -> None:
    play(seed).check()


@settings(max_examples=EXAMPLES // 10, deadline=None)
@given(st.integers(0, 2**64 - 1))
def test_a_history_replays_exactly(seed: int) -> None:
    assert play(seed).events == play(seed).events


def skipped(plan: StepPlan, new_sequence: NewSequence, config: SchedulerConfig) -> int:
    """Blocks of the prefix that a window of the admitted sequence does not see."""
    (start,) = (c.start for c in plan.chunks(len(config.windows)) if c.slot == new_sequence.slot)
    return max(first_block(start, window, config.block_size) for window in config.windows)


def test_the_histories_reach_every_corner() -> None:
    """The generator is part of the test: a case that it never produces is not tested."""
    seen: Counter[str] = Counter()
    for seed in range(200):
        history = play(seed)
        seen.update(done.finish for done in history.dones.values())
        seen["preemption"] += history.scheduler.stats().preemptions
        seen["chunked"] += sum(not all(e.sample) for e in history.events if isinstance(e, StepPlan))
        seen["reuse"] += sum(
            bool({a.slot for a in e.new_sequences} & {*e.releases}) for e in history.events if isinstance(e, StepPlan)
        )
        plans = [e for e in history.events if isinstance(e, StepPlan)]
        windowed = [group for group, window in enumerate(history.config.windows) if window is not None]
        seen["window preemption"] += bool(windowed) * history.scheduler.stats().preemptions
        seen["window hit"] += sum(skipped(plan, a, history.config) > 0 for plan in plans for a in plan.new_sequences)
        seen["smaller chunk"] += sum(
            bool(windowed) and not all(p.sample) and p.num_tokens() < history.config.max_num_batched_tokens for p in plans
        )
        seen["cached"] += sum(count > 0 for count in history.cached.values())
        seen["scored"] += sum(len(scores) > 0 for scores in history.scores.values())
        if history.config.max_admission_bytes != MAX_ADMISSION_BYTES:
            seen["few bytes"] += play(seed, max_admission_bytes=MAX_ADMISSION_BYTES).events != history.events
        resumed = [r for r in history.requests.values() if r.output]
        seen["redrawn in parts"] += sum(0 < sum(p.redraw) != sum(p.redraw[i] for i, s in enumerate(p.sample) if s) for p in plans)
        seen["mismatch"] += len(history.mismatches)
        seen["resumed and preempted"] += bool(resumed) * history.scheduler.stats().preemptions
        seen["kept in a pause"] += history.kept
        seen["late"] += len(history.dones.keys() & (history.aborted | history.cuts.keys()))
    corners = (
        *("stop", "length", "abort", "error", "preemption", "chunked", "reuse", "cached", "scored", "late"),
        *("window preemption", "window hit", "smaller chunk", "few bytes"),
        *("redrawn in parts", "mismatch", "resumed and preempted", "kept in a pause"),
    )
    assert min(seen[corner] for corner in corners) > 20, seen
