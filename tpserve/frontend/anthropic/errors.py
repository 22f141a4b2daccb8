"""Errors in Anthropic's form, {"type": "error", "error": {type, message}, "request_id"}. Source: Anthropic's API reference."""

from aiohttp import web

from tpserve.errors import UserError
from tpserve.frontend.openai.errors import Json, error_object, json_response, retry_header

PATH = "/v1/messages"
ID_HEADER = "request-id"
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def is_anthropic(path: str) -> bool:
    """Whether a path belongs to this API."""
    return path == PATH or path.startswith(PATH + "/")


def anthropic_error(error: UserError, request_id: str) -> Json:
    """The error body as a JSON value."""
    kind = TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    message = error_object(error)["error"]["message"]
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def anthropic_response(error: UserError, request_id: str, headers: dict[str, str] | None = None) -> web.Response:
    """The HTTP response for `error`."""
    return json_response(anthropic_error(error, request_id), error.status, retry_header(error) | (headers or {}))
