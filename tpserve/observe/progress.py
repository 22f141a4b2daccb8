"""Progress of long tasks: a bar on a terminal, a line every few seconds elsewhere. With `visible` false nothing is shown.

with ByteProgress("loading weights", visible=rank == 0) as progress:
    progress.update(done, total)
"""

import logging
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

log = logging.getLogger(__name__)

LINE_EVERY_S = 5.0
REDRAW_EVERY_S = 0.5
NOTEBOOK = "ipykernel.iostream"
"""Module of the class of a notebook's stderr. It is not a terminal, but "\\r" lets a line replace itself."""
GB = 1e9


class ByteProgress:
    """Progress in bytes of a task of known size. Ends with one log line: size, seconds, speed."""

    def __init__(self, title: str, visible: bool, stream: TextIO | None = None) -> None:
        self._title = title
        self._visible = visible
        self._stream = sys.stderr if stream is None else stream
        self._bar: tuple[Bar, TaskID] | None = None
        self._done = self._total = 0
        self._start_s = self._line_s = 0.0

    def __enter__(self) -> Self:
        self._start_s = self._line_s = time.monotonic()
        if self._visible and self._stream.isatty():
            self._bar = _bar(self._title, self._stream)
        return self

    def update(self, done: int, total: int) -> None:
        """`done` of `total` bytes are complete. Cheap enough to call for every chunk."""
        self._done, self._total = done, total
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, completed=done, total=total)
        elif self._visible and time.monotonic() - self._line_s >= LINE_EVERY_S:
            self._line_s = time.monotonic()
            percent = 100 * done // max(total, 1)
            log.info("%s: %d%% of %.1f GB, %s", self._title, percent, total / GB, self._speed())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar[0].stop()
        if self._visible and kind is None and self._done:
            seconds = time.monotonic() - self._start_s
            log.info("%s: %.3g GB in %.1f s, %s", self._title, self._done / GB, seconds, self._speed())

    def _speed(self) -> str:
        return f"{self._done / GB / max(time.monotonic() - self._start_s, 1e-9):.2f} GB/s"


def _bar(title: str, stream: TextIO) -> "tuple[Bar, TaskID]":
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(file=stream), transient=True)
    bar.start()
    return bar, bar.add_task(title, total=None)


class PromptProgress:
    """How many prompts of an `LLM` call are answered, and how fast. In a notebook one line replaces itself.

    Writes to the stream, not to the log: in the caller's process the log belongs to the caller.
    """

    def __init__(self, total: int, visible: bool, stream: TextIO | None = None) -> None:
        self._total = total
        self._visible = visible
        self._stream = sys.stderr if stream is None else stream
        self._redraws = type(self._stream).__module__ == NOTEBOOK
        self._shown = 0
        self._bar: tuple[Bar, TaskID] | None = None
        self._done = self._tokens = 0
        self._start_s = self._line_s = 0.0

    def __enter__(self) -> Self:
        self._start_s = self._line_s = time.monotonic()
        if self._visible and self._stream.isatty():
            self._bar = _counting_bar(self._total, self._stream)
        return self

    def update(self, done: int, tokens: int) -> None:
        """`done` prompts are answered, with `tokens` generated tokens so far."""
        self._done, self._tokens = done, tokens
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, completed=done, speed=self._speed())
        elif self._visible and time.monotonic() - self._line_s >= (REDRAW_EVERY_S if self._redraws else LINE_EVERY_S):
            self._line_s = time.monotonic()
            self._print("" if self._redraws else "\n")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar[0].stop()
        elif self._visible and kind is None:
            self._print("\n")

    def _print(self, end: str) -> None:
        seconds = time.monotonic() - self._start_s
        line = f"{self._done}/{self._total} prompts in {seconds:.1f} s, {self._speed()}"
        self._stream.write(f"\r{line:<{self._shown}}{end}" if self._redraws else line + end)
        self._stream.flush()
        self._shown = len(line)

    def _speed(self) -> str:
        return f"{self._tokens / max(time.monotonic() - self._start_s, 1e-9):,.0f} tokens/s"


def _counting_bar(total: int, stream: TextIO) -> "tuple[Bar, TaskID]":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    speed = TextColumn("{task.fields[speed]}")
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), speed, TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(file=stream))
    bar.start()
    return bar, bar.add_task("prompts", total=total, speed="")
