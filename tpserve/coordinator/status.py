"""What the HTTP side knows about the engine: one immutable value, replaced whole by whoever follows the coordinator."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EngineStatus:
    """`max_model_len` and `vocab_size` are known once the state is running; `reason` says why the state is stopped."""

    state: Literal["starting", "running", "draining", "stopped"]
    phase: str = ""
    percent: int = 0
    reason: str = ""
    max_model_len: int | None = None
    vocab_size: int | None = None
