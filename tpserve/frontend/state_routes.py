"""The HTTP handlers that tell of the server: probes, its version, metrics and configuration. Owns no state."""

from collections.abc import Callable, Sequence
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from tpserve.engine_client.status import EngineState, EngineStatus
from tpserve.frontend.openai.errors import error_response, json_response
from tpserve.frontend.openai.service import SERVICE, not_ready
from tpserve.version import __version__

INFO: web.AppKey[Callable[[], dict[str, Any]]] = web.AppKey("info")


async def health(request: web.Request) -> web.Response:
    """GET /health: 200 when the engine runs, also while an operator has paused it, else 503 with the phase."""
    return state_answer(request.app[SERVICE].status(), ("running", "paused"))


async def ready(request: web.Request) -> web.Response:
    """GET /readyz: 200 when the engine serves requests, else 503 with the phase."""
    return state_answer(request.app[SERVICE].status(), ("running",))


def state_answer(status: EngineStatus, good: Sequence[EngineState]) -> web.Response:
    """The state of the engine as a probe gets it: 200 for a good one."""
    body: dict[str, Any] = {"state": status.state, "phase": status.phase, "percent": status.percent, "reason": status.reason}
    return json_response(body) if status.state in good else error_response(not_ready(status), **body)


async def alive(request: web.Request) -> web.Response:
    """GET /livez, /ping: always 200."""
    return json_response({"state": request.app[SERVICE].status().state})


async def version(_request: web.Request) -> web.Response:
    """GET /version: the version of tpserve."""
    return json_response({"version": __version__})


async def metrics(request: web.Request) -> web.Response:
    """GET /metrics: metrics in the Prometheus text format."""
    return web.Response(body=request.app[SERVICE].request_table.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def server_info(request: web.Request) -> web.Response:
    """GET /server_info: the configuration and the ranks, also during a start."""
    journal = request.app[SERVICE].journal
    return json_response(request.app[INFO]() | {"state_dir": journal.info() if journal is not None else None})


def add_routes(app: web.Application, info: Callable[[], dict[str, Any]]) -> None:
    """Add the routes. `info` returns the body of /server_info."""
    app[INFO] = info
    app.router.add_get("/health", health)
    app.router.add_get("/readyz", ready)
    app.router.add_get("/livez", alive)
    app.router.add_get("/ping", alive)
    app.router.add_get("/version", version)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/server_info", server_info)
