"""Every open request: what was asked, what has come, and who waits for it.

Owns the sequences between admission and their one terminal, and their numbers. Never touches sockets, text rules or
validation. Called from one event loop only. Invariants:

    entry     in the request table from `open` until its terminal: Done, a stop string, abort or failure; then it is gone
    terminal  exactly one a sequence and one a handle; whatever the engine says later about a closed id is dropped
    delta     taken only at the expected position; any other belongs to a past the client never saw, and is dropped
    scores    as deltas, and before the first of them; what is known already may come again
    buffer    what waits for a slow client merges into one piece a sequence, so it is bounded by what the request may produce

A `RequestHandle` is one client's request: n choices of one or several prompts are as many sequences, `index` tells them apart.
"""

import asyncio
import itertools
import logging
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tpserve.errors import UserError
from tpserve.observe.metrics import Metrics
from tpserve.text.assembler import Assembler, OutputDelta
from tpserve.text.logprob_entries import PromptScores
from tpserve.types.messages import (
    Abort,
    Add,
    Delta,
    Done,
    EngineInput,
    EngineOutput,
    FinishReason,
    PhaseTimes,
    PromptLogprobsChunk,
    Stats,
    Truncate,
)
from tpserve.types.packed import INT32_BYTES
from tpserve.types.request import Request

log = logging.getLogger(__name__)


@dataclass(eq=False)
class RequestState:
    """A sequence of a handle, from `open` to its terminal and, for its handle, beyond."""

    request: Request
    index: int
    assembler: Assembler
    handle: "RequestHandle"
    arrived_s: float
    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    token_s: "array[float]" = field(default_factory=lambda: array("d"))
    """When each token came that the client is given."""
    cached_tokens: int = 0
    queue_s: float = 0.0
    closed: bool = False

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt) // INT32_BYTES

    @property
    def unscored(self) -> PromptScores | None:
        """The scores that the engine still owes this sequence."""
        scores = self.assembler.scores if self.request.params.prompt_logprobs is not None else None
        return None if scores is None or scores.complete else scores


class RequestHandle:
    """A client's request. One reader waits for news; the request table writes."""

    def __init__(self, streaming: bool) -> None:
        self.sequences: list[RequestState] = []
        self.failure: UserError | None = None
        """Set when the request cannot go on; `status` says with which answer it ends."""
        self._streaming = streaming
        self._num_open = 0
        self._wake = asyncio.Event()

    @property
    def ended(self) -> bool:
        return self._num_open == 0

    async def wait(self) -> None:
        """Sleep until there are pieces to take or the handle ended; without streaming only the end wakes."""
        await self._wake.wait()
        self._wake.clear()

    def take(self) -> list[tuple[RequestState, OutputDelta]]:
        """Everything that became visible, at most one piece a sequence. Raises the failure, if that is the end."""
        if self.failure is not None:
            raise self.failure
        return [(sequence, delta) for sequence in self.sequences if (delta := sequence.assembler.take()) is not None]

    def _opened(self, sequence: RequestState) -> None:
        self.sequences.append(sequence)
        self._num_open += 1

    def _closed(self) -> None:
        self._num_open -= 1
        if self.ended or self._streaming:
            self._wake.set()

    def _news(self) -> None:
        if self._streaming:
            self._wake.set()


class RequestTable:
    """All open sequences. `send` takes what the engine must hear, and never blocks."""

    def __init__(
        self, send: Callable[[list[EngineInput]], None], model_name: str = "model", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.metrics = Metrics(model_name)
        self._send = send
        self._clock = clock
        self._open: dict[int, RequestState] = {}
        self._ids = itertools.count()

    @property
    def num_open(self) -> int:
        """Sequences whose client still waits."""
        return len(self._open)

    @property
    def open_sequences(self) -> list[RequestState]:
        return list(self._open.values())

    def next_id(self) -> int:
        """A number for a request, never given again."""
        return next(self._ids)

    def open(self, requests: Sequence[tuple[Request, Assembler]], *, streaming: bool) -> RequestHandle:
        """Admit what a client asked for: all its sequences, in the order of their indices, each with what assembles its output.

        With `params.prompt_logprobs` the assembler has the scores to fill.
        """
        handle, now = RequestHandle(streaming), self._clock()
        for index, (request, assembler) in enumerate(requests):
            sequence = RequestState(request, index, assembler, handle, now)
            self._open[request.id] = sequence
            handle._opened(sequence)
        try:
            self._send([Add(request) for request, _ in requests])
        except Exception as error:  # what cannot be encoded: nothing was sent, and nothing else is affected
            log.exception("requests %s cannot be sent to the engine", [request.id for request, _ in requests])
            for sequence in handle.sequences:
                self._fail(sequence, f"the request cannot be sent to the engine: {error}", 500)
        return handle

    def abort(self, handle: RequestHandle) -> None:
        """The client is gone, or has no use for the rest. Nothing happens to sequences that ended."""
        left = [sequence for sequence in handle.sequences if not sequence.closed]
        for sequence in left:
            sequence.assembler.abandon("abort")
            self._close(sequence, "abort")
        if left:
            self._send([Abort(sequence.request.id) for sequence in left])

    def fail_all(self, text: str, status: int) -> None:
        """The engine is gone: every open request ends with `text`. Nothing is sent to the engine."""
        for sequence in list(self._open.values()):
            self._fail(sequence, text, status)

    def receive(self, outputs: Sequence[EngineOutput]) -> None:
        """One frame of the engine. A Done travels in the frame of its sequence's last tokens."""
        stops = {message.id: message.num_tokens for message in outputs if isinstance(message, Done) and message.finish == "stop"}
        for message in outputs:
            if isinstance(message, Stats):
                self.metrics.engine(message)
            elif (sequence := self._open.get(message.id)) is not None:
                try:
                    self._take(sequence, message, stops.get(message.id))
                except Exception as error:  # the text, the scores or the log probabilities of one request
                    log.exception("request %d fails in the frontend", message.id)
                    self._give_up(sequence, f"the server met an error of its own with this request: {type(error).__name__}", 500)
                    self._send([Abort(message.id)])

    def _take(self, sequence: RequestState, message: PromptLogprobsChunk | Delta | Done, stops_at: int | None) -> None:
        """`stops_at`: the length at which a Done of the same frame says that the sequence has stopped."""
        match message:
            case PromptLogprobsChunk():
                self._scored(sequence, message)
            case Delta():
                self._delta(sequence, message, stops_at == message.start + len(message.tokens))
            case Done():
                self._done(sequence, message)

    def _give_up(self, sequence: RequestState, text: str, status: int) -> None:
        """End the client's whole request: half an answer is none."""
        if not sequence.closed:
            self._fail(sequence, text, status)
        self.abort(sequence.handle)

    def _scored(self, sequence: RequestState, chunk: PromptLogprobsChunk) -> None:
        scores = sequence.unscored
        if scores is None or not scores.push(chunk.start, chunk.logprobs):
            log.warning("scores of sequence %d at %d dropped", chunk.id, chunk.start)
        elif scores.complete:
            sequence.handle._news()  # other choices may have waited for them

    def _delta(self, sequence: RequestState, delta: Delta, stops: bool) -> None:
        if delta.start != len(sequence.tokens) or sequence.unscored is not None:
            log.warning("tokens of sequence %d at %d dropped, expected %d", delta.id, delta.start, len(sequence.tokens))
            return
        now = self._clock()
        if not sequence.token_s:
            self.metrics.first_token(now - sequence.arrived_s)
            sequence.cached_tokens, sequence.queue_s = delta.cached_tokens, delta.queue_s
        else:
            self.metrics.next_token(now - sequence.token_s[-1])
        sequence.tokens.extend(delta.tokens)
        sequence.assembler.push(delta.tokens, delta.logprobs, stops=stops)
        sequence.token_s.extend([now] * (sequence.assembler.num_tokens - len(sequence.token_s)))
        if sequence.assembler.finish is not None:  # a stop string: the client has its answer before the engine knows
            self._close(sequence, sequence.assembler.finish)
            self._send([Truncate(delta.id, sequence.assembler.num_tokens)])
        elif sequence.assembler.has_news:
            sequence.handle._news()

    def _done(self, sequence: RequestState, done: Done) -> None:
        error = done.error
        if done.finish in ("stop", "length") and done.num_tokens != len(sequence.tokens):
            error = f"tokens were lost: {len(sequence.tokens)} of {done.num_tokens} arrived"
        elif done.finish in ("stop", "length") and sequence.unscored is not None:
            error = "scores of the prompt were lost"
        elif done.finish in ("stop", "length"):
            sequence.assembler.end(done.finish, done.stop_id)
            self._close(sequence, done.finish, done.times)
            return
        self._give_up(sequence, error or "the engine gave the request up", 503 if done.finish == "abort" else 500)

    def _fail(self, sequence: RequestState, text: str, status: int) -> None:
        code = "engine_error" if status == 500 else "engine_unavailable"
        sequence.handle.failure = sequence.handle.failure or UserError(text, code=code, status=status)
        sequence.assembler.abandon("error")
        self._close(sequence, "error")

    def _close(self, sequence: RequestState, reason: FinishReason, times: PhaseTimes | None = None) -> None:
        sequence.closed = True
        del self._open[sequence.request.id]
        since_s = self._clock() - sequence.arrived_s
        self.metrics.ended(reason, since_s, sequence.prompt_tokens, sequence.assembler.num_tokens, times)
        sequence.handle._closed()
