"""Server-sent events as bytes, and the comments that keep an idle connection open. Owns no state."""

import asyncio
from collections.abc import Callable

import msgspec

from tpserve.frontend.openai.errors import Json

KEEP_ALIVE_S = 10.0
KEEP_ALIVE_COMMENT = b": keep-alive\n\n"
END = b"data: [DONE]\n\n"
SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # otherwise proxies buffer streams
}


def event(value: Json) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class IdleTimer:
    """Calls `wake` whenever `KEEP_ALIVE_S` have passed since the last `restart`, which costs no more than a look at the clock: a
    token restarts it, and the event loop's timer moves only when it fires."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._seconds, self._wake = KEEP_ALIVE_S, wake
        self._loop = asyncio.get_running_loop()
        self._since_s, self._due = self._loop.time(), False

    def __enter__(self) -> "IdleTimer":
        self._timer = self._loop.call_at(self._since_s + self._seconds, self._fire)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def restart(self) -> None:
        """The time runs from now on."""
        self._since_s, self._due = self._loop.time(), False

    def due(self) -> bool:
        """Whether the time has passed since the last restart or the last call that said so."""
        due, self._due = self._due, False
        return due

    def _fire(self) -> None:
        if self._loop.time() >= self._since_s + self._seconds:
            self._since_s, self._due = self._loop.time(), True
            self._wake()
        self._timer = self._loop.call_at(self._since_s + self._seconds, self._fire)
