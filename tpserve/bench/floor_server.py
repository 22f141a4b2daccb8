"""The floor of `tpserve bench frontend`: `python -m tpserve.bench.floor_server`, an aiohttp handler that writes the same bytes.

It has the engine's socket of a frontend, so the same engine and the same clients serve it, and nothing else of a frontend: no
checks, no tokenizer, no request table. Every token is an event whose bytes were made before, which the stream's task takes out of
a queue and writes.
"""

import asyncio
import sys

import msgspec
import uvloop
import zmq
from aiohttp import web

from tpserve.bench.stream_load import PATHS, StreamLoad
from tpserve.host.network import LOOPBACK
from tpserve.process.process_utils import die_with
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.messages import Add, Delta
from tpserve.types.packed import pack
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams
from tpserve.wire.channels import EngineServer

HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
END = b"data: [DONE]\n\n"


class FloorJob(msgspec.Struct, frozen=True):
    """What stdin has. `engine`: where to bind the engine's socket. `identity`: of the engine."""

    parent_pid: int
    engine: str
    identity: int
    tokenizer: str
    load: StreamLoad


class _Body(msgspec.Struct):
    temperature: float


class FloorServer:
    """Streams by their ids, each a queue of events."""

    def __init__(self, job: FloorJob) -> None:
        self._engine = EngineServer(job.engine)
        self._engine.attach(job.identity)
        self._queues: dict[int, asyncio.Queue[bytes | None]] = {}
        tokenizer = Tokenizer.load(job.tokenizer)
        self._events = {token: event(tokenizer.token_text(token)) for token in job.load.token_ids}
        self._num_requests, self._output_len = 0, job.load.output_len
        self._body = msgspec.json.Decoder(_Body)
        descriptor = self._engine.socket.get(zmq.FD)
        assert isinstance(descriptor, int)
        asyncio.get_running_loop().add_reader(descriptor, self._receive)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """The handler of every API's path."""
        body = self._body.decode(await request.read())
        self._num_requests += 1
        id, queue = self._num_requests, asyncio.Queue[bytes | None]()
        self._queues[id] = queue
        params = EngineSamplingParams(temperature=body.temperature, max_tokens=self._output_len)
        response = web.StreamResponse(headers=HEADERS)
        await response.prepare(request)
        self._engine.send([Add(Request(id, pack([0]), params, 0))])
        self._receive()  # a send may consume an edge of the descriptor
        while (data := await queue.get()) is not None:
            await response.write(data)
        await response.write(END)
        await response.write_eof()
        return response

    def _receive(self) -> None:
        for message in self._engine.receive():
            if isinstance(message, Delta):
                for token in message.tokens:
                    self._queues[message.id].put_nowait(self._events[token])
                if message.start + len(message.tokens) == self._output_len:
                    self._queues.pop(message.id).put_nowait(None)


def event(text: str) -> bytes:
    """An event as long as one of completions."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}
    chunk = {
        "id": "cmpl-" + "0" * 32, "object": "text_completion", "created": 1_700_000_000, "model": "tidewick",
        "system_fingerprint": "tpserve-0.0.0", "choices": [choice],
    }  # fmt: skip
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


async def serve(job: FloorJob) -> None:
    """Serve for ever; the first line of stdout is the port."""
    floor = FloorServer(job)
    app = web.Application()
    for path in PATHS.values():
        app.router.add_post(path, floor.answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, LOOPBACK, 0, backlog=1024)
    await site.start()
    sys.stdout.write(f"{runner.addresses[0][1]}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=FloorJob)
    die_with(job.parent_pid)
    uvloop.run(serve(job))
