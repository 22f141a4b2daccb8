"""SQLite in WAL mode on a thread of its own: writes in the order in which they are given, and reads between them.

What is committed survives the end of this process, not of the machine: nothing is forced onto the disk. Only this process has
the file open, so that the log's index needs no shared memory.
"""

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Statement = tuple[str, tuple[Any, ...]]

VERSION = 1
MAX_BYTES = 2 << 30
"""The largest file; SQLite then says that it is full."""
PAGE_BYTES = 4096
CLOSE_S = 5.0
SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value);
CREATE TABLE answers (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, owner BLOB NOT NULL, num_sequences INTEGER NOT NULL,
    request BLOB NOT NULL, ended_s REAL, error BLOB, tries INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE frames (answer INTEGER NOT NULL, messages BLOB NOT NULL);
CREATE INDEX frames_of ON frames (answer);
"""


class Database:
    """One file. Statements may be executed directly until the first `submit`; then only its thread uses the connection."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it. sqlite3.Error when that fails; ValueError when another version has written it."""
        self._path = path
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        try:
            self._set_up()
        except Exception:
            self.connection.close()
            raise

    def _set_up(self) -> None:
        execute = self.connection.execute
        execute(f"PRAGMA page_size={PAGE_BYTES}")
        execute("PRAGMA locking_mode=EXCLUSIVE")
        execute("PRAGMA journal_mode=WAL")
        execute("PRAGMA synchronous=OFF")
        execute(f"PRAGMA max_page_count={MAX_BYTES // PAGE_BYTES}")
        version = execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            self.connection.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version={VERSION}; COMMIT;")
        elif version != VERSION:
            raise ValueError(f"it has version {version}, this server writes version {VERSION}")

    def write(self, statements: list[Statement]) -> None:
        """Execute all in one transaction, or none of them (sqlite3.Error)."""
        self.connection.execute("BEGIN")
        try:
            for sql, values in statements:
                self.connection.execute(sql, values)
            self.connection.execute("COMMIT")
        except sqlite3.Error:
            with contextlib.suppress(sqlite3.Error):
                self.connection.execute("ROLLBACK")
            raise

    def submit(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        """Do `work` on the thread, after what was submitted before; the future has its result or its exception."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            try:
                result = work()
            except Exception as error:  # for whoever awaits it
                answer(future.set_exception, error)
            else:
                answer(future.set_result, result)

        def answer(set_it: Callable[[Any], None], value: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(lambda: None if future.done() else set_it(value))

        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
            self._thread.start()
        self._jobs.put(job)
        return future

    def discard(self) -> None:
        """Close the connection and delete the file, also on a full disk."""
        self.connection.close()
        delete(self._path)

    def close(self, wait_s: float = CLOSE_S) -> None:
        """Close the connection after what was submitted; wait for that, for a while."""
        if self._thread is None:
            self.connection.close()
            return
        self._jobs.put(self.connection.close)
        self._jobs.put(None)
        self._thread.join(wait_s)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def delete(path: Path) -> None:
    """Delete a database's files, as far as they exist."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        with contextlib.suppress(OSError):
            path.with_name(path.name + suffix).unlink()
