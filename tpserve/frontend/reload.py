"""POST /reload: a running server takes over other flags, or other weights of the same shape.

Owns the order: a child process checks, with nothing stopped; then the ranks start again, and only once they run does the frontend
take over its part. Clients notice a pause. Decides neither what may change (`config/reload`) nor how ranks start (`coordinator`).
"""

import asyncio
import os
import sys
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct

from tpserve.config.reload import Candidate, ReloadQuestion, ReloadVerdict
from tpserve.engine_client.engine_client import EngineClient
from tpserve.engine_client.reloads import busy
from tpserve.errors import UserError
from tpserve.frontend.openai.body import read_object
from tpserve.frontend.openai.errors import json_response
from tpserve.frontend.openai.service import SERVICE

CHECK = "tpserve.reload_check"
NOT_SERVE = "this server was not started by `tpserve serve`: nobody starts its ranks again with other flags; start it anew"


class Reloader:
    """`present`: what the server runs with; None where it cannot reload."""

    def __init__(self, engine_client: EngineClient | None = None, present: Candidate | None = None) -> None:
        self._engine_client = engine_client
        self._present = present
        self._checking = False

    def adopt(self, candidate: Candidate) -> None:
        """The ranks run with another configuration."""
        self._present = candidate

    async def reload(self, values: dict[str, Any]) -> dict[str, Any]:
        """Change flags. Returns the answer once requests run again. UserError: nothing has happened, or it was taken back."""
        if self._engine_client is None or self._present is None:
            raise UserError(NOT_SERVE, code="reload_not_possible")
        if self._checking:
            raise busy()
        self._checking = True
        try:
            candidate = await _check(self._present, values)
        finally:
            self._checking = False
        self._refuse_shorter(candidate)
        record = await self._engine_client.reload(candidate)
        if record.outcome != "done":
            raise UserError(
                f"the ranks could not start: {record.reason}; the configuration before is back", code="reload_failed", status=500
            )
        took_s = round(record.took_s or 0.0, 3)
        return {"status": "reloaded", "changes": record.changes, "resumption": record.resumption, "took_s": took_s}

    def _refuse_shorter(self, candidate: Candidate) -> None:
        assert self._engine_client is not None
        config, now = candidate.config, self._engine_client.status().max_model_len
        if now is not None and config.max_model_len < now:
            raise UserError(
                f"--max-model-len {config.max_model_len} is less than the present {now}, which open requests may need: start the "
                "server anew",
                param="max_model_len",
            )


async def _check(present: Candidate, values: dict[str, Any]) -> Candidate:
    """Ask `tpserve.reload_check`. UserError with its words."""
    question = msgspec.json.encode(ReloadQuestion(present, values))
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(sys.executable, "-m", CHECK, str(os.getpid()), stdin=pipe, stdout=pipe)
    try:
        answer, _ = await child.communicate(question)
    finally:
        if child.returncode is None:  # the client has left
            child.kill()
            await child.wait()
    if child.returncode:
        raise UserError("the check of the new configuration failed: see the server's log", code="reload_failed", status=500)
    verdict = msgspec.json.decode(answer, type=ReloadVerdict)
    if verdict.candidate is None:
        raise UserError(verdict.error, param=verdict.param, code="invalid_value")
    return verdict.candidate


class ReloadRequest(Struct, frozen=True):
    """POST /reload: an object of flags by name; `tpserve.reload_check` knows them."""


RELOADER = web.AppKey("reloader", Reloader)


async def reload(request: web.Request) -> web.Response:
    """POST /reload: the flags that change, by name; an empty object starts the ranks again with the files as they are now."""
    values = await read_object(request, request.app[SERVICE].large_bodies)
    return json_response(await request.app[RELOADER].reload(values))


def add_routes(app: web.Application, reloader: Reloader) -> None:
    """Add the route of this module."""
    app[RELOADER] = reloader
    app.router.add_post("/reload", reload)
