"""The engine of `tpserve bench frontend`: `python -m tpserve.bench.fake_engine`, a rank 0 without a model.

It speaks the wire protocol of rank 0 with a real frontend, or only that of the engine's socket with the floor's server. A round
begins when the requests of all streams have come. Then each step sends one frame with a token of every stream, and the last one
ends them.

Pace: the client says over a pipe how many steps may have been sent, each time as a 32-bit number. With a rate the steps come at
their times from the first such number on, however far the client is.
"""

import os
import select
import sys
import time
from collections.abc import Iterator

import msgspec

from tpserve.bench.stream_load import StreamLoad, stream_of, tokens_of
from tpserve.process.orders import Stopped
from tpserve.process.process_utils import die_with
from tpserve.process.rank_agent import RankAgent
from tpserve.process.signals import block_signals
from tpserve.types.messages import Abort, Add, Delta, Done, EngineOutput, MemoryLedger, PhaseTimes, Stats
from tpserve.types.packed import INT32_BYTES
from tpserve.types.request import Request
from tpserve.wire.channels import EngineLink, wait

START_S = 60.0
POLL_S = 0.2
FLOOR_IDENTITY = 1
"""The identity of an engine that is attached without a coordinator."""
TIMES = PhaseTimes(0.001, 0.01, 1.0)


class EngineJob(msgspec.Struct, frozen=True):
    """What stdin has. `control`: the coordinator's endpoint; empty for the floor's server, which has none."""

    parent_pid: int
    frontend_pid: int
    control: str
    engine: str
    pace: int
    """The descriptor of the pipe from the client."""
    max_model_len: int
    vocab_size: int
    load: StreamLoad


class FakeEngine:
    """The rounds of a load over one link. `over`: whether the coordinator has ended the service."""

    def __init__(self, job: EngineJob, link: EngineLink, rank_agent: RankAgent | None) -> None:
        self._load, self._link, self._rank_agent, self._pace = job.load, link, rank_agent, job.pace
        self._open: dict[int, list[int]] = {}
        self._steps = self._prompt_tokens = self._generated = 0

    @property
    def over(self) -> bool:
        """Whether to end."""
        return self._rank_agent is not None and self._rank_agent.over

    def run(self) -> None:
        """Serve rounds until the service ends."""
        while not self.over:
            requests = self._admitted()
            if len(requests) == self._load.streams:
                self._serve(requests)

    def _admitted(self) -> list[Request]:
        """The requests of a round, once all have come; fewer when the service ends."""
        requests = dict[int, Request]()
        while len(requests) < self._load.streams and not self.over:
            for message in self._receive(POLL_S):
                match message:
                    case Add(request):
                        requests[request.id] = request
                        self._prompt_tokens += len(request.prompt) // INT32_BYTES
                    case Abort(id):
                        requests.pop(id, None)
                        self._link.send([Done(id, "abort", 0)])
        return list(requests.values())

    def _serve(self, requests: list[Request]) -> None:
        """One round: every step of all its streams."""
        self._open = {request.id: tokens_of(self._load, stream_of(request.params.temperature)) for request in requests}
        for step in self._paced_steps():
            for message in self._receive(0):
                if isinstance(message, Abort) and self._open.pop(message.id, None) is not None:
                    self._link.send([Done(message.id, "abort", step)])
            if self.over:
                return
            self._link.send(self._outputs(step))

    def _outputs(self, step: int) -> list[EngineOutput]:
        """The frame of a step."""
        outputs: list[EngineOutput] = [Delta(id, step, (tokens[step],)) for id, tokens in self._open.items()]
        last = step + 1 == self._load.output_len
        if last:
            outputs += [Done(id, "length", len(tokens), times=TIMES) for id, tokens in self._open.items()]
        self._steps += 1
        self._generated += len(self._open)
        running = 0 if last else len(self._open)
        outputs.append(Stats(running, 0, running, 1 << 20, 0, self._steps, self._prompt_tokens, self._generated))
        return outputs

    def _paced_steps(self) -> Iterator[int]:
        """The numbers of the steps of a round, each when it may be sent."""
        allowed, begin_s, rate = self._read_pace(None), time.monotonic(), self._load.rate
        for step in range(self._load.output_len):
            if rate is not None:
                time.sleep(max(0.0, begin_s + step / rate - time.monotonic()))
            while rate is None and allowed <= step and not self.over:
                allowed = max(allowed, self._read_pace(POLL_S))
            yield step
        while rate is not None and allowed < self._load.output_len and not self.over:
            allowed = max(allowed, self._read_pace(POLL_S))  # what the client still says belongs to this round

    def _read_pace(self, timeout_s: float | None) -> int:
        """The last number in the pipe; 0 when none comes in time. Without a time it waits until one comes or the service ends."""
        poll = select.poll()
        poll.register(self._pace, select.POLLIN)
        while not poll.poll(POLL_S * 1e3 if timeout_s is None else timeout_s * 1e3):
            if timeout_s is not None or self.over:
                return 0
        data = os.read(self._pace, 1 << 16)
        if not data:
            raise SystemExit(0)  # the client has ended
        return int.from_bytes(data[-4:], "little")

    def _receive(self, timeout_s: float) -> list[object]:
        sources = [] if self._rank_agent is None else [self._rank_agent]
        if timeout_s:
            wait(timeout_s, self._link, *sources)
        return list(self._link.poll(0))


def main() -> int:
    """Serve until the frontend says Stop, or the parent ends; returns the exit code."""
    block_signals()
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineJob)
    if not job.control:
        die_with(job.parent_pid)
        FakeEngine(job, EngineLink(job.engine, FLOOR_IDENTITY), None).run()
        return 0
    rank_agent = RankAgent(0, job.control, host="here", frontend_pid=job.frontend_pid, agent_pid=job.parent_pid)
    rank_agent.start()
    try:
        rank_agent.hello({}, {"version": "1"}, {})
        rank_agent.wait_start(START_S)
        link = EngineLink(job.engine, rank_agent.identity)
        heads = {"first_head": 0, "end_head": 1, "first_kv_head": 0, "end_kv_head": 1}
        ledger = MemoryLedger(0, 0, 0, 0, 0, 0, 0, 1 << 20, 16, job.max_model_len)
        rank_agent.ready(ledger, {"max_model_len": job.max_model_len, "vocab_size": job.vocab_size, **heads})
        rank_agent.wait_run(START_S)
        FakeEngine(job, link, rank_agent).run()
    except Stopped:
        pass
    return rank_agent.leave()


if __name__ == "__main__":
    sys.exit(main())
