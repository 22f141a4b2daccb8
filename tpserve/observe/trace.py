"""When a step happened: one JSON line per event, readable by Chrome's and Perfetto's trace viewers.

Times are microseconds of CLOCK_MONOTONIC, which all processes of a host share, so that the files of its ranks can be
laid side by side. Off unless a directory is given; then a rank writes `rank<N>.jsonl` into it.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


class Trace:
    """One rank's events. With no directory every call returns at once."""

    def __init__(self, directory: str | None, rank: int) -> None:
        self._rank = rank
        self._file: TextIO | None = None
        if directory is not None:
            Path(directory).mkdir(parents=True, exist_ok=True)
            self._file = Path(directory, f"rank{rank}.jsonl").open("w", buffering=1)

    def event(self, name: str, step: int) -> None:
        """Something happened now."""
        if self._file is not None:
            self._write({"name": name, "ph": "i", "ts": time.monotonic_ns() / 1000, "args": {"step": step}})

    @contextmanager
    def span(self, name: str, step: int) -> Iterator[None]:
        """Something takes as long as the block."""
        begin = time.monotonic_ns() / 1000
        yield
        if self._file is not None:
            self._write({"name": name, "ph": "X", "ts": begin, "dur": time.monotonic_ns() / 1000 - begin, "args": {"step": step}})

    def _write(self, entry: dict[str, object]) -> None:
        assert self._file is not None
        self._file.write(json.dumps({**entry, "pid": self._rank, "tid": 0}) + "\n")
