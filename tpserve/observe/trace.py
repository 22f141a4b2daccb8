"""Step traces: one JSON line per event, for the trace viewers of Chrome and Perfetto.

Times are microseconds of CLOCK_MONOTONIC, which all processes of a host share, so a viewer can merge the files of its ranks. With
a directory (`--step-trace`) a rank writes `rank<N>.jsonl` into it; without one, tracing is off.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


class Trace:
    """One rank's events. Without a directory every call returns at once."""

    def __init__(self, directory: str | None, rank: int) -> None:
        self._rank = rank
        self._file: TextIO | None = None
        if directory is not None:
            Path(directory).mkdir(parents=True, exist_ok=True)
            self._file = Path(directory, f"rank{rank}.jsonl").open("w", buffering=1)

    def event(self, name: str, step: int) -> None:
        """Write an event that happens now."""
        if self._file is not None:
            self._write({"name": name, "ph": "i", "ts": time.monotonic_ns() / 1000, "args": {"step": step}})

    @contextmanager
    def span(self, name: str, step: int) -> Iterator[None]:
        """Write an event that lasts as long as the `with` block."""
        begin = time.monotonic_ns() / 1000
        yield
        if self._file is not None:
            self._write({"name": name, "ph": "X", "ts": begin, "dur": time.monotonic_ns() / 1000 - begin, "args": {"step": step}})

    def _write(self, entry: dict[str, object]) -> None:
        assert self._file is not None
        self._file.write(json.dumps({**entry, "pid": self._rank, "tid": 0}) + "\n")
