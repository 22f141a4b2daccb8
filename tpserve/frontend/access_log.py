"""The access log: a JSON object a line for every HTTP request, and nothing of its text.

Owns the file and the thread that writes it, so that a slow disk holds up no stream. A file that somebody has moved is opened anew
under its name (logrotate without copytruncate), one that cannot be written loses lines, which the server's log tells once.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from tpserve.errors import UserError
from tpserve.frontend.access import KEY_OWNER
from tpserve.frontend.api_keys import NOBODY
from tpserve.frontend.openai.admission import ADMITTED, REQUEST_ID
from tpserve.frontend.tracing import TRACE
from tpserve.frontend.traffic import CLIENT_LEFT, figures_of, route_of

logger = logging.getLogger(__name__)

STDOUT = "-"
MAX_WAITING = 65536
"""Lines that may wait for the disk; further ones are lost."""
LOOK_S = 1.0
"""How often the thread looks whether the file has been moved, at most."""
CLOSE_S = 2.0
QUIET_S = 30.0
"""Lines count as written again when none was lost for this long."""


class AccessLogFile:
    """Lines to a file, or to the standard output for "-". `write` never waits."""

    def __init__(self, path: str) -> None:
        """Open the file for appending. UserError when it cannot be."""
        self._path = None if path == STDOUT else path
        try:
            self._file = self._open()
        except OSError as error:
            raise UserError(f"--access-log {path} cannot be opened: {error.strerror}", param="access_log") from error
        self._lines: queue.Queue[bytes | None] = queue.Queue(MAX_WAITING)
        self._looked_s, self._is_torn = time.monotonic(), False
        self._num_lost, self._lost_s = 0, 0.0
        self._thread = threading.Thread(target=self._run, name="access log", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """Append a line, without its end."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._lost(1, "its disk is too slow")

    def close(self) -> None:
        """Write what waits, for `CLOSE_S` at most."""
        try:
            self._lines.put(None, timeout=CLOSE_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_S)

    def _open(self) -> int:
        if self._path is None:
            return os.dup(1)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        file = os.open(self._path, flags | os.O_NONBLOCK, 0o640)  # a pipe that nobody reads is an error, and no wait
        os.set_blocking(file, True)
        return file

    def _run(self) -> None:
        is_open = True
        while is_open:
            batch = [self._lines.get()]
            while not self._lines.empty():
                batch.append(self._lines.get_nowait())
            is_open = None not in batch
            lines = [line for line in batch if line is not None]
            try:
                self._reopen_moved()
                self._append(lines)
            except OSError as error:
                self._lost(len(lines), error.strerror or str(error))
            else:
                self._found()
        os.close(self._file)

    def _reopen_moved(self) -> None:
        now_s = time.monotonic()
        if self._path is None or now_s - self._looked_s < LOOK_S:
            return
        self._looked_s, ours = now_s, os.fstat(self._file)
        try:
            there = Path(self._path).stat()
        except FileNotFoundError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            file = self._open()
            os.close(self._file)
            self._file, self._is_torn = file, False

    def _append(self, lines: list[bytes]) -> None:
        """Write whole lines; what an earlier write has left of one is ended first."""
        data = memoryview((b"\n" if self._is_torn else b"") + b"".join(line + b"\n" for line in lines))
        while data:
            written = os.write(self._file, data)
            self._is_torn = data[written - 1] != ord("\n")
            data = data[written:]

    def _lost(self, count: int, why: str) -> None:
        if not self._num_lost:
            logger.error("--access-log %s loses lines: %s; serving goes on", self._path or STDOUT, why)
        self._num_lost, self._lost_s = self._num_lost + count, time.monotonic()

    def _found(self) -> None:
        if self._num_lost and time.monotonic() - self._lost_s >= QUIET_S:
            logger.warning("--access-log %s is written again; about %d lines are lost", self._path or STDOUT, self._num_lost)
            self._num_lost = 0


def log_access(write: Callable[[bytes], None]) -> Middleware:
    """A middleware that writes a line for each HTTP request when its response has ended."""

    @web.middleware
    async def log_line(request: web.Request, handler: Handler) -> web.StreamResponse:
        time_s, began_s, status = time.time(), time.monotonic(), CLIENT_LEFT
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            write(msgspec.json.encode(entry(request, status, time_s, time.monotonic() - began_s)))

    return log_line


def entry(request: web.Request, status: int, time_s: float, took_s: float) -> dict[str, Any]:
    """The members of a line; null where a request has none. `time_s`: its arrival, since the epoch."""
    admitted, trace = request.get(ADMITTED), request.get(TRACE)
    figures = None if admitted is None else figures_of(admitted.handle)
    return {
        "time": datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds"),
        "request_id": request.get(REQUEST_ID),
        "trace_id": trace and trace.trace_id,
        "id": admitted and admitted.id,
        "client": request.remote,
        "key": request.get(KEY_OWNER, NOBODY).name or None,
        "method": request.method,
        "path": route_of(request),
        "status": status,
        "duration_s": round(took_s, 6),
        "queue_s": figures and figures.queue_s,
        "ttft_s": figures and figures.ttft_s,
        "model": admitted and admitted.model,
        "prompt_tokens": figures and figures.prompt_tokens,
        "output_tokens": figures and figures.output_tokens,
        "finish_reason": figures and figures.finish,
    }
