"""The HTTP application: routes, middlewares, request ids and the error body.

Owns no state but that of `OpenAIServing`. Never opens sockets (`process` does), never logs a prompt. Every response has an
x-request-id header; every error has the OpenAI body.
"""

import asyncio
import logging
import secrets
import string
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler

from tpserve.engine_client.control import EngineControl
from tpserve.engine_client.recovery import SEAMLESS
from tpserve.engine_client.requests import RequestTable
from tpserve.engine_client.status import EngineStatus
from tpserve.errors import UserError
from tpserve.frontend import admin_routes, openapi, page, reload, state_routes, traffic
from tpserve.frontend.access import KEY_OWNER, AccessSettings, Origins, require_key
from tpserve.frontend.access_log import AccessLogFile, log_access
from tpserve.frontend.anthropic import routes as anthropic
from tpserve.frontend.anthropic.errors import ID_HEADER, anthropic_response, is_anthropic
from tpserve.frontend.api_keys import NO_LIMITS, NOBODY, ApiKeys
from tpserve.frontend.deadline import ARRIVED_S
from tpserve.frontend.endpoints import ENDPOINTS
from tpserve.frontend.http_errors import JsonErrorRunner
from tpserve.frontend.key_usage import KeyUsage
from tpserve.frontend.open_requests import OpenRequests
from tpserve.frontend.openai import resumable, routes
from tpserve.frontend.openai.admission import REQUEST_ID
from tpserve.frontend.openai.body import MAX_BODY_BYTES
from tpserve.frontend.openai.chat_answer import ChatAnswers
from tpserve.frontend.openai.errors import error_response, internal_error, shown
from tpserve.frontend.openai.rebuild import rebuild_running
from tpserve.frontend.openai.sender import RESUMPTION
from tpserve.frontend.openai.service import SERVICE, OpenAIServing
from tpserve.frontend.reload import Reloader
from tpserve.frontend.responses import routes as responses
from tpserve.frontend.streams import StreamTable
from tpserve.frontend.tracing import note_trace
from tpserve.journal.journal import Journal
from tpserve.observe.spans import SpanExporter
from tpserve.structured_output.checker import GrammarChecker
from tpserve.text.chat import ChatTemplate
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.sampling import SamplingDefaults
from tpserve.version import __version__

log = logging.getLogger(__name__)
http_log = logging.getLogger(f"{__name__}.http")

ID_CHARS = frozenset(string.ascii_letters + string.digits + "-_.:/+=")
MAX_ID_CHARS = 128
OTHER_TASKS = frozenset({"embeddings", "rerank", "score", "classify", "pooling", "transcriptions", "translations", "speech"})
"""The last part of paths that other servers have, for models that do not generate text."""


class Settings(AccessSettings, Protocol):
    """The fields of the resolved configuration that the application reads."""

    @property
    def model(self) -> str: ...
    @property
    def served_model_name(self) -> tuple[str, ...]: ...
    @property
    def sampling_defaults(self) -> SamplingDefaults: ...
    @property
    def log_requests(self) -> bool: ...
    @property
    def request_timeout(self) -> float | None: ...
    @property
    def root_path(self) -> str: ...
    @property
    def enable_force_include_usage(self) -> bool: ...
    @property
    def enable_per_request_metrics(self) -> bool: ...
    @property
    def return_tokens_as_token_ids(self) -> bool: ...
    @property
    def log_stats(self) -> bool: ...
    @property
    def drain_timeout(self) -> float: ...
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_queued_requests(self) -> int: ...
    @property
    def resume_window(self) -> float: ...


def create_app(
    settings: Settings,
    request_table: RequestTable,
    status: Callable[[], EngineStatus],
    tokenizer: Tokenizer,
    chat_template: ChatTemplate,
    answers: ChatAnswers,
    *,
    journal: Journal | None = None,
    info: Callable[[], dict[str, Any]],
    control: EngineControl,
    api_keys: ApiKeys,
    access_log: AccessLogFile | None = None,
    spans: SpanExporter | None = None,
    exposed: bool,
    reloader: Reloader | None = None,
) -> web.Application:
    """The application; serve it through `runner`. `info` returns the body of /server_info. `exposed`: listens beyond loopback."""
    origins = Origins(settings, api_keys.required, exposed)
    middlewares = [report_errors, origins.middleware(), require_key(settings, api_keys, exposed)]
    if settings.log_requests:
        middlewares.insert(0, traffic.log_request)
    if access_log is not None:
        middlewares.insert(0, log_access(access_log.write))
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=middlewares)
    grammars = GrammarChecker(tokenizer)
    grammars.prepare().result()  # holds the interpreter lock, and nothing is served yet
    key_usage = KeyUsage(settings.served_model_name[0] if settings.served_model_name else settings.model)
    request_table.metrics.registry.register(key_usage)
    app[SERVICE] = OpenAIServing(
        names=settings.served_model_name or (settings.model,),
        root=settings.model,
        created_s=int(time.time()),
        max_open=settings.max_num_seqs + settings.max_queued_requests,
        request_table=request_table,
        status=status,
        tokenizer=tokenizer,
        chat_template=chat_template,
        defaults=settings.sampling_defaults,
        grammars=grammars,
        open_requests=OpenRequests(request_table, key_usage),
        request_timeout_s=settings.request_timeout,
        spans=spans,
        forces_usage=settings.enable_force_include_usage,
        shows_times=settings.enable_per_request_metrics,
        tokens_as_ids=settings.return_tokens_as_token_ids,
        answers=answers,
        streams=StreamTable(settings.resume_window),
        journal=journal,
    )
    app.on_response_prepare.append(add_headers)
    app.on_response_prepare.append(origins.on_prepare)
    app.on_response_prepare.append(add_limits)
    app.cleanup_ctx.append(traffic.log_traffic(request_table, status, settings.drain_timeout, settings.log_stats))
    if journal is not None:
        app.cleanup_ctx.append(go_on)
    app.on_shutdown.append(forget_answers)
    routes.add_routes(app)
    resumable.add_routes(app)
    responses.add_routes(app)
    anthropic.add_routes(app)
    page.add_routes(app)
    admin_routes.add_routes(app, control)
    reload.add_routes(app, reloader or Reloader())
    state_routes.add_routes(app, info)
    openapi.add_routes(app, settings.root_path)
    return app


def runner(app: web.Application, root_path: str = "") -> web.AppRunner:
    """The runner of an application. A handler is cancelled when its client leaves. `root_path`: see `JsonErrorRunner`.

    Bodies are never decompressed: a small one could become gigabytes of work for the event loop.
    """
    http_log.addFilter(is_server_error)
    return JsonErrorRunner(app, root_path, handler_cancellation=True, auto_decompress=False, access_log=None, logger=http_log)


def is_server_error(record: logging.LogRecord) -> bool:
    """A log filter that drops aiohttp's tracebacks about malformed requests and lost clients, which get status 400 or nothing."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | web.RequestPayloadError | ConnectionError)


async def go_on(app: web.Application) -> AsyncGenerator[None, None]:
    """Go on with the answers of the server before this one; at the end leave what is open to the next."""
    service = app[SERVICE]
    assert service.journal is not None
    running = asyncio.get_running_loop().create_task(rebuild_running(service))
    yield
    tasks = [running, *(earlier.rebuilding for earlier in service.journal.earlier.values() if earlier.rebuilding is not None)]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    service.journal.close()


async def forget_answers(app: web.Application) -> None:
    """End what runs without a client, at the end of the server."""
    app[SERVICE].streams.close()


@web.middleware
async def report_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The middleware that sets the request id and turns every exception into an error body."""
    header = request.headers.get("x-request-id", "")
    valid = 0 < len(header) <= MAX_ID_CHARS and ID_CHARS.issuperset(header)
    request[REQUEST_ID] = header if valid else secrets.token_hex(16)
    request[ARRIVED_S] = time.monotonic()
    note_trace(request)
    try:
        return await handler(request)
    except UserError as error:
        return error_answer(request, error)
    except web.HTTPException as error:
        return error_answer(request, to_http_error(error, request), allow_header(error))
    except ConnectionError:
        raise  # the client has left
    except Exception:  # a defect of the server: the client gets 500, the log the traceback
        log.exception("request %s to %s failed", request[REQUEST_ID], traffic.route_of(request))
        return error_answer(request, internal_error(request[REQUEST_ID]))


def error_answer(request: web.Request, error: UserError, headers: dict[str, str] | None = None) -> web.Response:
    """The response for an error, in the form of the API that was asked."""
    if is_anthropic(request.path):
        return anthropic_response(error, request[REQUEST_ID], headers)
    return error_response(error, headers)


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Set the headers that every response has."""
    response.headers["Server"] = f"tpserve/{__version__}"
    if request.method == "POST" and request.app[SERVICE].status().resumption == SEAMLESS:
        response.headers[RESUMPTION] = SEAMLESS
    response.headers["x-request-id"] = request.get(REQUEST_ID) or secrets.token_hex(16)
    if is_anthropic(request.path):
        response.headers[ID_HEADER] = response.headers["x-request-id"]


async def add_limits(request: web.Request, response: web.StreamResponse) -> None:
    """Set the headers about the limits of a key, in answers to requests that count."""
    owner = request.get(KEY_OWNER, NOBODY)
    if owner.limits != NO_LIMITS and request.method == "POST" and request.path in ENDPOINTS:
        response.headers.update(request.app[SERVICE].open_requests.key_usage.headers(owner))


def to_http_error(error: web.HTTPException, request: web.Request) -> UserError:
    """An error of aiohttp's as a UserError, with the same status."""
    match error:
        case web.HTTPNotFound() if (task := request.path.rpartition("/")[2]) in OTHER_TASKS and request.method == "POST":
            return UserError(
                f"{task} is not supported by this server: its model generates text", code="unsupported_endpoint", status=400
            )
        case web.HTTPNotFound():
            return UserError(f"no such route: {request.method} {shown(request.path)}", code="not_found", status=404)
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            return UserError(f"{request.path} takes {allowed}, not {request.method}", code="method_not_allowed", status=405)
        case web.HTTPRequestEntityTooLarge():
            return UserError(f"the body is larger than {MAX_BODY_BYTES >> 20} MiB", code="body_too_large", status=413)
    return UserError(error.reason or "request failed", status=error.status)


def allow_header(error: web.HTTPException) -> dict[str, str]:
    """The Allow header of a 405 (RFC 9110); nothing for other errors."""
    return {"Allow": ", ".join(sorted(error.allowed_methods))} if isinstance(error, web.HTTPMethodNotAllowed) else {}
