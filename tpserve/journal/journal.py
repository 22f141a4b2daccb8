"""Which answers a frontend leaves to the next one: their requests, the engine's messages about them, their ends.

Owns the state directory. Knows neither HTTP nor how an answer is made of it. Called from one event loop only. Invariants:

    request   is committed before a client learns the answer's id (`committed`)
    frame     the messages of one frame about one answer are one row: its last tokens are never without their Done
    output    is committed before a client sees it (`settled`), unless it would be drawn again equal: then within `BATCH_S`
    failure   with the first error of SQLite the file is deleted and nothing is kept any more; serving goes on
    end       an answer is deleted with its end's window; those of a server that was away for longer are, too
"""

import asyncio
import hmac
import logging
import os
import sqlite3
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from tpserve.errors import UserError
from tpserve.journal.database import Database, Statement, delete
from tpserve.journal.directory import open_directory
from tpserve.types.messages import Delta, RequestOutput

log = logging.getLogger(__name__)

FILE = "answers.db"
BATCH_S = 0.05
STALL_S = 5.0
"""A write that takes longer is a failure: clients wait for it."""
SET_TRIES = "UPDATE answers SET tries = ? WHERE number = ?"
ALIVE_S = 10.0
"""How often the time is noted, by which the next server knows for how long none was there."""


class StoredRequest(Struct, frozen=True, array_like=True):
    """A client's request: what makes the same engine requests of it again.

    `path`: the endpoint. `body`: as the client sent it. `request_id`: the id in its log lines and chunks. `seeds`: of each
    sequence. `max_model_len`, `vocab_size`: the limits under which it was checked. `digest`: of the engine requests.
    `history`: the conversation before it, which the body names by the id of an answer. `key_name`: of its client's key.
    `deadline_s`: when it must have ended, by `time.time`.
    """

    path: str
    body: bytes
    request_id: str
    created_s: int
    seeds: tuple[int, ...]
    max_model_len: int
    vocab_size: int
    digest: bytes
    history: bytes = b""
    key_name: str = ""
    deadline_s: float | None = None


class StoredError(Struct, frozen=True, array_like=True):
    """The error with which an answer has ended."""

    text: str
    param: str | None
    code: str | None
    status: int

    def as_error(self) -> UserError:
        """The error as a client gets it."""
        return UserError(self.text, param=self.param, code=self.code, status=self.status)


@dataclass
class EarlierAnswer:
    """An answer of an earlier process. `owner`: the digest of its client's key. `tries`: how often in a
    row a server has ended while it rebuilt the answer, or by a failure before the answer got anything."""

    number: int
    id: str
    owner: bytes
    num_sequences: int
    ended_s: float | None
    error: StoredError | None
    tries: int
    rebuilding: "asyncio.Task[None] | None" = None

    @property
    def ended(self) -> bool:
        """Whether it has ended, complete or with `error`."""
        return self.ended_s is not None


_frame_encoder = msgspec.msgpack.Encoder()
_frame_decoder = msgspec.msgpack.Decoder(list[RequestOutput])


class JournalRecord:
    """One answer in the journal. The ids of its messages are the indices of its sequences."""

    def __init__(self, journal: "Journal", number: int, num_sequences: int, tries: int = 0) -> None:
        self._journal, self._number, self._tries = journal, number, tries
        self._single = num_sequences == 1
        self._begun = self._begin_committed = False
        self._ended = False

    def append(self, messages: Sequence[RequestOutput]) -> None:
        """Keep the messages of one frame."""
        if not self._begun and any(isinstance(message, Delta) for message in messages):
            self._begun = True
            if self._tries:
                self._journal.write(SET_TRIES, 0, self._number)
        self._journal.write("INSERT INTO frames VALUES (?, ?)", self._number, _frame_encoder.encode(messages))

    async def settled(self) -> None:
        """Until what has come may be shown: it is committed, or would come again equal. With the first token comes what would
        not, such as the number of cached tokens."""
        if self._single and self._begin_committed and self._journal.exact:
            return
        begun = self._begun
        await self._journal.committed()
        self._begin_committed = begun

    async def committed(self) -> None:
        """Until all that has come is committed."""
        await self._journal.committed()

    def end(self, error: UserError | None = None) -> None:
        """The answer has ended, with an error or complete."""
        if self._ended:
            return
        self._ended = True
        stored = None if error is None else msgspec.msgpack.encode(StoredError(str(error), error.param, error.code, error.status))
        sql = "UPDATE answers SET ended_s = ?, error = ? WHERE number = ? AND ended_s IS NULL"
        self._journal.write(sql, time.time(), stored, self._number)

    def leave(self, *, failed: bool) -> None:
        """The server ends before the answer; `failed`: because the engine has, which this answer may have caused if it has got
        nothing from it."""
        self._ended = True
        if failed and not self._begun:
            self._journal.write(SET_TRIES, self._tries + 1, self._number)

    def forget(self) -> None:
        """Delete the answer."""
        self._ended = True
        self._journal.delete(self._number)


class Journal:
    """The table of one server. `exact`: the numerics promise that what is drawn again is equal.

    `earlier`: the answers of an earlier process that are not rebuilt yet, by their ids. `reason`: why nothing is kept any more.
    """

    def __init__(self, directory: Path, digest: bytes, window_s: float) -> None:
        """Open the directory. `digest`: of all that an answer depends on; those of another one end with an error.

        UserError when the directory cannot be used.
        """
        self.directory = directory.expanduser().absolute()
        self.exact = False
        self.reason = ""
        self.earlier: dict[str, EarlierAnswer] = {}
        self.num_waiting = 0
        """The sequences of earlier answers that go on, and are not rebuilt yet."""
        self._window_s = window_s
        self._loop = asyncio.get_running_loop()
        self._pending: list[Statement] = []
        self._batch_timer: asyncio.TimerHandle | None = None
        self._alive_timer: asyncio.TimerHandle | None = None
        self._writes: deque[asyncio.Event] = deque()
        """Set when the write is committed, or nothing is kept any more. In order; those that are not."""
        self._lock = open_directory(self.directory)
        self._next_number = 1
        self._database: Database | None = None
        try:
            self._database = self._open(self.directory / FILE)
            self._load(self._database, digest)
        except sqlite3.Error as error:
            self._turn_off(str(error))
        else:
            self._note_alive()

    # Answers

    def open(self, id: str, owner: bytes, request: StoredRequest) -> JournalRecord:
        """Keep a new answer."""
        number, count = self._next_number, len(request.seeds)
        self._next_number += 1
        sql = "INSERT INTO answers (number, id, owner, num_sequences, request) VALUES (?, ?, ?, ?, ?)"
        self.write(sql, number, id, owner, count, msgspec.msgpack.encode(request))
        return JournalRecord(self, number, count)

    def find(self, id: str, owner: bytes) -> EarlierAnswer | None:
        """The answer `id` of an earlier process, if it is not rebuilt yet and belongs to `owner`."""
        answer = self.earlier.get(id)
        return answer if answer is not None and hmac.compare_digest(answer.owner, owner) else None

    async def read(self, answer: EarlierAnswer) -> tuple[StoredRequest, list[list[RequestOutput]]]:
        """The request of an answer and the frames that have come. UserError when they cannot be read."""
        try:
            database = self._live_database()
            request, frames = await database.submit(partial(read_answer, database, answer.number))
            return msgspec.msgpack.decode(request, type=StoredRequest), [_frame_decoder.decode(frame) for frame in frames]
        except (sqlite3.Error, msgspec.DecodeError) as error:
            self._turn_off(str(error))
            raise UserError(f"the answer is lost: {error}", code="stream_lost", status=500) from error

    async def resume(self, answer: EarlierAnswer) -> JournalRecord:
        """Go on with the record of an earlier answer; the attempt is noted first, for it may end this process."""
        self.write(SET_TRIES, answer.tries + 1, answer.number)
        await self.committed()
        return JournalRecord(self, answer.number, answer.num_sequences, answer.tries)

    def rebuilt(self, answer: EarlierAnswer) -> None:
        """The answer is one of this process now."""
        self.write(SET_TRIES, answer.tries, answer.number)
        if self.earlier.pop(answer.id, None) is not None and not answer.ended:
            self.num_waiting -= answer.num_sequences

    def delete(self, number: int) -> None:
        """Delete an answer."""
        self.write("DELETE FROM frames WHERE answer = ?", number)
        self.write("DELETE FROM answers WHERE number = ?", number)

    # Writing

    def write(self, sql: str, *values: Any) -> None:
        """Execute a statement with the next batch."""
        if self.reason:
            return
        self._pending.append((sql, values))
        if self._batch_timer is None:
            self._batch_timer = self._loop.call_later(BATCH_S, self._flush)

    async def committed(self) -> None:
        """Until all statements so far are committed, or nothing is kept any more."""
        self._flush()
        if self._writes:
            await self._writes[-1].wait()

    def info(self) -> dict[str, Any]:
        """For /server_info."""
        return {"path": str(self.directory), "state": "off" if self.reason else "on", "reason": self.reason}

    def close(self) -> None:
        """Write what is left, and close the file and the directory."""
        self._write_alive()
        self._flush()
        for timer in (self._batch_timer, self._alive_timer):
            if timer is not None:
                timer.cancel()
        if self._database is not None:
            self._database.close()
        os.close(self._lock)

    def _flush(self) -> None:
        if self._batch_timer is not None:
            self._batch_timer.cancel()
            self._batch_timer = None
        if self._pending and self._database is not None:
            statements, self._pending = self._pending, []
            self._writes.append(asyncio.Event())
            stall = self._loop.call_later(STALL_S, self._turn_off, f"a write takes more than {STALL_S:g} s")
            self._database.submit(partial(self._database.write, statements)).add_done_callback(partial(self._on_written, stall))

    def _live_database(self) -> Database:
        if self._database is None:
            raise UserError(f"the state directory is off: {self.reason}", code="stream_lost", status=500)
        return self._database

    def _on_written(self, stall: asyncio.TimerHandle, write: "asyncio.Future[None]") -> None:
        stall.cancel()
        if not write.cancelled() and (error := write.exception()) is not None:
            self._turn_off(str(error))
        elif self._writes:  # they end in the order in which they began
            self._writes.popleft().set()

    def _turn_off(self, reason: str) -> None:
        """Keep nothing any more: what would be found later is not what clients have seen."""
        if self.reason:
            return
        self.reason = reason
        log.error("--state-dir %s is off, answers end with this process: %s", self.directory, reason)
        self.earlier.clear()
        self.num_waiting = 0
        self._pending.clear()
        while self._writes:
            self._writes.popleft().set()
        if self._database is not None:
            self._database.submit(self._database.discard)
            self._database.close(wait_s=0)
            self._database = None

    def _write_alive(self) -> None:
        self.write("INSERT OR REPLACE INTO facts VALUES ('alive_s', ?)", time.time())

    def _note_alive(self) -> None:
        self._write_alive()
        oldest_s = time.time() - self._window_s
        for answer in [each for each in self.earlier.values() if each.ended_s is not None and each.ended_s < oldest_s]:
            if answer.rebuilding is None:
                self.delete(answer.number)
                del self.earlier[answer.id]
        self._alive_timer = self._loop.call_later(ALIVE_S, self._note_alive)

    # Reading

    def _open(self, path: Path) -> Database:
        try:
            return Database(path)
        except (sqlite3.Error, ValueError) as error:
            log.warning("%s cannot be read, its answers are lost: %s", path, error)
            delete(path)
            return Database(path)

    def _load(self, database: Database, digest: bytes) -> None:
        """Delete what is too old, mark what belongs to another model, and list the rest."""
        execute, now_s = database.connection.execute, time.time()
        facts = dict(execute("SELECT name, value FROM facts"))
        oldest_s = now_s - self._window_s
        execute("BEGIN")
        if facts.get("alive_s", now_s) < oldest_s:
            execute("DELETE FROM answers WHERE ended_s IS NULL")
        execute("DELETE FROM answers WHERE ended_s < ?", (oldest_s,))
        execute("DELETE FROM frames WHERE answer NOT IN (SELECT number FROM answers)")
        if facts.get("digest", digest) != digest:
            error = StoredError(
                "the answer was begun by a server of another model or configuration (--state-dir)", None, "stream_refused", 410
            )
            sql = "UPDATE answers SET error = ?, ended_s = ? WHERE error IS NULL"
            if count := execute(sql, (msgspec.msgpack.encode(error), now_s)).rowcount:
                log.warning("%d answers in %s are refused: they belong to another model or configuration", count, self.directory)
        execute("INSERT OR REPLACE INTO facts VALUES ('digest', ?)", (digest,))
        execute("COMMIT")
        columns = "number, id, owner, num_sequences, ended_s, error, tries"
        for number, id, owner, count, ended_s, error_data, tries in execute(f"SELECT {columns} FROM answers ORDER BY number"):
            stored = None if error_data is None else msgspec.msgpack.decode(error_data, type=StoredError)
            self.earlier[id] = EarlierAnswer(number, id, owner, count, ended_s, stored, tries)
            self.num_waiting += count if ended_s is None else 0
        self._next_number = max((answer.number for answer in self.earlier.values()), default=0) + 1


def read_answer(database: Database, number: int) -> tuple[bytes, list[bytes]]:
    """An answer's request and frames as they are stored."""
    execute = database.connection.execute
    (request,) = execute("SELECT request FROM answers WHERE number = ?", (number,)).fetchone()
    frames = execute("SELECT messages FROM frames WHERE answer = ? ORDER BY rowid", (number,))
    return request, [messages for (messages,) in frames]
