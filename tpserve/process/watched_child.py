"""A child of the supervisor that is started again when a signal kills it."""

import logging
import os
import subprocess
import time
from dataclasses import dataclass, field

from tpserve.process.process_utils import exit_text, open_pidfd
from tpserve.process.restart_backoff import RestartBackoff

logger = logging.getLogger("tpserve.supervisor")


@dataclass
class WatchedChild:
    """A child that is started again when a signal kills it. `code`: its exit code once it has ended for good."""

    name: str
    pid: int = 0
    pidfd: int | None = None
    process: "subprocess.Popen[bytes] | None" = None
    started_s: float = 0.0
    due_s: float | None = 0.0
    restarts: int = 0
    last_exit: str = ""
    killed_pid: int = 0
    code: int | None = None
    backoff: RestartBackoff = field(default_factory=RestartBackoff)

    def begin(self, pid: int, process: "subprocess.Popen[bytes] | None" = None) -> None:
        """It runs."""
        self.pid, self.process, self.started_s, self.due_s = pid, process, time.monotonic(), None
        self.pidfd = open_pidfd(pid)

    def end(self, code: int, again: bool) -> None:
        """It has ended, for good or to be started `again`."""
        if self.pidfd is not None:
            os.close(self.pidfd)
        if self.process is not None:
            self.process.returncode = code
        pid, self.pid, self.pidfd, self.process = self.pid, 0, None, None
        if not again:
            self.code, self.killed_pid = code, pid
            return
        now = time.monotonic()
        self.restarts, self.last_exit = self.restarts + 1, exit_text(code)
        self.due_s = now + self.backoff.delay_s(now - self.started_s)
        logger.warning("%s (pid %d) %s: starting it again", self.name, pid, self.last_exit)
