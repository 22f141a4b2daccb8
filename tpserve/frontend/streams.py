"""Answers that outlive a connection: what has come of each, who may read it, how long it stays and how much memory it may take.

Owns those answers from admission to the end of their window; knows no HTTP and no engine. Called from one event loop only.
Invariants:

    id         192 random bits, which only the client has, and the digest of its key: whoever has not both finds nothing
    order      events are numbered as they come, and what is kept never changes: every reader sees the same bytes
    end        each answer ends exactly once: complete, with an error, or because nobody came for it
    window     an answer that nobody reads ends `window_s` after the last reader has left, and is kept `window_s` after its end
    journal    an answer with a `record` is deleted there with the answer, but not at the end of the server
    memory     an answer above `MAX_ANSWER_BYTES` ends; above `MAX_KEPT_BYTES` those that ended first are forgotten first

The position of an event is (T, K): the output tokens, of all choices, that the stream has after it, and for an event that adds
none to those before it a number from 1 on. It is written `T`, or `T.K`. In a `numbered` answer it is (N, 0), the event's
number from 0 on, which its data have, too.
"""

import asyncio
import hmac
import logging
import re
import secrets
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tpserve.errors import UserError
from tpserve.frontend.openai.errors import error_object
from tpserve.frontend.openai.sse import END, event
from tpserve.journal.journal import JournalRecord

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 64 << 20
MAX_KEPT_BYTES = 512 << 20
OVERHEAD_BYTES = 4096
"""What an answer counts beside its bytes, and with `EVENT_BYTES` for each event."""
EVENT_BYTES = 16
READ_BYTES = 64 << 10
"""What a reader takes at once, unless a single event is longer."""

Position = tuple[int, int]
POSITION = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,12}))?")


def parsed_position(text: str) -> Position | None:
    """The position that `T` or `T.K` means; None for any other text."""
    match = POSITION.fullmatch(text)
    return (int(match[1]), int(match[2] or 0)) if match else None


def new_stream_id() -> str:
    """An id that nobody can guess."""
    return secrets.token_urlsafe(24)


def key_digest(id: str, key: str) -> bytes:
    """The digest of a client's key (empty for none) for the answer `id`."""
    return hmac.digest(id.encode(), key.encode(errors="surrogateescape"), "sha256")


class AnswerForm(Protocol):
    """How an answer is written that ends early, and in an API that shows it beside its events, at any time."""

    def failed(self, error: UserError, num_events: int | None = None) -> list[bytes]:
        """The last events of a stream that ends with an error, after `num_events` others."""

    def body(self) -> bytes:
        """The JSON of the answer as far as it is; empty in other APIs."""


class AnswerContext(Protocol):
    """What an API keeps beside an answer, as long as the answer."""

    @property
    def num_bytes(self) -> int:
        """The memory that it takes."""


class ResumableAnswer:
    """One answer: events (`streamed`), a JSON text in `body`, or both. `error`: why it ended early. `form`: until its end.

    `owner`: the digest of its client's key; `request_digest`: of the request. `begun`: whether there is output, for those who ask
    how far it is. `gone`: why nothing is kept any more.
    """

    def __init__(
        self, table: "StreamTable", id: str, owner: bytes, request_digest: bytes, streamed: bool, numbered: bool = False
    ) -> None:
        self.id, self.owner, self.request_digest, self.streamed, self.numbered = id, owner, request_digest, streamed, numbered
        self.body = b""
        self.form: AnswerForm | None = None
        self.context: AnswerContext | None = None
        self.error: UserError | None = None
        self.gone: UserError | None = None
        self.record: JournalRecord | None = None
        self.begun = self.ended = False
        self.num_bytes = OVERHEAD_BYTES
        self._table = table
        self._data = bytearray()
        self._ends = array("q")
        self._tokens = array("q")
        self._readers: set[asyncio.Event] = set()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_late = False
        self._start_timer()

    @property
    def name(self) -> str:
        """The beginning of the id, for the log: the whole is a secret."""
        return f"{self.id[:6]}..."

    @property
    def num_readers(self) -> int:
        """The number of attached readers."""
        return len(self._readers)

    # What comes

    def describe(self, form: AnswerForm, context: AnswerContext | None) -> None:
        """How the answer is written, and what is kept beside it."""
        self.form, self.context = form, context
        self._grow(context.num_bytes if context is not None else 0)

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Let `work` produce the answer; `stop` cancels it."""
        self._task = asyncio.get_running_loop().create_task(work)

    async def recorded(self) -> None:
        """Until what has come so far is in the journal, if there is one."""
        if self.record is not None:
            await self.record.committed()

    async def produced(self) -> None:
        """Until the work for the answer has ended."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def append(self, num_tokens: int, data: bytes) -> None:
        """Keep the next event, after which the stream has `num_tokens` output tokens."""
        if not self.ended:
            self.begun = self.begun or num_tokens > 0
            self._add(num_tokens, data)

    def finish(self, body: bytes = b"") -> None:
        """The answer is complete."""
        if self.num_bytes + len(body) > MAX_ANSWER_BYTES:
            self.give_up(larger_than_kept())
        elif not self.ended:
            self.body = body
            self._end()
            self._grow(len(body))

    def fail(self, error: UserError) -> None:
        """The answer ends with an error, which a stream shows as its last event."""
        if self.ended:
            return
        events = [event(error_object(error)), END] if self.form is None else self.form.failed(error, self.num_events)
        self.body = b"" if self.form is None or self.gone is not None else self.form.body()
        self._end(error)
        num_tokens = self._tokens[-1] if self._tokens else 0
        for data in events if self.streamed else ():
            self._add(num_tokens, data)
        self._grow(len(self.body))

    def stop(self, error: UserError) -> None:
        """End the answer and the work for it, unless it has ended."""
        if self._task is not None:
            self._task.cancel()
        self.fail(error)

    # Who reads

    @contextmanager
    def reader(self) -> Iterator[asyncio.Event]:
        """Attach; the event is set whenever there is news. Several may be attached at once."""
        news = asyncio.Event()
        self._readers.add(news)
        if not self.ended:
            self._stop_timer()
        try:
            yield news
        finally:
            self._readers.discard(news)
            self.touch()

    def touch(self) -> None:
        """Somebody has asked how far the answer is, or has left: the window of a running one begins now."""
        if not self._readers and not self.ended:
            self._start_timer()

    def after(self, position: Position | None) -> int:
        """The index of the first event after `position`; of the first one without."""
        if position is None:
            return 0
        tokens, number = position
        if self.numbered:
            return min(tokens + 1, len(self._ends))
        first, end = bisect_left(self._tokens, tokens), bisect_right(self._tokens, tokens)
        return min(first + number + (tokens > 0), end)

    def read(self, index: int) -> tuple[bytes, int]:
        """The bytes of some events from `index` on, and the index after them; empty when there are none yet."""
        if index >= len(self._ends):
            return b"", index
        begin = self._ends[index - 1] if index else 0
        end = max(index + 1, bisect_right(self._ends, begin + READ_BYTES))
        return bytes(self._data[begin : self._ends[end - 1]]), end

    @property
    def num_events(self) -> int:
        """The number of events so far."""
        return len(self._ends)

    # How long, and how much

    def release(self, gone: UserError) -> None:
        """Keep nothing any more but the reason, which readers get."""
        self.gone = gone
        self._data, self._ends, self._tokens, self.body = bytearray(), array("q"), array("q"), b""
        self.form = self.context = None
        self._table.grown(OVERHEAD_BYTES - self.num_bytes)
        self.num_bytes = OVERHEAD_BYTES
        self._wake()

    def close(self) -> None:
        """Start no timer any more."""
        self._stop_timer()
        self.ended = True

    def _add(self, num_tokens: int, data: bytes) -> None:
        index = len(self._tokens)
        self._tokens.append(num_tokens)
        number = index - bisect_left(self._tokens, num_tokens) + (num_tokens == 0)
        before = len(self._data)
        if self.numbered:
            num_tokens, number = index, 0
        self._data += b"id: %d.%d\n" % (num_tokens, number) if number else b"id: %d\n" % num_tokens
        self._data += data
        self._ends.append(len(self._data))
        self._grow(len(self._data) - before + EVENT_BYTES)

    def _grow(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self._wake()
        self._table.grown(num_bytes)
        if self.num_bytes > MAX_ANSWER_BYTES and not self.ended:
            self.give_up(larger_than_kept())

    def count(self, num_bytes: int) -> None:
        """The answer takes so many bytes elsewhere, which its bounds count, too."""
        self._grow(num_bytes)

    def give_up(self, error: UserError) -> None:
        """End a running answer that takes too much memory; only the error stays."""
        log.warning("the resumable answer %s is ended: %s", self.name, error)
        self.reduce_to(error)

    def suspend(self, error: UserError) -> None:
        """The engine has ended before the answer. With a record the next server goes on, so that the error is no event."""
        if self.record is not None:
            self.record.leave(failed=error.status != 503)
            self.record = None
            self.release(UserError(f"{error}; the next server goes on: ask again", code="engine_unavailable", status=503))
        self.fail(error)

    def reduce_to(self, error: UserError) -> None:
        """End the answer; who reads it and who asks for it gets the error, which is no event of it."""
        self.release(error)
        self.stop(error)

    def _end(self, error: UserError | None = None) -> None:
        self.ended, self.error, self.form = True, error, None
        if self.record is not None:
            self.record.end(error)
        self._wake()
        self._start_timer()
        self._table.ended(self)

    def _wake(self) -> None:
        for news in self._readers:
            news.set()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(self._table.window_s, self._on_time)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_time(self) -> None:
        if not self.ended:
            self.stop(left_alone(self._table.window_s))
        elif self._readers and not self._is_late:  # somebody came at the last moment
            self._is_late = True
            self._start_timer()
        else:
            self._table.remove(self)


class StreamTable:
    """All answers that clients may ask for again. `window_s`: --resume-window; 0 keeps none."""

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self.num_bytes = 0
        self._answers: dict[str, ResumableAnswer] = {}
        self._ended: dict[str, ResumableAnswer] = {}
        """In the order of their ends."""

    def __len__(self) -> int:
        return len(self._answers)

    def open(self, id: str, owner: bytes, request_digest: bytes, streamed: bool, numbered: bool = False) -> ResumableAnswer:
        """A new answer; `owner`: the `key_digest` of its client."""
        answer = ResumableAnswer(self, id, owner, request_digest, streamed, numbered)
        self._answers[id] = answer
        self.grown(answer.num_bytes)
        return answer

    def find(self, id: str, key: str) -> ResumableAnswer:
        """The answer `id` of the client that sent `key`. UserError 404 when there is none, or it belongs to another key."""
        answer, digest = self._answers.get(id), key_digest(id, key)
        if answer is None or not hmac.compare_digest(answer.owner, digest):
            raise UserError(
                "no such stream: it is unknown, belongs to another key, or has been forgotten (--resume-window)",
                code="stream_not_found",
                status=404,
            )
        return answer

    def remove(self, answer: ResumableAnswer) -> None:
        """Forget an answer, and end it if it runs."""
        if self._answers.pop(answer.id, None) is None:
            return
        gone = UserError("the answer is no longer kept", code="stream_not_found", status=404)
        if answer.record is not None:
            answer.record.forget()
        answer.stop(gone)
        self._ended.pop(answer.id, None)
        answer.release(gone)
        answer.close()
        self.num_bytes -= answer.num_bytes

    def close(self) -> None:
        """Forget all answers, but leave their records to the next server."""
        for answer in list(self._answers.values()):
            answer.record = None
            self.remove(answer)

    # Called by answers

    def ended(self, answer: ResumableAnswer) -> None:
        """An answer has ended."""
        self._ended[answer.id] = answer

    def grown(self, num_bytes: int) -> None:
        """An answer takes so many bytes more; make room if that is too much."""
        self.num_bytes += num_bytes
        while num_bytes > 0 and self.num_bytes > MAX_KEPT_BYTES:
            if self._ended:
                self.remove(next(iter(self._ended.values())))
                continue
            running = max(self._answers.values(), key=lambda answer: (not answer.num_readers, answer.num_bytes))
            running.give_up(too_large(f"all answers together are larger than the {MAX_KEPT_BYTES >> 20} MiB that are kept"))


def too_large(why: str) -> UserError:
    """The error of an answer that takes too much memory."""
    return UserError(
        f"the answer was ended: {why}; ask for less at once, or send the request without X-Resumable and background",
        code="stream_too_large",
        status=507,
    )


def larger_than_kept() -> UserError:
    """The error of an answer that is too large by itself."""
    return too_large(f"it is larger than the {MAX_ANSWER_BYTES >> 20} MiB that are kept of one answer")


def left_alone(window_s: float) -> UserError:
    """The error of an answer that nobody came for."""
    return UserError(
        f"the answer was ended: nobody read it for {window_s:g} s (--resume-window)", code="stream_expired", status=410
    )
