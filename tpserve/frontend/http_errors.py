"""The API's error body for errors below the application, such as malformed HTTP or headers that are too long.

aiohttp answers these by itself in plain text or HTML; this module replaces those answers before they are sent.
"""

import secrets
from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from tpserve.errors import UserError
from tpserve.frontend.openai.errors import error_response, shown
from tpserve.version import __version__


class JsonErrors(RequestHandler):
    """A connection whose error responses have the API's error body."""

    __slots__ = ()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send `resp`, or its replacement."""
        return await super().finish_response(request, with_json_error(resp), start_time)


class Server(web.Server):
    """Creates a `JsonErrors` for each connection."""

    def __call__(self) -> RequestHandler:
        return JsonErrors(self, loop=self._loop, **self._kwargs)


class JsonErrorRunner(web.AppRunner):
    """An `AppRunner` whose connections are `JsonErrors`. A path that begins with `root_path` is taken without it."""

    def __init__(self, app: web.Application, root_path: str = "", **options: Any) -> None:
        super().__init__(app, **options)
        self._root_path = root_path

    async def _make_server(self) -> Server:
        server = await super()._make_server()
        return Server(
            server.request_handler,
            request_factory=self._without_root(server.request_factory) if self._root_path else server.request_factory,
            handler_cancellation=server.handler_cancellation,
            loop=server._loop,
            **server._kwargs,
        )

    def _without_root(self, make: Callable[..., web.BaseRequest]) -> Callable[..., web.BaseRequest]:
        def make_request(message: Any, *rest: Any) -> web.BaseRequest:
            rest_of_path = message.url.raw_path.removeprefix(self._root_path)
            if message.path.startswith(self._root_path) and rest_of_path[:1] in ("", "/"):
                url = message.url.with_path(rest_of_path or "/", encoded=True, keep_query=True)
                message = message._replace(url=url, path=str(url))
            return make(message, *rest)

        return make_request


def with_json_error(response: web.StreamResponse) -> web.StreamResponse:
    """The response itself, or the API's error body for an error of aiohttp's."""
    if response.status < 400 or response.content_type == "application/json" or not isinstance(response, web.Response):
        return response
    text = " ".join((response.text or response.reason or "request failed").split())
    if response.status == 400:
        error = UserError(f"the request is no valid HTTP: {shown(text)}", code="invalid_http")
    else:
        error = UserError(shown(text), status=response.status)
    result = error_response(error, {"Server": f"tpserve/{__version__}", "x-request-id": secrets.token_hex(16)})
    if not response.keep_alive:
        result.force_close()
    return result
