"""Rank 0's loop: requests in, plans out, results back, outputs out. Single-threaded; owns the order of events.

    frontend --Add/Abort/Truncate--> scheduler --plan--> broadcast --> every other rank
                                                   |--> queue --> launched --> (own result, if rank 0 samples)
    frontend <--Delta/Done---------- scheduler <--result-- in step order, from rank 0 or the sampling rank

The loop broadcasts a plan as soon as the scheduler makes it, before the results of earlier plans are applied. With one stage,
plan n + 1 is sent while plan n runs; with several, enough plans are in flight to keep every stage busy. The scheduler decides how
many; this loop only keeps the order. It applies ready results before it launches the next plan, so a device that computes
inside `launch` (the CPU) delays no token.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from tpserve.engine.watchdog import StepWatchdog
from tpserve.observe.trace import Trace
from tpserve.process.rank_agent import RankAgent
from tpserve.scheduling.scheduler import Scheduler
from tpserve.types.messages import (
    Abort,
    Add,
    Done,
    EngineInput,
    EngineOutput,
    Pause,
    ResetPrefixCache,
    Resume,
    Stats,
    Truncate,
)
from tpserve.types.plan import StepPlan, StepResult
from tpserve.wire.channels import EngineLink, PlanBroadcaster, ResultReceiver, wait

log = logging.getLogger(__name__)

IDLE_S = 1.0
STATS_EVERY_S = 0.1


class LaunchedStep(Protocol):
    """A plan that runs on the device (`worker/model_runner.PendingStep`)."""

    def ready(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> StepResult:
        """Wait for the device and return the step's result."""


class Runner(Protocol):
    """Rank 0's own part of every plan (`worker/model_runner.ModelRunner`)."""

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Start a plan."""


class Engine:
    """Drives one scheduler and its ranks. `results` comes from the sampling rank; None: rank 0's own `runner` has the results."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        link: EngineLink,
        plans: PlanBroadcaster,
        results: ResultReceiver | None,
        rank_agent: RankAgent,
        trace: Trace,
        watchdog: StepWatchdog,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._link = link
        self._plans = plans
        self._results = results
        self._rank_agent = rank_agent
        self._trace = trace
        self._watchdog = watchdog
        self._clock = clock
        self._queue: deque[StepPlan] = deque()
        self._launched: deque[LaunchedStep] = deque()
        self._stats: Stats | None = None
        self._stats_at = 0.0

    def run(self) -> None:
        """Serve until the epoch is over or the coordinator sends Stop."""
        while not self._rank_agent.over:
            if not self.step():
                self._sleep()

    def step(self) -> bool:
        """One pass: receive, plan ahead, launch one plan, apply results, send outputs. False when there was nothing to do."""
        for message in self._link.poll(0):
            self._handle(message)
        while (plan := self._scheduler.schedule(self._clock())) is not None:
            self._plans.send(plan)
            self._watchdog.sent(plan.step, plan.num_tokens(), self._clock())
            self._trace.event("sent", plan.step)
            self._queue.append(plan)
        self._rank_agent.set_step_deadline(self._watchdog.deadline(self._clock()))
        launched = bool(self._queue)
        if launched:
            self._launch(self._queue.popleft())
        applied = self._collect()
        self._send_outputs()
        return launched or applied

    def _sleep(self) -> None:
        """Wait until there is something to do."""
        results = () if self._results is None else (self._results,)
        wait(IDLE_S, self._link, self._rank_agent, *results)
        self._rank_agent.clear()

    def _handle(self, message: EngineInput) -> None:
        now = self._clock()
        match message:
            case Add(request):
                try:
                    self._scheduler.add(request, now)
                except Exception as error:  # the request's content is bad; nothing of it is planned or sent yet
                    log.warning("request %d cannot be added", request.id, exc_info=True)
                    self._scheduler.refuse(request.id, f"the engine cannot read the request: {type(error).__name__}: {error}")
            case Abort(id):
                self._scheduler.abort(id, now)
            case Truncate(id, length):
                self._scheduler.truncate(id, length, now)
            case Pause(mode):
                self._scheduler.pause(mode)
            case Resume():
                self._scheduler.resume()
            case ResetPrefixCache():
                self._scheduler.reset_prefix_cache()

    def _launch(self, plan: StepPlan) -> None:
        with self._trace.span("run", plan.step):
            launched = self._runner.launch(plan)
        self._rank_agent.report_step(plan.step)
        if self._results is None:
            self._launched.append(launched)

    def _collect(self) -> bool:
        """Apply results that have arrived; at most one of our own, so that the next plan goes out before the next wait."""
        if self._results is not None:
            results = self._results.receive(0)
        elif self._launched and (self._launched[0].ready() or not self._queue):
            results = [self._launched.popleft().wait()]
        else:
            results = []
        for result in results:
            self._scheduler.apply(result, self._clock())
            self._watchdog.applied(self._clock())
            self._plans.retire(result.step)
            self._trace.event("applied", result.step)
        return bool(results)

    def _send_outputs(self) -> None:
        outputs: list[EngineOutput] = self._scheduler.take_outputs()
        for output in outputs:
            if isinstance(output, Done) and output.finish == "error":
                log.warning("request %d fails: %s", output.id, output.error)
        for id, different, count in self._scheduler.take_mismatches():
            log.warning("request %d is resumed: of its last %d tokens, drawn again, %d differ", id, count, different)
        now = self._clock()
        if now - self._stats_at >= STATS_EVERY_S or self._scheduler.idle or self._scheduler.paused:
            stats = self._scheduler.stats()
            if stats != self._stats:
                outputs.append(stats)
                self._stats, self._stats_at = stats, now
        if outputs:
            self._link.send(outputs)
