"""What goes wrong below the application, in the API's error body: requests that are no HTTP, headers that are too long and the
like. aiohttp answers these by itself, in plain text or HTML; here its answers are replaced on their way out."""

import secrets

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from tpserve.errors import UserError
from tpserve.frontend.openai.errors import error_response, shown
from tpserve.version import __version__


class JsonErrors(RequestHandler):
    """A connection of which every answer with an error has the error body."""

    __slots__ = ()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send `resp`, in words of ours where they are aiohttp's."""
        return await super().finish_response(request, in_json(resp), start_time)


class Server(web.Server):
    """Makes a `JsonErrors` of each connection."""

    def __call__(self) -> RequestHandler:
        return JsonErrors(self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """Serves an application so."""

    async def _make_server(self) -> Server:
        made = await super()._make_server()
        return Server(
            made.request_handler,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            loop=made._loop,
            **made._kwargs,
        )


def in_json(answer: web.StreamResponse) -> web.StreamResponse:
    """The answer itself, unless it is an error of aiohttp's."""
    if answer.status < 400 or answer.content_type == "application/json" or not isinstance(answer, web.Response):
        return answer
    words = " ".join((answer.text or answer.reason or "request failed").split())
    if answer.status == 400:
        error = UserError(f"the request is no valid HTTP: {shown(words)}", code="invalid_http")
    else:
        error = UserError(shown(words), status=answer.status)
    result = error_response(error, {"Server": f"tpserve/{__version__}", "x-request-id": secrets.token_hex(16)})
    if not answer.keep_alive:
        result.force_close()
    return result
