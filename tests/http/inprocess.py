"""A whole server in one process, without torch: the real application and journal over the real scheduler and the ledger device.

    with serving(tmp_path, api_key=None) as server: server.url, server.engine, server.status

The event loop runs in a thread of its own, so that synchronous clients can be used against it.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from aiohttp import web
from msgspec.structs import replace

from tests.http.tiny_tokenizer import EOS, byte_level, save
from tpserve.frontend.app import create_app, runner
from tpserve.frontend.journal import Journal
from tpserve.frontend.status import Status
from tpserve.scheduling.ledger import LedgerDevice
from tpserve.scheduling.limits import Limits
from tpserve.scheduling.scheduler import Scheduler
from tpserve.text.chat import ChatTemplate
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.messages import Abort, Add, Cut, EngineInput
from tpserve.types.packed import unpack
from tpserve.types.plan import StepPlan, StepResult, TokenLogprobs

MAX_MODEL_LEN = 256


class Engine:
    """Rank 0's loop in small: inputs in, plans to the ledger device, results back, outputs to the journal."""

    def __init__(self, vocab_size: int, step_s: float) -> None:
        self.limits = Limits(8, 64, MAX_MODEL_LEN, num_blocks=160, block_size=16, depth=2, feedback=False, eos_ids=(EOS,))
        self.scheduler = Scheduler(self.limits)
        self.device = LedgerDevice(self.limits, cost_s=lambda plan: 0.0, hop_s=0.0, vocab_size=vocab_size)
        self.step_s = step_s
        self.requests: list[Add] = []
        self.paused = False
        self._inputs: list[EngineInput] = []
        self._asked: dict[int, int | None] = {}

    def send(self, inputs: list[EngineInput]) -> None:
        self._inputs.extend(inputs)

    async def run(self, journal: Journal) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            if not self.paused:
                self.step(time.monotonic())
                journal.receive([*self.scheduler.take(), self.scheduler.stats()])

    def step(self, now: float) -> None:
        for message in self._inputs:
            match message:
                case Add():
                    self.requests.append(message)
                    self.scheduler.add(message.request, now)
                case Abort():
                    self.scheduler.abort(message.id, now)
                case Cut():
                    self.scheduler.cut(message.id, message.length, now)
        self._inputs.clear()
        plans = []
        while plan := self.scheduler.schedule(now):
            self.device.submit(plan, now)
            plans.append(plan)
            self._asked |= {admission.slot: admission.params.logprobs for admission in plan.admissions}
        for plan in plans:
            self.scheduler.apply(self.with_logprobs(plan, self.device.collect(now)), now)

    def with_logprobs(self, plan: StepPlan, result: StepResult) -> StepResult:
        """The ledger draws without probabilities; give the chosen token the best one."""
        entries = []
        for index, (slot, token) in enumerate(zip(unpack(plan.slots), unpack(result.tokens), strict=True)):
            if token >= 0 and (count := self._asked[slot]) is not None:
                ids = (token, *(i for i in range(10, 40) if i != token))[:count]
                entries.append((index, TokenLogprobs(-0.125, ids, tuple(-0.125 * (i + 1) for i in range(len(ids))))))
        return replace(result, logprobs=tuple(entries))


@dataclass(frozen=True)
class Config:
    model: str = "/models/tiny"
    served_model_name: tuple[str, ...] = ("tiny", "org/tiny")
    api_key: str | None = None
    max_num_seqs: int = 8
    max_queued_requests: int = 56


@dataclass
class Server:
    url: str
    engine: Engine
    journal: Journal
    tokenizer: Tokenizer
    loop: asyncio.AbstractEventLoop
    states: list[Status] = field(default_factory=list)

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run something in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)


@contextlib.contextmanager
def serving(directory: Path, step_s: float = 0.001, **config: Any) -> Iterator[Server]:
    """Serve on a loopback port until the block ends. `server.states[-1]` is what the application sees as the engine's state."""
    save(byte_level(), directory)
    tokenizer = Tokenizer.load(directory)
    engine = Engine(tokenizer.vocab_size, step_s)
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    states = [Status("running", "serving", 100, "", MAX_MODEL_LEN, tokenizer.vocab_size)]
    settings = Config(**config)

    async def start() -> tuple[web.AppRunner, asyncio.Task[None], Journal, int]:
        journal = Journal(engine.send, settings.served_model_name[0])
        app = create_app(settings, journal, lambda: states[-1], tokenizer, ChatTemplate.load(directory))
        site_runner = runner(app)
        await site_runner.setup()
        site = web.TCPSite(site_runner, "127.0.0.1", 0)
        await site.start()
        return site_runner, loop.create_task(engine.run(journal)), journal, site_runner.addresses[0][1]

    site_runner, task, journal, port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    server = Server(f"http://127.0.0.1:{port}", engine, journal, tokenizer, loop, states)
    try:
        yield server
    finally:
        failed = task.done()
        server.call(site_runner.cleanup())
        loop.call_soon_threadsafe(task.cancel)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        if failed:
            task.result()
