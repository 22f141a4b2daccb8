"""`tpserve bench step`: what a decode step costs rank 0 on the CPU, beside the model.

Makes the calls of engine/loop in their order, on the scheduler, broadcaster and slots that serve, with plans in flight as there.

    schedule   Scheduler.schedule until it has no plan to give
    broadcast  PlanBroadcaster.send, which encodes the plan and hands it to ZeroMQ's thread
    build      Slots.update, worker.input_batch.build and worker.logits_rows.sampled, tensors on the CPU
    apply      Scheduler.apply and take, PlanBroadcaster.retire
    encode     the part of the encoding in `broadcast`, measured by doing it once more

`total` is the sum of the first four in each step; `cpu` is what this thread spent of it on a core, which is less where others
wanted the core too, ZeroMQ's thread among them. Not in it: the model and the draw, which a fake device leaves out, and what
passes between rank 0 and the frontend. The fake takes `DEVICE_S` a step, without which no receiver could keep up.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch

from tpserve.bench.report import BenchReport, MachineInfo, check, percentile
from tpserve.scheduling.scheduler import Scheduler
from tpserve.scheduling.scheduler_config import SchedulerConfig
from tpserve.types.packed import pack
from tpserve.types.plan import StepPlan, StepResult
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams
from tpserve.wire import codec
from tpserve.wire.channels import PlanBroadcaster, TcpEndpoint, tcp
from tpserve.wire.curve import ConnectInfo, Keyring, ZapAuthenticator, rank_role
from tpserve.worker import device as devices
from tpserve.worker.input_batch import ChunkTensors, build_model_input
from tpserve.worker.logits_chunking import LogitsChunking
from tpserve.worker.logits_rows import sample_batches
from tpserve.worker.request_pool import RequestPool

PHASES = ("schedule", "encode", "broadcast", "build", "apply")
COUNTED = ("schedule", "broadcast", "build", "apply")
BOUND_MS, BOUND_MS_AT_256 = 0.3, 2.5
"""What a step at batch 1 and at batch 256 should stay below; between and beyond, the line through both."""
WARM_UP = 50
DEVICE_S = 0.002
VOCAB_SIZE, BLOCK_SIZE = 32_000, 16
CONNECT_S = 30.0


class Percentiles(msgspec.Struct, frozen=True):
    """Half of the steps took at most `p50_ms`, all but a hundredth at most `p99_ms`."""

    p50_ms: float
    p99_ms: float

    @staticmethod
    def of(seconds: Sequence[float]) -> "Percentiles":
        ordered = sorted(seconds)
        p50, p99 = (round(percentile(ordered, share) * 1e3, 4) for share in (0.5, 0.99))
        return Percentiles(p50, p99)


class StepCase(msgspec.Struct, frozen=True):
    """One row of the table. `holds`: the median of the total is below the bound."""

    batch: int
    subscribers: int
    plan_bytes: int
    phases: dict[str, Percentiles]
    total: Percentiles
    total_cpu: Percentiles
    bound_ms: float
    holds: bool


def run(
    *, batch: tuple[int, ...], context: int, subscribers: tuple[int, ...], steps: int, transport: str, output: Path | None
) -> int:
    """Measure every batch with every number of subscribers; returns the exit code: 0, bounds or not."""
    if output is not None:
        check("--output", output)
    devices.choose("cpu", 0, 1)
    machine = MachineInfo.here()
    sys.stdout.write(_heading(context, steps, transport, machine))
    cases = []
    for num_sequences in batch:
        for num_subscribers in subscribers:
            cases.append(measure(num_sequences, context, num_subscribers, steps, transport))
            sys.stdout.write(_row(cases[-1]))
            sys.stdout.flush()
    if output is not None:
        workload = {"batch": batch, "subscribers": subscribers, "context": context, "steps": steps, "transport": transport}
        BenchReport.of("step", machine, ("torch", "pyzmq"), workload, {"cases": cases}).write(output)
    return 0


def measure(batch: int, context: int, num_subscribers: int, steps: int, transport: str) -> StepCase:
    """`steps` decode steps of `batch` sequences, with a broadcast to `num_subscribers`."""
    with tempfile.TemporaryDirectory(prefix="tpserve-bench-") as directory:
        keyring, over_tcp = Keyring.open(None), transport == "tcp"
        curve_server = keyring.curve_server(rank_role(0), 2)
        plans = PlanBroadcaster(f"ipc://{directory}/plan", TcpEndpoint(tcp("127.0.0.1"), curve_server) if over_tcp else None)
        zap_authenticator = ZapAuthenticator(curve_server.allowed)
        connect_info = keyring.connect_info(plans.remote_endpoint if over_tcp else plans.endpoint, with_secret=True)
        with _subscribers(connect_info, num_subscribers):
            plans.begin(0, num_subscribers, CONNECT_S)
            rank = StepBench(plans, batch, context, steps)
            for _ in range(WARM_UP):
                rank.step()
            turns = [rank.step() for _ in range(steps)]
            plan_bytes = rank.plan_bytes
        zap_authenticator.close()
        plans.close()
    total = Percentiles.of([sum(turn.wall_s[phase] for phase in COUNTED) for turn in turns])
    cpu = Percentiles.of([sum(turn.cpu_s[phase] for phase in COUNTED) for turn in turns])
    bound_ms = round(BOUND_MS + (BOUND_MS_AT_256 - BOUND_MS) * (batch - 1) / 255, 3)
    phases = {phase: Percentiles.of([turn.wall_s[phase] for turn in turns]) for phase in PHASES}
    return StepCase(batch, num_subscribers, plan_bytes, phases, total, cpu, bound_ms, total.p50_ms < bound_ms)


class StepBench:
    """Rank 0 with `batch` sequences that decode for ever. Their lengths differ, as those of real ones: not all need a new
    block in the same step."""

    def __init__(self, plans: PlanBroadcaster, batch: int, context: int, steps: int) -> None:
        max_len = context + WARM_UP + steps + 3
        limits = SchedulerConfig(
            max_num_seqs=batch,
            max_num_batched_tokens=batch * context,
            max_model_len=max_len,
            num_blocks=batch * (1 + max_len // BLOCK_SIZE),
            block_size=BLOCK_SIZE,
            depth=2,
            sync_sampling=False,
            eos_ids=(),
        )
        self._plans = plans
        self._scheduler = Scheduler(limits)
        self._request_pool = RequestPool(
            batch, max_len, BLOCK_SIZE, (None,), torch.device("cpu"), eos_ids=(), vocab_size=VOCAB_SIZE
        )
        self._logits_chunking = LogitsChunking.of((range(VOCAB_SIZE),), max_len)
        self._queue: deque[StepPlan] = deque()
        self.plan_bytes = 0
        for id in range(batch):
            prompt = pack((id + position) % VOCAB_SIZE for position in range(max(1, context - id % BLOCK_SIZE)))
            self._scheduler.add(Request(id, prompt, EngineSamplingParams(max_tokens=max_len), seed=id), time.monotonic())
        self.step()  # all prompts

    def step(self) -> "PhaseTimer":
        """Plan ahead, run the oldest plan, apply its result."""
        timer = PhaseTimer()
        while (plan := self._scheduler.schedule(time.monotonic())) is not None:
            timer.mark("schedule")
            self._plans.send(plan)
            timer.mark("broadcast")
            self._queue.append(plan)
        timer.mark("schedule")
        plan = self._queue.popleft()
        with torch.inference_mode():
            self._request_pool.update(plan)
            chunks = ChunkTensors.of(plan)
            build_model_input(chunks, self._request_pool)
            sample_batches(plan, chunks, self._request_pool, self._logits_chunking)
        timer.mark("build")
        _compute()
        result = StepResult(plan.epoch, plan.step, pack([7] * len(plan.sample)))
        timer.mark("device")
        self._scheduler.apply(result, time.monotonic())
        self._plans.retire(plan.step)
        self._scheduler.take_outputs()
        timer.mark("apply")
        self.plan_bytes = len(codec.PLAN.encode([plan]))
        timer.mark("encode")
        return timer


class PhaseTimer:
    """One step's time by phase: seconds on the clock, and seconds in which this thread had a core."""

    def __init__(self) -> None:
        self.wall_s = dict.fromkeys((*PHASES, "device"), 0.0)
        self.cpu_s = dict(self.wall_s)
        self._cpu_s, self._wall_s = time.thread_time(), time.perf_counter()

    def mark(self, phase: str) -> None:
        """The time since the last lap was this phase's."""
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        self.wall_s[phase] += wall_s - self._wall_s
        self.cpu_s[phase] += cpu_s - self._cpu_s
        self._cpu_s, self._wall_s = time.thread_time(), time.perf_counter()  # a system call, and none


def _compute() -> None:
    """What the fake device does. Busy, as a core is that computes or waits for a card's event."""
    end_s = time.perf_counter() + DEVICE_S
    while time.perf_counter() < end_s:
        pass


@contextmanager
def _subscribers(connect_info: ConnectInfo, count: int) -> Iterator[None]:
    """`count` receivers of what is sent at the connect info's endpoint."""
    where = msgspec.json.encode(connect_info).decode()
    process = subprocess.Popen([sys.executable, "-m", "tpserve.bench.subscribers", where, str(count), str(os.getpid())])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _heading(context: int, steps: int, transport: str, machine: MachineInfo) -> str:
    columns = "".join(f"{name:>16}" for name in (*PHASES, "total", "cpu"))
    return (
        f"One decode step on rank 0 in milliseconds, p50 / p99 of {steps:,}: context {context:,}, plans over {transport}, "
        f"{machine}\n"
        "encode is part of broadcast; cpu: what of the total was spent on a core; the bound is for the total's p50\n"
        f"{'batch':>5}{'subscribers':>13}{columns}   bound\n"
    )


def _row(case: StepCase) -> str:
    spreads = [*(case.phases[phase] for phase in PHASES), case.total, case.total_cpu]
    columns = "".join(f"{f'{percentiles.p50_ms:.3f} / {percentiles.p99_ms:.3f}':>16}" for percentiles in spreads)
    return f"{case.batch:>5}{case.subscribers:>13}{columns}   {case.bound_ms:.3f} {'holds' if case.holds else 'MISSED'}\n"
