"""The reload that runs, and those before it, for operators. Decides nothing: the coordinator does.

A reload has one outcome: "done" once an epoch runs with the new configuration, or "taken back" once one runs with the old one.
"""

import asyncio
import logging
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from tpserve.config.reload import Candidate
from tpserve.errors import UserError
from tpserve.observe.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_RECORDS = 20


@dataclass
class ReloadRecord:
    """One reload. `began_s`: by the clock of the engine client. `reason`: why it was taken back."""

    changes: dict[str, object]
    began_s: float
    outcome: Literal["running", "done", "taken back"] = "running"
    reason: str = ""
    took_s: float | None = None
    resumption: str | None = None
    """How requests that were open went on; None before."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Reloads:
    """See the module."""

    def __init__(self, metrics: Metrics) -> None:
        self.records: deque[ReloadRecord] = deque(maxlen=MAX_RECORDS)
        """The last reloads, oldest first."""
        self.candidate: Candidate | None = None
        """What is on trial."""
        self._metrics = metrics

    @property
    def running(self) -> ReloadRecord | None:
        """The one that runs."""
        return self.records[-1] if self.records and self.records[-1].outcome == "running" else None

    def begin(self, candidate: Candidate, now: float) -> ReloadRecord:
        """Ranks are about to try a configuration."""
        self.candidate = candidate
        self.records.append(ReloadRecord(candidate.changes, now))
        return self.records[-1]

    def failed(self, reason: str) -> None:
        """Ranks could not start with it."""
        self.candidate = None
        if (record := self.running) is not None:
            record.reason = reason
            logger.error("the reload is taken back: %s", reason)

    def ready(self, now: float, resumption: str | None) -> None:
        """An epoch runs: with the new configuration, or with the old one."""
        if (record := self.running) is not None:
            record.resumption = resumption
            record.outcome, record.took_s = "taken back" if record.reason else "done", now - record.began_s
            self._metrics.reloaded(record.outcome)
            self._end(record)

    def stop(self, reason: str) -> None:
        """The service ends."""
        if (record := self.running) is not None:
            record.outcome, record.reason = "taken back", reason or "the server has ended"
            self._end(record)

    def _end(self, record: ReloadRecord) -> None:
        self.candidate = None
        record.ended.set()


def busy() -> UserError:
    """The error of a reload that must wait."""
    return UserError(
        "the server reloads, recovers, starts or drains: try again when it is ready", code="reload_not_possible", status=409
    )
