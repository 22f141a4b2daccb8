"""The one error body of the API: {"error": {message, type, param, code}}, all four always present."""

import math
from typing import Any

import msgspec
from aiohttp import web

from tpserve.errors import UserError

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "internal_server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
Json = dict[str, Any]
CODES = {401: "invalid_api_key", 429: "queue_full", 500: "internal_error"}
MAX_ECHOED_CHARS = 200
"""The length to which a client's value is cut in an error about it."""
MAX_MESSAGE_CHARS = 1000
RETRY_AFTER_S = {429: 1, 503: 5}
"""Retry-After in seconds, for statuses after which a retry may succeed."""


def shown(value: Any) -> str:
    """A client's value as text, cut to `MAX_ECHOED_CHARS`."""
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= MAX_ECHOED_CHARS else text[: MAX_ECHOED_CHARS - 1] + "…"


def error_object(error: UserError) -> dict[str, Any]:
    """The error body as a JSON value."""
    text = str(error)
    if len(text) > MAX_MESSAGE_CHARS:  # a chat template may raise its whole input
        text = text[: MAX_MESSAGE_CHARS - 1] + "…"
    kind = TYPES.get(error.status, "invalid_request_error")
    code = error.code or CODES.get(error.status)
    return {"error": {"message": text, "type": kind, "param": None if error.param is None else shown(error.param), "code": code}}


def error_response(error: UserError, headers: dict[str, str] | None = None, **extra: Any) -> web.Response:
    """The HTTP response for `error`. `extra`: more members of the body."""
    return json_response(extra | error_object(error), error.status, retry_header(error) | (headers or {}))


def retry_header(error: UserError) -> dict[str, str]:
    """When to try again, for an error after which that may help. OpenAI's and Anthropic's clients heed x-should-retry."""
    seconds = RETRY_AFTER_S.get(error.status) if error.retry_s is None else error.retry_s
    if seconds is None:
        return {}
    return {"x-should-retry": "false"} if math.isinf(seconds) else {"Retry-After": str(math.ceil(seconds))}


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A response with `body` encoded as JSON."""
    return web.Response(body=msgspec.json.encode(body), status=status, headers=headers, content_type="application/json")


def internal_error(request_id: str) -> UserError:
    """The error for a defect of the server. The log has the traceback."""
    return UserError(f"internal error in request {request_id}; the server's log says more", status=500)
