"""One readable log on stderr: `[n0 r1 s0] 12:00:01 INFO  message`. Never logs a prompt, never prints a traceback below debug.

The first rank of each node and the frontend speak from --log-level; other ranks only warnings and errors, unless the level is
debug.
"""

import logging
import sys
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import TextIO

DEFAULT = "info"
FIRST, LAST = 100, 200
"""So many lines are kept of a log's begin and of its end."""
DIM, RESET = "\033[2m", "\033[0m"
COLORS = {"DEBUG": DIM, "INFO": "\033[32m", "WARN": "\033[33m", "ERROR": "\033[1;31m"}
MOST, LONGEST = 100, 1000
"""So many lines are told at a time, and so much of each."""


def setup(level: str, prefix: str, *, lead: bool = True, stream: TextIO | None = None, color: bool = False) -> None:
    """Send this process's log to stderr (or `stream`). `prefix`: who speaks; `lead`: a node's first rank, and the frontend;
    `color`: levels are colored and the prefix is dim, for a terminal."""
    number = logging.getLevelNamesMapping()[level.upper()]
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(_LineFormatter(prefix, tracebacks=number <= logging.DEBUG, color=color))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)  # of libraries
    own = number if lead or number == logging.DEBUG else max(number, logging.WARNING)
    logging.getLogger("tpserve").setLevel(own)
    warnings.showwarning = _warn


class LogRingBuffer(logging.Handler):
    """The first and the last lines of a process's log, as they were written, for a ticket. Lines are numbered from 0.

    `last_error`: what the last error said, without who and when. `alarm` is called after each error.
    """

    def __init__(self, first: int = FIRST, last: int = LAST) -> None:
        super().__init__()
        self._most_first = first
        self.first: list[str] = []
        self.last: deque[str] = deque(maxlen=last)
        self.total = 0
        self.last_error, self.num_errors = "", 0
        self.alarm: Callable[[], None] = lambda: None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line of this process's own."""
        self.add(self.format(record))
        if record.levelno >= logging.ERROR:
            self.last_error = clipped(one_line(record))
            self.num_errors += 1
            self.alarm()

    def add(self, line: str) -> None:
        """Keep a line."""
        if len(self.first) < self._most_first:
            self.first.append(line)
        else:
            self.last.append(line)
        self.total += 1

    def since(self, number: int) -> tuple[int, list[str]]:
        """Lines that follow each other, from `number` on or the first kept one after it, and the number of the first."""
        self.acquire()  # lines are added on other threads
        try:
            first, last, total = list(self.first), list(self.last), self.total
        finally:
            self.release()
        if number == total:
            return number, []
        kept = [*enumerate(first), *enumerate(last, total - len(last))]
        found = [(i, line) for i, line in kept if i >= number][:MOST]
        start = found[0][0]
        return start, [clipped(line) for place, (i, line) in enumerate(found, start) if i == place]

    def take(self, start: int, lines: Sequence[str], last_error: str = "") -> None:
        """Keep what `since` gave in another process; says so when lines before have not come."""
        self.last_error = last_error or self.last_error
        if start > self.total:
            self.add(f"({start - self.total} lines are missing)")
            self.total = start
        for line in lines[self.total - start :]:
            self.add(line)

    def shown(self) -> dict[str, list[str]]:
        """For JSON."""
        return {"first": list(self.first), "last": list(self.last)}


def clipped(line: str) -> str:
    """What can be sent: names of files may hold bytes that are no text."""
    return line[:LONGEST].encode(errors="replace").decode()


def keep_log() -> LogRingBuffer:
    """From now on, keep lines of the log that `setup` has set up, without colors."""
    root = logging.getLogger()
    log_buffer, line = LogRingBuffer(), root.handlers[0].formatter
    assert isinstance(line, _LineFormatter)
    log_buffer.setFormatter(_LineFormatter(line.prefix, line.tracebacks))
    root.addHandler(log_buffer)
    return log_buffer


def rank_prefix(node: int, rank: int, stage: int) -> str:
    """Who a rank is in the log."""
    return f"n{node} r{rank} s{stage}"


def user_error(message: str) -> str:
    """The one line in which a command ends that its user can mend."""
    return f"tpserve: error: {' '.join(message.split())}"


def one_line(record: logging.LogRecord) -> str:
    """A record's message and the error it is about, in one line."""
    text = record.getMessage()
    if record.exc_info and record.exc_info[1] is not None:
        error = record.exc_info[1]
        text += f": {type(error).__name__}: {error}"
    return " ".join(text.splitlines())


class _LineFormatter(logging.Formatter):
    def __init__(self, prefix: str, tracebacks: bool, color: bool = False) -> None:
        super().__init__("[%(prefix)s] %(asctime)s %(level)s %(message)s", datefmt="%H:%M:%S")
        self.prefix, self.tracebacks, self._color = prefix, tracebacks, color

    def format(self, record: logging.LogRecord) -> str:
        level = {"WARNING": "WARN", "CRITICAL": "ERROR"}.get(record.levelname, record.levelname)
        colors = COLORS.get(level, "") if self._color else ""
        record.level = f"{colors}{level:<5}{RESET}" if colors else f"{level:<5}"
        record.prefix = f"{DIM}{self.prefix}{RESET}" if self._color else self.prefix
        if self.tracebacks:
            return super().format(record)
        record.message = one_line(record)
        record.asctime = self.formatTime(record, self.datefmt)
        return self.formatMessage(record)


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
