"""Small limits, small requests, and the engine's loop over the simulated device."""

from typing import Any

from tests.scheduling.simulator import SimulatedDevice
from tpserve.scheduling.scheduler import Scheduler
from tpserve.scheduling.scheduler_config import SchedulerConfig
from tpserve.types.packed import pack, unpack
from tpserve.types.plan import StepPlan, StepResult
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams


def config(**changes: Any) -> SchedulerConfig:
    sizes: dict[str, Any] = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 64,
        "num_blocks": 64,
        "block_size": 4,
    }
    return SchedulerConfig(**{**sizes, "depth": 2, "sync_sampling": False, "eos_ids": (), **changes})


def request(id: int, prompt_len: int = 4, max_tokens: int = 4, **params: Any) -> Request:
    """Its prompt begins like no other's."""
    return Request(
        id, pack(range(1000 * id, 1000 * id + prompt_len)), EngineSamplingParams(max_tokens=max_tokens, **params), seed=id
    )


def step_result(plan: StepPlan, token: int = 9) -> StepResult:
    """A result that draws the same token everywhere."""
    return StepResult(plan.epoch, plan.step, pack(token if sample else -1 for sample in plan.sample))


def plan_of(scheduler: Scheduler, now: float = 0.0) -> StepPlan:
    plan = scheduler.schedule(now)
    assert plan is not None
    return plan


def run(scheduler: Scheduler, device: SimulatedDevice) -> list[StepPlan]:
    """The engine's loop on the device's clock: plan as far ahead as allowed, wait for the oldest result, apply it."""
    plans, now = [], 0.0
    while not scheduler.idle:
        while plan := scheduler.schedule(now):
            device.submit(plan, now)
            plans.append(plan)
        now = device.ready_s
        scheduler.apply(device.collect(now), now)
    return plans


def slots(plan: StepPlan) -> list[int]:
    return list(unpack(plan.slots))
