"""The state of the engine as HTTP and operators see it."""

from dataclasses import dataclass
from typing import Literal

EngineState = Literal["starting", "running", "paused", "recovering", "draining", "stopped"]


@dataclass(frozen=True)
class EngineStatus:
    """A snapshot. `phase` and `percent` (0 to 100) show the progress of a start; `reason` says why the engine stopped.

    `max_model_len` (tokens) and `vocab_size` are None until every rank has loaded its shard. Requests are taken while "running",
    while "recovering": after a fault, before the next epoch runs, and while "paused" by an operator.
    """

    state: EngineState
    phase: str = ""
    percent: int = 0
    reason: str = ""
    max_model_len: int | None = None
    vocab_size: int | None = None
    resumption: str | None = None
    """How an answer that a fault interrupts goes on: "exact", or "seamless, not identical"."""
    recoveries: int = 0
    """Epochs that ran after a fault."""
    last_fault: str = ""


@dataclass
class FaultRecord:
    """A fault that ended an epoch: when, by the coordinator's clock, and how long it took until the next epoch ran."""

    epoch: int
    reason: str
    lost_s: float
    took_s: float | None = None
