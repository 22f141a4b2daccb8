"""A place of its own for what a test starts, and the proof that nothing of it is left."""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def place() -> Iterator[Path]:
    """A short TMPDIR of our own, so that what servers leave behind can be told from what others do. Ends empty."""
    where = Path(tempfile.mkdtemp(prefix="l-", dir="/tmp"))
    yield where
    shutil.rmtree(where)


def of_place(place: Path) -> list[int]:
    """Processes that were started with this TMPDIR."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            zombie = environ.with_name("stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if f"\0TMPDIR={place}\0".encode() in b"\0" + environ.read_bytes() and not zombie:
                found.append(int(environ.parent.name))
    return found


def assert_nothing_left(place: Path, timeout_s: float = 0.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while left := of_place(place):
        assert time.monotonic() < deadline_s, [Path(f"/proc/{pid}/cmdline").read_text() for pid in left]
        time.sleep(0.05)
    assert [path.name for path in place.iterdir() if path.suffix != ".log"] == []
    assert not list(Path("/dev/shm").glob("*tpserve*"))
