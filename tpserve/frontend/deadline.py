"""When a request must have ended: its header X-Request-Timeout, or the server's --request-timeout."""

import time

from aiohttp import web

from tpserve.errors import UserError
from tpserve.frontend.openai.errors import shown

TIMEOUT = "X-Request-Timeout"
MAX_TIMEOUT_S = 7 * 86400.0
ARRIVED_S = web.RequestKey("arrived_s", float)
"""When a request came, by `time.monotonic`."""


def deadline_of(request: web.Request, default_s: float | None) -> float | None:
    """The time of `time.monotonic` at which the request must have ended; None without one. UserError for a wrong header."""
    text, timeout_s = request.headers.get(TIMEOUT), default_s
    if text is not None:
        try:
            timeout_s = float(text)
        except ValueError:
            timeout_s = 0.0
        if not 0 < timeout_s <= MAX_TIMEOUT_S:  # also for NaN
            raise UserError(
                f"the header {TIMEOUT} is a number of seconds above 0 and at most {MAX_TIMEOUT_S:.0f}, got {shown(text)}",
                param=TIMEOUT,
                code="invalid_value",
            )
    return None if timeout_s is None else request.get(ARRIVED_S, time.monotonic()) + timeout_s
