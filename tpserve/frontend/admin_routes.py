"""The HTTP handlers of operators: pause and resume, ending requests, the prefix cache. The admin key opens them. Owns no state.

Names and answers are vLLM's; /abort_request is SGLang's.
"""

from typing import cast, get_args

from aiohttp import web
from msgspec import Struct

from tpserve.engine_client.control import EngineControl
from tpserve.errors import UserError
from tpserve.frontend.openai.body import parse, read_object
from tpserve.frontend.openai.errors import json_response, shown
from tpserve.frontend.openai.service import SERVICE
from tpserve.frontend.responses.preparation import PREFIX
from tpserve.types.messages import PauseMode

CONTROL = web.AppKey("control", EngineControl)
MODES = (*get_args(PauseMode), "abort")
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


class AbortRequest(Struct, frozen=True, kw_only=True):
    """POST /abort_request. `request_id` (or `rid`): ids of requests or answers."""

    request_id: str | list[str] | None = None
    abort_all: bool = False


async def pause(request: web.Request) -> web.Response:
    """POST /pause: begin no request any more; answers when no step runs. `mode`: keep, wait or abort."""
    mode, clears = request.query.get("mode", "keep"), BOOLEANS.get(request.query.get("clear_cache", "false").lower())
    if mode not in MODES:
        raise UserError(f"mode is {', '.join(MODES)}, got {shown(mode)}", param="mode", code="invalid_value")
    if clears is None:
        raise UserError("clear_cache is true or false", param="clear_cache", code="invalid_value")
    control, num_aborted = request.app[CONTROL], 0
    if mode == "abort":
        num_aborted = request.app[SERVICE].open_requests.abort()
    await control.pause("keep" if mode == "abort" else cast(PauseMode, mode))
    if clears:
        await control.reset_prefix_cache()
    return json_response({"status": "paused", "mode": control.mode, "num_aborted": num_aborted})


async def resume(request: web.Request) -> web.Response:
    """POST /resume: end a pause."""
    request.app[CONTROL].resume()
    return json_response({"status": "resumed"})


async def is_paused(request: web.Request) -> web.Response:
    """GET /is_paused: whether there is a pause, and its mode."""
    mode = request.app[CONTROL].mode
    return json_response({"is_paused": mode is not None, "mode": mode})


async def abort_request(request: web.Request) -> web.Response:
    """POST /abort_request: end requests by their ids, or all."""
    service = request.app[SERVICE]
    call, _ = parse(await read_object(request, service.large_bodies), AbortRequest, service.logged_fields)
    ids = [call.request_id] if isinstance(call.request_id, str) else call.request_id or []
    if bool(ids) == call.abort_all:
        raise UserError("give either rid, the id or ids of requests, or abort_all", param="rid", code="invalid_value")
    found = None if call.abort_all else frozenset(ids) | frozenset(id.removeprefix(PREFIX) for id in ids)
    num_aborted = service.open_requests.abort(found)
    if not (num_aborted or call.abort_all):
        raise UserError("no open request has such an id", param="rid", code="request_not_found", status=404)
    return json_response({"num_aborted": num_aborted})


async def reset_prefix_cache(request: web.Request) -> web.Response:
    """POST /reset_prefix_cache: find nothing any more of what has been computed so far. Requests that run go on."""
    await request.app[CONTROL].reset_prefix_cache()
    return json_response({"status": "reset"})


def add_routes(app: web.Application, control: EngineControl) -> None:
    """Add the routes of this module."""
    app[CONTROL] = control
    app.router.add_post("/pause", pause)
    app.router.add_post("/resume", resume)
    app.router.add_get("/is_paused", is_paused)
    app.router.add_post("/abort_request", abort_request)
    app.router.add_post("/reset_prefix_cache", reset_prefix_cache)
