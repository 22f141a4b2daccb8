"""A whole server in one process, without torch: the real application and request table over the real scheduler and the
simulated device.

    with serving(tmp_path, api_key=None) as server: server.url, server.engine, server.status

The event loop runs in a thread of its own, so that synchronous clients can be used against it.
"""

import asyncio
import contextlib
import dataclasses
import threading
import time
from array import array
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from aiohttp import web
from msgspec.structs import replace
from tokenizers import Tokenizer as RustTokenizer

from tests.http.tiny_tokenizer import EOS, byte_level, save
from tests.scheduling.simulator import SimulatedDevice
from tpserve.engine_client.control import EngineControl
from tpserve.engine_client.requests import RequestTable
from tpserve.engine_client.status import EngineStatus
from tpserve.frontend.access_log import AccessLogFile
from tpserve.frontend.api_keys import ApiKeys
from tpserve.frontend.app import create_app, runner
from tpserve.frontend.openai.chat_answer import ChatAnswers
from tpserve.journal.journal import Journal
from tpserve.observe.metrics import Metrics
from tpserve.scheduling.scheduler import Scheduler
from tpserve.scheduling.scheduler_config import SchedulerConfig
from tpserve.text.chat import ChatTemplate
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.messages import Abort, Add, EngineInput, Pause, ResetPrefixCache, Resume, Stats, Truncate
from tpserve.types.packed import pack, unpack
from tpserve.types.plan import NewSequence, PromptLogprobs, StepPlan, StepResult, TokenLogprobs
from tpserve.types.sampling import SamplingDefaults

MAX_MODEL_LEN = 256


class Engine:
    """Rank 0's loop in small: inputs in, plans to the simulated device, results back, outputs to the request table."""

    def __init__(self, vocab_size: int, step_s: float) -> None:
        self.limits = SchedulerConfig(
            8, 64, MAX_MODEL_LEN, num_blocks=160, block_size=16, depth=2, sync_sampling=False, eos_ids=(EOS,)
        )
        self.scheduler = Scheduler(self.limits)
        self.device = SimulatedDevice(self.limits, cost_s=lambda plan: 0.0, hop_s=0.0, vocab_size=vocab_size)
        self.step_s = step_s
        self.requests: list[Add] = []
        self.paused = False
        self._inputs: list[EngineInput] = []
        self._admitted: dict[int, NewSequence] = {}
        self._vocab_size = vocab_size

    def send(self, inputs: list[EngineInput]) -> None:
        self._inputs.extend(inputs)

    async def run(self, request_table: RequestTable) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            if not self.paused:
                self.step(time.monotonic())
                request_table.receive([*self.scheduler.take_outputs(), self.scheduler.stats()])

    def step(self, now: float) -> None:
        for message in self._inputs:
            match message:
                case Add():
                    self.requests.append(message)
                    self.scheduler.add(message.request, now)
                case Abort():
                    self.scheduler.abort(message.id, now)
                case Truncate():
                    self.scheduler.truncate(message.id, message.length, now)
                case Pause():
                    self.scheduler.pause(message.mode)
                case Resume():
                    self.scheduler.resume()
                case ResetPrefixCache():
                    self.scheduler.reset_prefix_cache()
        self._inputs.clear()
        plans = []
        while plan := self.scheduler.schedule(now):
            self.device.submit(plan, now)
            plans.append(plan)
            self._admitted |= {new_sequence.slot: new_sequence for new_sequence in plan.new_sequences}
        for plan in plans:
            self.scheduler.apply(self.with_logprobs(plan, self.device.collect(now)), now)

    def with_logprobs(self, plan: StepPlan, result: StepResult) -> StepResult:
        """The simulator draws without probabilities; here is a distribution for each position."""
        drawn, scored = [], []
        for index, (chunk, token) in enumerate(zip(plan.chunks(), unpack(result.tokens), strict=True)):
            new_sequence = self._admitted[chunk.slot]
            stop, num_top = chunk.start + chunk.count, new_sequence.params.logprobs
            if token >= 0 and num_top is not None:
                drawn.append((index, distribution(stop, token, num_top, self._vocab_size)))
            if chunk.score:
                prompt, num_top = unpack(new_sequence.tokens)[: new_sequence.prompt_len], new_sequence.params.prompt_logprobs or 0
                positions = range(chunk.start + 1, min(stop + 1, len(prompt)))
                rows = [distribution(at, prompt[at], num_top, self._vocab_size) for at in positions]
                scored.append((index, packed(num_top, rows)))
        return replace(result, logprobs=tuple(drawn), prompt_logprobs=tuple(scored))


def distribution(position: int, token: int, num_top: int, vocab_size: int) -> TokenLogprobs:
    """What is known of `token` at `position`, where id 3 * position is the likeliest and each next one less so by an eighth."""
    ids = tuple((3 * position + rank) % vocab_size for rank in range(num_top))
    place = (token - 3 * position) % vocab_size
    return TokenLogprobs(-(place + 1) / 8, ids, tuple(-(rank + 1) / 8 for rank in range(num_top)))


def packed(num_top: int, rows: list[TokenLogprobs]) -> PromptLogprobs:
    chosen = array("f", [row.chosen for row in rows]).tobytes()
    top = array("f", [value for row in rows for value in row.top]).tobytes()
    return PromptLogprobs(num_top, chosen, pack(id for row in rows for id in row.top_ids), top)


def until(done: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, "it never happens"
        time.sleep(0.002)


@dataclass(frozen=True)
class Config:
    model: str = "/models/tiny"
    served_model_name: tuple[str, ...] = ("tiny", "org/tiny")
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    api_key: str | None = None
    api_key_file: str | None = None
    admin_api_key: str | None = None
    metrics_key: str | None = None
    host: str = "127.0.0.1"
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    request_timeout: float | None = None
    access_log: str | None = None
    root_path: str = ""
    enable_force_include_usage: bool = False
    enable_per_request_metrics: bool = False
    return_tokens_as_token_ids: bool = False
    log_requests: bool = False
    log_stats: bool = True
    drain_timeout: float = 25.0
    max_num_seqs: int = 8
    max_queued_requests: int = 56
    resume_window: float = 300.0
    state_dir: Path | None = None
    digest: bytes = b""


@dataclass
class Server:
    url: str
    engine: Engine
    request_table: RequestTable
    tokenizer: Tokenizer
    loop: asyncio.AbstractEventLoop
    states: list[EngineStatus] = field(default_factory=list)
    journal: Journal | None = None
    control: EngineControl | None = None

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run something in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)


@contextlib.contextmanager
def serving(
    directory: Path,
    step_s: float = 0.001,
    exposed: bool = False,
    kind: Callable[[], RustTokenizer] = byte_level,
    answers: ChatAnswers | None = None,
    spans: Any = None,
    **config: Any,
) -> Iterator[Server]:
    """Serve on a loopback port until the block ends; `exposed`: as if others could reach it. `server.states[-1]` is what the
    application sees as the engine's state."""
    save(kind(), directory)
    tokenizer = Tokenizer.load(directory)
    engine = Engine(tokenizer.vocab_size, step_s)
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    states = [EngineStatus("running", "serving", 100, "", MAX_MODEL_LEN, tokenizer.vocab_size)]
    settings = Config(**config)
    journals: list[Journal | None] = []
    controls: list[EngineControl] = []
    access_log = None if settings.access_log is None else AccessLogFile(settings.access_log)

    async def start() -> tuple[web.AppRunner, asyncio.Task[None], RequestTable, int]:
        request_table = RequestTable(engine.send, Metrics(settings.served_model_name[0]))
        template = ChatTemplate.load(directory, tokenizer.special_tokens)
        info: Callable[[], dict[str, Any]] = lambda: {"state": states[-1].state}  # noqa: E731
        journal = None if settings.state_dir is None else Journal(settings.state_dir, settings.digest, settings.resume_window)
        journals.append(journal)
        control = EngineControl(engine.send)
        controls.append(control)
        control.attach()

        def on_stats(stats: Stats) -> None:
            request_table.metrics.engine(stats)
            control.on_stats(stats)

        def status() -> EngineStatus:
            paused = control.mode is not None and states[-1].state == "running"
            return dataclasses.replace(states[-1], state="paused", phase=f"paused ({control.mode})") if paused else states[-1]

        request_table.on_stats = on_stats
        app = create_app(
            settings, request_table, status, tokenizer, template, answers or ChatAnswers(),
            journal=journal, info=info, control=control, api_keys=ApiKeys(settings.api_key, settings.api_key_file),
            access_log=access_log, spans=spans, exposed=exposed,
        )  # fmt: skip
        site_runner = runner(app, settings.root_path)
        await site_runner.setup()
        site = web.TCPSite(site_runner, "127.0.0.1", 0)
        await site.start()
        return site_runner, loop.create_task(engine.run(request_table)), request_table, site_runner.addresses[0][1]

    site_runner, task, request_table, port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    server = Server(f"http://127.0.0.1:{port}", engine, request_table, tokenizer, loop, states, journals[0], controls[0])
    try:
        yield server
    finally:
        failed = task.done()
        server.call(site_runner.cleanup())
        loop.call_soon_threadsafe(task.cancel)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        if access_log is not None:
            access_log.close()
        if failed:
            task.result()
