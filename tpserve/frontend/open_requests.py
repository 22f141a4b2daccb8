"""What a frontend knows of each open request beside its tokens: the ids by which it can be ended, its key's name, its deadline.

Owns a request's entry and its timer from admission to the end of its handle. Called from one event loop only.
"""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from tpserve.engine_client.requests import RequestHandle, RequestTable
from tpserve.errors import UserError
from tpserve.frontend.key_usage import KeyUsage

ABORTED = "request_aborted"
TIMED_OUT = "request_timeout"


@dataclass(frozen=True)
class OpenRequest:
    """`ids`: the client's and the answer's. `timer`: of its deadline. `on_end`: who else is called."""

    ids: frozenset[str]
    key_name: str
    timer: asyncio.TimerHandle | None
    on_end: Callable[[RequestHandle], object] | None


class OpenRequests:
    """All open requests of clients."""

    def __init__(self, request_table: RequestTable, key_usage: KeyUsage) -> None:
        self.key_usage = key_usage
        self._request_table = request_table
        self._by_handle: dict[RequestHandle, OpenRequest] = {}

    def __len__(self) -> int:
        return len(self._by_handle)

    def add(
        self,
        handle: RequestHandle,
        ids: frozenset[str],
        *,
        key_name: str,
        deadline_s: float | None,
        prompt_tokens: int,
        on_end: Callable[[RequestHandle], object] | None = None,
    ) -> None:
        """A request is admitted. `deadline_s`: a time of `time.monotonic`. `on_end` is called when its handle has ended."""
        if handle.ended:  # it could not be sent
            return
        timer = None
        if deadline_s is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(deadline_s - time.monotonic(), self._request_table.fail, handle, timed_out())
        self._by_handle[handle] = OpenRequest(ids, key_name, timer, on_end)
        self.key_usage.begin(key_name, handle, prompt_tokens)
        handle.on_end = self._on_end

    def abort(self, ids: frozenset[str] | None = None) -> int:
        """End the requests that have one of `ids`, or all; returns their number."""
        found = [handle for handle, request in self._by_handle.items() if ids is None or ids & request.ids]
        for handle in found:
            self._request_table.fail(handle, aborted())
        return len(found)

    def _on_end(self, handle: RequestHandle) -> None:
        request = self._by_handle.pop(handle)
        if request.timer is not None:
            request.timer.cancel()
        self.key_usage.end(request.key_name, handle)
        if request.on_end is not None:
            request.on_end(handle)


def timed_out() -> UserError:
    """The error 504 of a request whose deadline has come."""
    text = "the request was ended: its time is over (X-Request-Timeout, or the server's --request-timeout)"
    return UserError(text, code=TIMED_OUT, status=504, retry_s=math.inf)


def aborted() -> UserError:
    """The error 503 of a request that an operator has ended."""
    return UserError("the request was ended by an operator", code=ABORTED, status=503, retry_s=math.inf)
