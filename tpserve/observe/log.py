"""One readable log on stderr: `[n0 r1 s0] 12:00:01 INFO  message`. Never logs a prompt, never prints a traceback below debug.

The first rank of each node and the frontend speak from --log-level; other ranks only warnings and errors, unless the level is
debug.
"""

import logging
import sys
import warnings
from collections import deque
from typing import TextIO

DEFAULT = "info"
FIRST, LAST = 100, 200
"""So many lines are kept of a log's begin and of its end."""


def setup(level: str, prefix: str, *, lead: bool = True, stream: TextIO | None = None) -> None:
    """Send this process's log to stderr (or `stream`). `prefix`: who speaks; `lead`: a node's first rank, and the frontend."""
    number = logging.getLevelNamesMapping()[level.upper()]
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(_Line(prefix, tracebacks=number <= logging.DEBUG))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)  # of libraries
    own = number if lead or number == logging.DEBUG else max(number, logging.WARNING)
    logging.getLogger("tpserve").setLevel(own)
    warnings.showwarning = _warn


class Kept(logging.Handler):
    """The first and the last lines of this process's log, as they were written, for a ticket."""

    def __init__(self, first: int = FIRST, last: int = LAST) -> None:
        super().__init__()
        self._most_first = first
        self.first: list[str] = []
        self.last: deque[str] = deque(maxlen=last)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        line = self.format(record)
        if len(self.first) < self._most_first:
            self.first.append(line)
        else:
            self.last.append(line)


def keep() -> Kept:
    """From now on, keep lines of the log that `setup` has set up."""
    root = logging.getLogger()
    kept = Kept()
    kept.setFormatter(root.handlers[0].formatter)
    root.addHandler(kept)
    return kept


def rank_prefix(node: int, rank: int, stage: int) -> str:
    """Who a rank is in the log."""
    return f"n{node} r{rank} s{stage}"


def user_error(message: str) -> str:
    """The one line in which a command ends that its user can mend."""
    return f"tpserve: error: {' '.join(message.split())}"


class _Line(logging.Formatter):
    def __init__(self, prefix: str, tracebacks: bool) -> None:
        super().__init__(f"[{prefix}] %(asctime)s %(levelname)-5s %(message)s", datefmt="%H:%M:%S")
        self._tracebacks = tracebacks

    def format(self, record: logging.LogRecord) -> str:
        if self._tracebacks:
            return super().format(record)
        line = self.formatMessage(self._plain(record))
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            line += f": {type(error).__name__}: {error}"
        return " ".join(line.splitlines())

    def _plain(self, record: logging.LogRecord) -> logging.LogRecord:
        record.message = record.getMessage()
        record.asctime = self.formatTime(record, self.datefmt)
        record.levelname = {"WARNING": "WARN", "CRITICAL": "ERROR"}.get(record.levelname, record.levelname)
        return record


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A library's warning as one line; where in that library it arose is for debugging only."""
    logger = logging.getLogger("tpserve.warnings")
    logger.warning("%s", " ".join(str(message).split()))
    logger.debug("%s at %s:%d", category.__name__, filename, lineno)
