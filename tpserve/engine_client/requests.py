"""Every open request: its sequences, their output so far, and the client that waits for it.

Owns the sequences from admission to their end, and their ids. Never touches sockets, text rules or validation. Called from one
event loop only. Invariants:

    entry     a sequence is in the table from `open` until its end: Done, a stop string, an abort or a failure
    end       each sequence ends exactly once, and so does each handle; later messages of the engine about it are dropped
    delta     accepted only at the expected position; any other is dropped
    recovery  the table outlives the engine: `resubmission` has every open sequence for the next one, with its output so far
    scores    the same, and before the first delta; the engine may repeat scores that are known
    buffer    output that waits for a slow client merges into one `OutputDelta` a sequence, so the request's length bounds it
    stepwise  the deltas of such a handle depend on the tokens and their order alone, not on frames or on when a reader takes
    frame     readers hear of output once a frame, after all of it is in the table

A `RequestHandle` is one client's request: n choices of m prompts are n * m sequences, numbered by `index`.
"""

import asyncio
import itertools
import logging
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from msgspec.structs import replace

from tpserve.coordinator.actions import Cause
from tpserve.engine_client.quarantine import Quarantine
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
    RequestOutput,
    Stats,
    Truncate,
)
from tpserve.types.packed import INT32_BYTES
from tpserve.types.request import Request

log = logging.getLogger(__name__)

QUARANTINED = "the request has ended the engine twice and is not tried again; the others go on"


@dataclass(eq=False)
class RequestState:
    """One sequence of a handle. `arrived_s` and `token_s` are times of the table's clock, `queue_s` is a duration."""

    request: Request
    index: int
    assembler: Assembler
    handle: "RequestHandle"
    arrived_s: float
    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    token_s: "array[float]" = field(default_factory=lambda: array("d"))
    """The arrival time of each token of the output."""
    cached_tokens: int = 0
    queue_s: float = 0.0
    closed: bool = False

    @property
    def prompt_tokens(self) -> int:
        """The number of tokens of the prompt."""
        return len(self.request.prompt) // INT32_BYTES

    @property
    def missing_scores(self) -> PromptScores | None:
        """The prompt's log probabilities, while the engine has not sent all of them; else None."""
        scores = self.assembler.scores if self.request.params.prompt_logprobs is not None else None
        return None if scores is None or scores.complete else scores


class OutputSink(Protocol):
    """What takes the output of a handle at once, on the table's call. Both raise nothing."""

    def take(self) -> bool:
        """Take the output of the handle, or return False: the handle's reader wakes."""

    def flush(self) -> None:
        """Pass on what was taken. Comes after the `take` of all handles of a frame, so that they go out together."""


class RequestHandle:
    """A client's request. One reader waits and takes; the request table writes.

    `streaming`: the reader wakes for output, not only for the end. `sink`: takes the output of a frame instead, while it is set;
    ends and failures always wake. `stepwise`: `take` returns a delta of its own for each token that shows
    something, in the order of arrival. `keep` gets the engine's messages about the sequences, frame by frame, with
    their indices for ids; fed to another table they have the same effect.
    """

    def __init__(self, streaming: bool, stepwise: bool = False) -> None:
        self.sequences: list[RequestState] = []
        self.failure: UserError | None = None
        """Set when the request fails; its `status` is the HTTP status."""
        self.cut_off = False
        """Set when it fails only because the engine has ended."""
        self.stepwise = stepwise
        self.keep: Callable[[list[RequestOutput]], None] | None = None
        self.sink: OutputSink | None = None
        self.on_end: Callable[[RequestHandle], None] | None = None
        """Called once, when all sequences have ended."""
        self._streaming = streaming
        self._steps: list[tuple[RequestState, OutputDelta]] = []
        self._num_open = 0
        self._wake = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether all sequences have ended."""
        return self._num_open == 0

    @property
    def has_steps(self) -> bool:
        """Whether there are deltas of a stepwise handle to take."""
        return bool(self._steps)

    async def wait(self) -> None:
        """Sleep until there is output to take or the handle has ended; without streaming only the end wakes."""
        await self._wake.wait()
        self._wake.clear()

    def wake(self) -> None:
        """Let `wait` return, though there may be nothing to take."""
        self._wake.set()

    def take(self) -> list[tuple[RequestState, OutputDelta]]:
        """The output since the last call, unless stepwise at most one delta per sequence. Raises a failed request's failure."""
        if self.failure is not None:
            raise self.failure
        if self.stepwise:
            steps, self._steps = self._steps, []
            return steps
        return [(sequence, delta) for sequence in self.sequences if (delta := sequence.assembler.take()) is not None]

    def _add(self, sequence: RequestState) -> None:
        self.sequences.append(sequence)
        self._num_open += 1

    def _close(self) -> None:
        self._num_open -= 1
        if self.ended or self._streaming:
            self._wake.set()
        if self.ended and self.on_end is not None:
            self.on_end(self)

    def _notify(self) -> OutputSink | None:
        """There is output to take. Returns the sink that has taken it."""
        if not self._streaming:
            return None
        if self.sink is not None and self._num_open and self.failure is None and self.sink.take():
            return self.sink
        self._wake.set()
        return None

    def _step(self, sequence: RequestState) -> None:
        """Keep what a sequence shows as a delta of its own; the handle is stepwise."""
        if self.stepwise and self.failure is None and (delta := sequence.assembler.take()) is not None:
            self._steps.append((sequence, delta))


class RequestTable:
    """All open sequences. `send` passes messages to the engine and never blocks; `clock` returns seconds."""

    def __init__(
        self,
        send: Callable[[list[EngineInput]], None],
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = Metrics("model") if metrics is None else metrics
        self._send = send
        self._clock = clock
        self._open: dict[int, RequestState] = {}
        self._ids = itertools.count()
        self._quarantine = Quarantine()
        self._news: dict[RequestHandle, None] = {}
        """Handles with output in the frame that is received."""
        self._gaps_s: list[float] = []
        """The times between the tokens of that frame and those before them."""
        self.on_stats: Callable[[Stats], None] = self.metrics.engine

    @property
    def num_open(self) -> int:
        """The number of open sequences."""
        return len(self._open)

    @property
    def open_sequences(self) -> list[RequestState]:
        """All open sequences, oldest first."""
        return list(self._open.values())

    def next_id(self) -> int:
        """A new request id; none is used twice."""
        return next(self._ids)

    def open(self, requests: Sequence[tuple[Request, Assembler]], *, streaming: bool, stepwise: bool = False) -> RequestHandle:
        """Admit a client's request: all its sequences in the order of their indices, each with the assembler of its output.

        With `params.prompt_logprobs` the assembler has `scores` to fill. When the request cannot be sent, the handle fails.
        """
        handle, now = RequestHandle(streaming, stepwise), self._clock()
        for index, (request, assembler) in enumerate(requests):
            sequence = RequestState(request, index, assembler, handle, now)
            self._open[request.id] = sequence
            handle._add(sequence)
        self._admit(handle.sequences)
        return handle

    def suspend(self) -> None:
        """There is no engine until `resubmission`."""
        self._quarantine.suspend()

    def adopt(self, past: "RequestTable") -> None:
        """Take over the open sequences of another table, whose ids are unknown here, and send them with their output so far."""
        sequences, past._open = past.open_sequences, {}
        self._open.update({sequence.request.id: sequence for sequence in sequences})
        self._admit(sequences)

    def _admit(self, sequences: Sequence[RequestState]) -> None:
        ids = [sequence.request.id for sequence in sequences]
        try:
            self._submit(self._quarantine.admit(ids))
        except Exception as error:  # it cannot be encoded; nothing was sent, and no other request is affected
            log.exception("requests %s cannot be sent to the engine", ids)
            for sequence in sequences:
                self._fail(sequence, f"the request cannot be sent to the engine: {error}", 500)

    def resubmission(self, cause: Cause) -> list[EngineInput]:
        """What a new engine has to know first. `cause`: of the faults before it. Fails requests that kill engines."""
        for id in self._quarantine.judge(cause):
            if (sequence := self._open.get(id)) is not None:
                log.error("request %d has killed the engine again and again: it is ended", id)
                self.metrics.quarantined()
                self._fail_handle(sequence, QUARANTINED, 500, "request_quarantined")
        return self._adds(self._quarantine.resend())

    def _adds(self, ids: Sequence[int]) -> list[EngineInput]:
        """The open sequences of `ids`, with their output so far."""
        found = [self._open[id] for id in ids if id in self._open]
        return [Add(replace(sequence.request, output=sequence.tokens.tobytes())) for sequence in found]

    def _submit(self, ids: Sequence[int]) -> None:
        if ids and (adds := self._adds(ids)):
            self._send(adds)

    def abort(self, handle: RequestHandle) -> None:
        """End the open sequences of a handle whose client has left, or of which one sequence has failed."""
        still_open = [sequence for sequence in handle.sequences if not sequence.closed]
        for sequence in still_open:
            sequence.assembler.abandon("abort")
            self._close(sequence, "abort")
        if still_open:
            self._send([Abort(sequence.request.id) for sequence in still_open])

    def fail(self, handle: RequestHandle, error: UserError) -> None:
        """End a request with an error that is not the engine's: its deadline has come, or an operator ends it."""
        if not handle.ended:
            handle.failure = handle.failure or error
            self.abort(handle)

    def fail_all(self, text: str, status: int) -> None:
        """The engine has ended: fail every open request with `text` and the HTTP `status`. Sends nothing to the engine."""
        self._quarantine = Quarantine()  # nothing is sent any more
        for sequence in list(self._open.values()):
            sequence.handle.cut_off = sequence.handle.cut_off or sequence.handle.failure is None
            self._fail(sequence, text, status)

    def receive(self, outputs: Sequence[EngineOutput]) -> bool:
        """Process one frame of the engine; whether it has a token. A Done is in the same frame as its sequence's last tokens."""
        stops = {
            message.id: message.num_tokens
            for message in outputs
            if isinstance(message, Done) and message.finish == "stop" and not message.by_grammar
        }
        kept: dict[RequestHandle, list[RequestOutput]] = {}
        now = self._clock()
        for message in outputs:
            if isinstance(message, Stats):
                self.on_stats(message)
            elif (sequence := self._open.get(message.id)) is not None:
                if sequence.handle.keep is not None:
                    kept.setdefault(sequence.handle, []).append(replace(message, id=sequence.index))
                try:
                    self._on_message(sequence, message, stops.get(message.id), now)
                except Exception as error:  # a defect in the text or the log probabilities of one request
                    log.exception("request %d fails in the frontend", message.id)
                    self._fail_handle(
                        sequence, f"the server met an error of its own with this request: {type(error).__name__}", 500
                    )
                    self._send([Abort(message.id)])
                if message.id in self._quarantine.unproven:
                    self._submit(self._quarantine.prove(message.id))
        for handle, messages in kept.items():
            assert handle.keep is not None
            handle.keep(messages)
        self.metrics.next_tokens(self._gaps_s)
        news, self._news, self._gaps_s = self._news, {}, []
        for sink in [sink for handle in news if (sink := handle._notify()) is not None]:
            sink.flush()
        return any(isinstance(message, Delta) for message in outputs)

    def _on_message(self, sequence: RequestState, message: RequestOutput, stops_at: int | None, now: float) -> None:
        """Process one message. `stops_at`: the final length, if a Done of the same frame says that the sequence has stopped."""
        match message:
            case Delta():
                self._on_delta(sequence, message, stops_at == message.start + len(message.tokens), now)
            case PromptLogprobsChunk():
                self._on_prompt_logprobs(sequence, message)
            case Done():
                self._on_done(sequence, message)

    def _fail_handle(self, sequence: RequestState, text: str, status: int, code: str = "") -> None:
        """Fail the whole handle of a sequence: a client gets all choices or an error."""
        if not sequence.closed:
            self._fail(sequence, text, status, code)
        self.abort(sequence.handle)

    def _on_prompt_logprobs(self, sequence: RequestState, chunk: PromptLogprobsChunk) -> None:
        scores = sequence.missing_scores
        if scores is None or not scores.push(chunk.start, chunk.logprobs):
            log.warning("scores of sequence %d at %d dropped", chunk.id, chunk.start)
        elif scores.complete:
            for other in sequence.handle.sequences:  # the other choices of the prompt show them too
                sequence.handle._step(other)
            self._news[sequence.handle] = None

    def _on_delta(self, sequence: RequestState, delta: Delta, stops: bool, now: float) -> None:
        assembler, handle = sequence.assembler, sequence.handle
        scored = assembler.scores is not None and sequence.missing_scores is not None
        if delta.start != len(sequence.tokens) or scored:
            log.warning("tokens of sequence %d at %d dropped, expected %d", delta.id, delta.start, len(sequence.tokens))
            return
        if not sequence.token_s:
            self.metrics.first_token(now - sequence.arrived_s)
            sequence.cached_tokens, sequence.queue_s = delta.cached_tokens, delta.queue_s
        else:
            self._gaps_s.append(now - sequence.token_s[-1])
        sequence.tokens.extend(delta.tokens)
        if handle.stepwise:
            for at in range(len(delta.tokens)):
                last = at + 1 == len(delta.tokens)
                assembler.push(delta.tokens[at : at + 1], delta.logprobs[at : at + 1], stops=stops and last)
                handle._step(sequence)
        else:
            assembler.push(delta.tokens, delta.logprobs, stops=stops)
        for _ in range(assembler.num_tokens - len(sequence.token_s)):
            sequence.token_s.append(now)
        if assembler.finish is not None:  # a stop string; the client gets its answer before the engine stops
            self._close(sequence, assembler.finish)
            self._send([Truncate(delta.id, assembler.num_tokens)])
        elif handle.has_steps or assembler.has_news:
            self._news[handle] = None

    def _on_done(self, sequence: RequestState, done: Done) -> None:
        error = done.error
        if done.finish in ("stop", "length") and done.num_tokens != len(sequence.tokens):
            error = f"tokens were lost: {len(sequence.tokens)} of {done.num_tokens} arrived"
        elif done.finish in ("stop", "length") and sequence.missing_scores is not None:
            error = "scores of the prompt were lost"
        elif done.finish in ("stop", "length"):
            sequence.assembler.end(done.finish, done.stop_id)
            self._close(sequence, done.finish, done.times)
            return
        status = 503 if done.finish == "abort" else 400 if done.by_grammar else 500
        self._fail_handle(sequence, error or "the engine aborted the request", status)

    def _fail(self, sequence: RequestState, text: str, status: int, code: str = "") -> None:
        code = code or {400: "invalid_grammar", 500: "engine_error"}.get(status, "engine_unavailable")
        sequence.handle.failure = sequence.handle.failure or UserError(text, code=code, status=status)
        sequence.assembler.abandon("error")
        self._close(sequence, "error")

    def _close(self, sequence: RequestState, reason: FinishReason, times: PhaseTimes | None = None) -> None:
        sequence.closed = True
        sequence.handle._step(sequence)
        del self._open[sequence.request.id]
        since_s = self._clock() - sequence.arrived_s
        self.metrics.ended(reason, since_s, sequence.prompt_tokens, sequence.assembler.num_tokens, times)
        sequence.handle._close()
        self._submit(self._quarantine.end(sequence.request.id))
