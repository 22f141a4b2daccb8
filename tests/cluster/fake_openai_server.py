"""A stand-in for somebody else's OpenAI server: it says what a test wants it to say, and remembers what it was asked.

    with foreign(lambda call: [b"data: ...\\n\\n", ...]) as server: server.url, server.calls

The function is called with each request and returns the pieces of a stream, or an HTTP status. A piece that is None breaks the
connection off.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass(frozen=True)
class ReceivedCall:
    """One request, and how many came before it."""

    index: int
    path: str
    key: str | None
    body: dict[str, Any]


Script = Callable[[ReceivedCall], int | Sequence[bytes | None]]


@dataclass
class FakeOpenAIServer:
    script: Script
    url: str = ""
    calls: list[ReceivedCall] = field(default_factory=list)
    open: int = 0
    most_open: int = 0

    async def models(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") == "Bearer wrong":
            return web.json_response({"error": {"message": "no such key"}}, status=401)
        return web.json_response({"data": [{"id": "theirs"}]})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        call = ReceivedCall(len(self.calls), request.path, request.headers.get("Authorization"), await request.json())
        self.calls.append(call)
        said = self.script(call)
        if isinstance(said, int):
            return web.json_response({"error": {"message": f"it is {said}"}}, status=said)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in said:
            if piece is None:
                assert request.transport is not None
                request.transport.abort()
                break
            await response.write(piece)
            await asyncio.sleep(0.002)
        self.open -= 1
        return response


@contextmanager
def fake_openai_server(script: Script) -> Iterator[FakeOpenAIServer]:
    """The server, on a port of its own and in a thread of its own."""
    server, loop = FakeOpenAIServer(script), asyncio.new_event_loop()
    app = web.Application()
    app.router.add_get("/v1/models", server.models)
    app.router.add_post("/v1/completions", server.answer)
    app.router.add_post("/v1/chat/completions", server.answer)
    runner = web.AppRunner(app, access_log=None)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = site.name.replace(":0", f":{runner.addresses[0][1]}")

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
