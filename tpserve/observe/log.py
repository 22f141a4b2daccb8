"""The log on stderr, one line per record: `[n0 r1 s0] 12:00:01 INFO  message`. Prints tracebacks at debug level only.

The first rank of each node and the frontend log from --log-level on. Other ranks log warnings and errors only, unless the level
is debug. Invariant: no log line contains a prompt.
"""

import logging
import sys
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import TextIO

DEFAULT = "info"
FIRST, LAST = 100, 200
"""Number of lines that a ring buffer keeps from the beginning and from the end of a log."""
DIM, RESET = "\033[2m", "\033[0m"
COLORS = {"DEBUG": DIM, "INFO": "\033[32m", "WARN": "\033[33m", "ERROR": "\033[1;31m"}
MAX_LINES, MAX_CHARS = 100, 1000
"""Limits of one `LogRingBuffer.since`: lines, and characters of each line."""


def setup(level: str, prefix: str, *, lead: bool = True, stream: TextIO | None = None, color: bool = False) -> None:
    """Send this process's log to stderr (or `stream`).

    `prefix`: the text in brackets, like "n0 r1 s0". `lead`: whether this is a node's first rank or the frontend.
    `color`: color the levels and dim the prefix, for a terminal.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(_LineFormatter(prefix, tracebacks=number <= logging.DEBUG, color=color))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)  # of libraries
    own = number if lead or number == logging.DEBUG else max(number, logging.WARNING)
    logging.getLogger("tpserve").setLevel(own)
    warnings.showwarning = _warn


def set_level(level: str) -> None:
    """Change the level of this process's log, if this is a node's first rank or the frontend."""
    logging.getLogger("tpserve").setLevel(logging.getLevelNamesMapping()[level.upper()])


class LogRingBuffer(logging.Handler):
    """The first and the last lines of a process's log, for bug reports. Lines are numbered from 0.

    `last_error`: the message of the last error, without prefix and time. `on_error` is called after each error.
    """

    def __init__(self, first: int = FIRST, last: int = LAST) -> None:
        super().__init__()
        self._max_first = first
        self.first: list[str] = []
        self.last: deque[str] = deque(maxlen=last)
        self.total = 0
        self.last_error, self.num_errors = "", 0
        self.on_error: Callable[[], None] = lambda: None

    def emit(self, record: logging.LogRecord) -> None:
        """Add a record of this process."""
        self.add(self.format(record))
        if record.levelno >= logging.ERROR:
            self.last_error = clipped(one_line(record))
            self.num_errors += 1
            self.on_error()

    def add(self, line: str) -> None:
        """Add a line."""
        if len(self.first) < self._max_first:
            self.first.append(line)
        else:
            self.last.append(line)
        self.total += 1

    def since(self, number: int) -> tuple[int, list[str]]:
        """(number of the first line, consecutive lines), from `number` on, or from the first kept line after it."""
        self.acquire()  # other threads add lines
        try:
            first, last, total = list(self.first), list(self.last), self.total
        finally:
            self.release()
        if number == total:
            return number, []
        numbered = [*enumerate(first), *enumerate(last, total - len(last))]
        found = [(i, line) for i, line in numbered if i >= number][:MAX_LINES]
        start = found[0][0]
        return start, [clipped(line) for expected, (i, line) in enumerate(found, start) if i == expected]

    def take(self, start: int, lines: Sequence[str], last_error: str = "") -> None:
        """Add lines that `since` returned in another process, and a note in place of lines that are missing before them."""
        self.last_error = last_error or self.last_error
        if start > self.total:
            self.add(f"({start - self.total} lines are missing)")
            self.total = start
        for line in lines[self.total - start :]:
            self.add(line)

    def shown(self) -> dict[str, list[str]]:
        """The kept lines, for JSON."""
        return {"first": list(self.first), "last": list(self.last)}


def clipped(line: str) -> str:
    """At most `MAX_CHARS` characters of a line, as valid UTF-8: file names may contain other bytes."""
    return line[:MAX_CHARS].encode(errors="replace").decode()


def keep_log() -> LogRingBuffer:
    """Attach a ring buffer to the log that `setup` configured; it keeps lines without colors."""
    root = logging.getLogger()
    log_buffer, line = LogRingBuffer(), root.handlers[0].formatter
    assert isinstance(line, _LineFormatter)
    log_buffer.setFormatter(_LineFormatter(line.prefix, line.tracebacks))
    root.addHandler(log_buffer)
    return log_buffer


def rank_prefix(node: int, rank: int, stage: int) -> str:
    """A rank's prefix in the log."""
    return f"n{node} r{rank} s{stage}"


def user_error(message: str) -> str:
    """The one line with which a command exits on a UserError."""
    return f"tpserve: error: {' '.join(message.split())}"


def one_line(record: logging.LogRecord) -> str:
    """A record's message and its exception, in one line."""
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
    """Log a library's warning as one line; its source line at debug level only."""
    logger = logging.getLogger("tpserve.warnings")
    logger.warning("%s", " ".join(str(message).split()))
    logger.debug("%s at %s:%d", category.__name__, filename, lineno)
