"""Rank 0's loop on an asynchronous device: real sockets, the simulated worker behind a thread, and the order of what happened."""

import os
import queue
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from msgspec import structs

from tests.scheduling.simulator import SimulatedWorker, continuation
from tpserve.engine.loop import Engine
from tpserve.engine.watchdog import StepWatchdog
from tpserve.observe.trace import Trace
from tpserve.scheduling.scheduler import Scheduler
from tpserve.scheduling.scheduler_config import SchedulerConfig
from tpserve.types.messages import Abort, Add, Delta, Done
from tpserve.types.packed import pack
from tpserve.types.plan import StepPlan, StepResult
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams
from tpserve.wire.channels import EngineLink, EngineServer, PlanBroadcaster

STEP_S = 0.01
LIMITS = SchedulerConfig(
    max_num_seqs=4,
    max_num_batched_tokens=16,
    max_model_len=64,
    num_blocks=32,
    block_size=4,
    depth=2,
    sync_sampling=False,
    eos_ids=(),
)


@dataclass
class Work:
    """A plan on the device's queue."""

    plan: StepPlan
    done: threading.Event = field(default_factory=threading.Event)
    result: StepResult | None = None

    def ready(self) -> bool:
        return self.done.is_set()

    def wait(self) -> StepResult:
        assert self.done.wait(5.0)
        assert self.result is not None
        return self.result


class AsyncDevice:
    """Like a GPU: `launch` returns at once, plans run one after another on a thread of their own, each for `STEP_S`."""

    def __init__(self) -> None:
        self.ended: dict[int, float] = {}
        self._worker = SimulatedWorker(LIMITS)
        self._queue: queue.SimpleQueue[Work] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def launch(self, plan: StepPlan) -> Work:
        work = Work(plan)
        self._queue.put(work)
        return work

    def _run(self) -> None:
        while True:
            work = self._queue.get()
            time.sleep(STEP_S)
            work.result = self._worker.execute(work.plan)
            self.ended[work.plan.step] = time.monotonic()
            work.done.set()


class SyncDevice(AsyncDevice):
    """Like the CPU: the plan is computed inside `launch`."""

    def launch(self, plan: StepPlan) -> Work:
        work = super().launch(plan)
        work.done.wait(5.0)
        return work


class NoCoordinator:
    """The part of RankAgent that the loop uses."""

    def __init__(self) -> None:
        self.over = False
        self._wake, self._write = os.pipe()

    def fileno(self) -> int:
        return self._wake

    def clear(self) -> None:
        pass

    def report_step(self, step: int) -> None:
        pass

    def set_step_deadline(self, due: tuple[int, float] | None) -> None:
        pass

    def end(self) -> None:
        self.over = True
        os.write(self._write, b"x")


class Log(Trace):
    """The loop's own trace, kept in memory."""

    def __init__(self) -> None:
        super().__init__(None, 0)
        self.events: list[tuple[str, int]] = []
        self.sent_s: dict[int, float] = {}

    def event(self, name: str, step: int) -> None:
        self.events.append((name, step))
        if name == "sent":
            self.sent_s[step] = time.monotonic()


@dataclass
class Bench:
    """A running engine and the frontend's end of its link."""

    server: EngineServer
    device: AsyncDevice
    trace: Log

    def until_done(self, ids: set[int], timeout_s: float = 20.0, start: int = 0) -> tuple[dict[int, list[int]], dict[int, Done]]:
        """The tokens of each request after the first `start`, and its end."""
        tokens: dict[int, list[int]] = {id: [] for id in ids}
        dones: dict[int, Done] = {}
        deadline = time.monotonic() + timeout_s
        while set(dones) < ids:
            assert time.monotonic() < deadline, f"only {dones} of {ids}"
            self.server.wait(1.0)
            for output in self.server.receive():
                if isinstance(output, Delta):
                    assert output.start == start + len(tokens[output.id])
                    tokens[output.id].extend(output.tokens)
                elif isinstance(output, Done):
                    assert output.id not in dones, "one Done for each Add"
                    dones[output.id] = output
        return tokens, dones


@pytest.fixture(params=[AsyncDevice, SyncDevice])
def bench(request: pytest.FixtureRequest, tmp_path: Path):
    server = EngineServer(f"ipc://{tmp_path}/engine")
    server.attach(1)
    link = EngineLink(server.endpoint, 1)
    link.send([Done(0, "stop", 0)])  # introduces the engine's address to the server
    while not server.receive():
        assert server.wait(5.0)
    plans = PlanBroadcaster(f"ipc://{tmp_path}/plan")
    plans.begin(0, 0, 1.0)
    control, device, trace = NoCoordinator(), request.param(), Log()
    engine = Engine(Scheduler(LIMITS), device, link, plans, None, control, trace, StepWatchdog(60.0, 60.0))  # type: ignore[arg-type]
    thread = threading.Thread(target=engine.run, daemon=True)
    thread.start()
    yield Bench(server, device, trace)
    control.end()
    thread.join(5.0)
    assert not thread.is_alive()
    for channel in (server, link, plans):
        channel.close()


def make(id: int, prompt_len: int, max_tokens: int) -> Request:
    return Request(id, pack(range(id, id + prompt_len)), EngineSamplingParams(max_tokens=max_tokens), seed=id * 7)


def test_plans_ahead_and_keeps_the_tokens(bench: Bench) -> None:
    requests = [make(i, 3 + 5 * i, 12) for i in range(1, 8)]
    bench.server.send([Add(r) for r in requests])
    tokens, dones = bench.until_done({r.id for r in requests})
    for r in requests:
        assert tokens[r.id] == continuation(r, 12, 1000)
        assert dones[r.id].finish == "length" and dones[r.id].num_tokens == 12
    order = {event: i for i, event in enumerate(bench.trace.events)}
    steps = max(step for _, step in bench.trace.events)
    ahead = [n for n in range(steps) if order["sent", n + 1] < order["applied", n]]
    assert len(ahead) > steps * 0.7, "plan n + 1 is sent before result n is applied"
    overlapped = [n for n in range(steps) if bench.trace.sent_s[n + 1] < bench.device.ended[n]]
    assert len(overlapped) > steps * 0.7, "and while plan n is still running"


def test_a_request_that_cannot_be_read_fails_alone_and_is_named_in_the_log(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """Its ids are no whole numbers; no field of a message can say so."""
    bench.server.send([Add(Request(1, b"\0" * 7, EngineSamplingParams(), seed=0)), Add(make(2, 5, 6))])
    tokens, dones = bench.until_done({1, 2})
    assert dones[1].finish == "error" and "ValueError" in dones[1].error and "request 1" in caplog.text
    assert dones[2].finish == "length" and tokens[2] == continuation(make(2, 5, 6), 6, 1000)


def test_a_resumed_request_whose_tokens_differ_is_named_in_the_log(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    right, wrong = (structs.replace(make(id, 5, 9), output=pack(continuation(make(id, 5, 9), 6, 1000))) for id in (1, 2))
    wrong = structs.replace(wrong, output=wrong.output[:-4] + pack([1001]))
    bench.server.send([Add(right), Add(wrong)])
    tokens, _ = bench.until_done({1, 2}, start=6)
    assert [tokens[r.id] for r in (right, wrong)] == [continuation(r, 9, 1000)[6:] for r in (right, wrong)]
    lines = [record.getMessage() for record in caplog.records if "resumed" in record.getMessage()]
    assert lines == ["request 2 is resumed: of its last 6 tokens, drawn again, 1 differ"]


def test_abort_frees(bench: Bench) -> None:
    bench.server.send([Add(make(1, 5, 50)), Add(make(2, 5, 6))])
    bench.server.send([Abort(1)])
    _, dones = bench.until_done({1, 2})
    assert dones[1].finish == "abort" and dones[2].finish == "length"
