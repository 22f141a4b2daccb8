"""`tpserve bench step`: the CPU time of a decode step on rank 0, without the model.

Makes the calls of engine/loop in their order, on the scheduler, broadcaster and request pool of the server, with as many plans in
flight.

    schedule   Scheduler.schedule until it returns no plan
    broadcast  PlanBroadcaster.send, which encodes the plan and hands it to ZeroMQ's thread
    build      RequestPool.update, input_batch.build_model_input and logits_rows.sample_batches: tensors on the CPU
    apply      Scheduler.apply and take, PlanBroadcaster.retire
    encode     the encoding inside `broadcast`, measured by a second encoding

`total` is the sum of the first four in each step. `cpu` is the part of it that this thread spent on a core, less when other
threads, such as ZeroMQ's, used the core. The model, sampling and the messages between rank 0 and the frontend are not included:
a fake device takes `DEVICE_S` a step, without which no receiver could keep up.
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

from tpserve.bench.report import BenchReport, MachineInfo, check_writable, percentile
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
from tpserve.worker.input_batch import ChunkArrays, build_model_input
from tpserve.worker.logits_chunking import LogitsChunking
from tpserve.worker.logits_rows import sample_batches
from tpserve.worker.request_pool import RequestPool

PHASES = ("schedule", "encode", "broadcast", "build", "apply")
TOTAL_PHASES = ("schedule", "broadcast", "build", "apply")
BOUND_MS, BOUND_MS_AT_256 = 0.3, 2.5
"""Bounds of a step at batch 1 and at batch 256; other batches have the bound on the line through both."""
WARM_UP = 50
DEVICE_S = 0.002
VOCAB_SIZE, BLOCK_SIZE = 32_000, 16
CONNECT_S = 30.0


class Percentiles(msgspec.Struct, frozen=True):
    """Percentiles of the steps' times in milliseconds."""

    p50_ms: float
    p99_ms: float

    @staticmethod
    def of(seconds: Sequence[float]) -> "Percentiles":
        """The percentiles of non-empty times in seconds."""
        ordered = sorted(seconds)
        p50, p99 = (round(percentile(ordered, share) * 1e3, 4) for share in (0.5, 0.99))
        return Percentiles(p50, p99)


class StepCase(msgspec.Struct, frozen=True):
    """One row of the table. `holds`: the median of the total is below `bound_ms`."""

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
    """Measure every batch with every number of subscribers. Returns the exit code, which is 0 even when a bound is missed."""
    check_writable(output)
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
    """Measure `steps` decode steps of `batch` sequences, with a broadcast to `num_subscribers`."""
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
            timers = [rank.step() for _ in range(steps)]
            plan_bytes = rank.plan_bytes
        zap_authenticator.close()
        plans.close()
    total = Percentiles.of([sum(timer.wall_s[phase] for phase in TOTAL_PHASES) for timer in timers])
    cpu = Percentiles.of([sum(timer.cpu_s[phase] for phase in TOTAL_PHASES) for timer in timers])
    bound_ms = round(BOUND_MS + (BOUND_MS_AT_256 - BOUND_MS) * (batch - 1) / 255, 3)
    phases = {phase: Percentiles.of([timer.wall_s[phase] for timer in timers]) for phase in PHASES}
    return StepCase(batch, num_subscribers, plan_bytes, phases, total, cpu, bound_ms, total.p50_ms < bound_ms)


class StepBench:
    """Rank 0 with `batch` sequences that decode without end. Their lengths differ, so that not all need a new block in the same
    step."""

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
        self.step()  # runs all prompts

    def step(self) -> "PhaseTimer":
        """Schedule plans ahead, run the oldest one and apply its result. Returns the times of the phases."""
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
            chunks = ChunkArrays.of(plan)
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
    """The time of one step by phase, in seconds: `wall_s` on the clock, `cpu_s` of this thread on a core."""

    def __init__(self) -> None:
        self.wall_s = dict.fromkeys((*PHASES, "device"), 0.0)
        self.cpu_s = dict(self.wall_s)
        self._cpu_s, self._wall_s = time.thread_time(), time.perf_counter()

    def mark(self, phase: str) -> None:
        """Add the time since the last mark to `phase`."""
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        self.wall_s[phase] += wall_s - self._wall_s
        self.cpu_s[phase] += cpu_s - self._cpu_s
        self._cpu_s, self._wall_s = time.thread_time(), time.perf_counter()  # thread_time first: it is a system call


def _compute() -> None:
    """The fake device. It keeps the core busy, like a computation or a wait for a GPU event."""
    end_s = time.perf_counter() + DEVICE_S
    while time.perf_counter() < end_s:
        pass


@contextmanager
def _subscribers(connect_info: ConnectInfo, count: int) -> Iterator[None]:
    """Runs `count` subscribers of the endpoint in `connect_info`."""
    encoded = msgspec.json.encode(connect_info).decode()
    process = subprocess.Popen([sys.executable, "-m", "tpserve.bench.subscribers", encoded, str(count), str(os.getpid())])
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
        "encode is part of broadcast; cpu is the part of total on a core; the bound is for the p50 of total\n"
        f"{'batch':>5}{'subscribers':>13}{columns}   bound\n"
    )


def _row(case: StepCase) -> str:
    cells = [*(case.phases[phase] for phase in PHASES), case.total, case.total_cpu]
    columns = "".join(f"{f'{percentiles.p50_ms:.3f} / {percentiles.p99_ms:.3f}':>16}" for percentiles in cells)
    return f"{case.batch:>5}{case.subscribers:>13}{columns}   {case.bound_ms:.3f} {'holds' if case.holds else 'MISSED'}\n"
