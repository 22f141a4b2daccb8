"""The clients of `tpserve bench frontend`: `python -m tpserve.bench.stream_reader`, one process, a raw socket for each stream.

It reads what comes, takes HTTP's chunks and the events apart, compares every stream with what the engine sends for it, and says
over a pipe how many steps the engine may have sent: `WINDOW` more than all streams have. Beside that it looks at the server's
processor time and memory. For each round it writes a line of JSON to stdout.
"""

import os
import select
import socket
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from tpserve.bench.report import percentile
from tpserve.bench.stream_load import PATHS, StreamApi, StreamLoad, body_of, lost_and_mixed, texts_of
from tpserve.process.process_utils import die_with
from tpserve.text.tokenizer import Tokenizer

WINDOW = 1
"""Steps that are sent and not read by all: with one, each token is an event of its own, however slow the server is."""
SILENT_S = 60.0
"""A round in which nothing comes for so long has lost what is missing."""
READ_BYTES = 1 << 18
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class ReaderJob(msgspec.Struct, frozen=True):
    """What stdin has. `server_pid`: the process that is measured. `pace`: the descriptor of the pipe to the engine."""

    parent_pid: int
    server_pid: int
    host: str
    port: int
    tokenizer: str
    pace: int
    load: StreamLoad


class RoundFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One round. `lost`, `mixed`: streams without their end, and with what is not theirs. `events`: that carried text.

    `server_s`, `client_s`: processor time from the first token on. `step_p50_ms`: between two steps that all streams have.
    `open_s`: from the first connection until all streams have begun.
    """

    tokens: int
    events: int
    bytes_read: int
    lost: int
    mixed: int
    duration_s: float
    server_s: float
    client_s: float
    open_s: float
    step_p50_ms: float
    step_p99_ms: float
    rss_begin: int
    rss_end: int
    rss_peak: int
    failure: str = ""


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    text: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    text: str | None = None
    delta: _Delta | None = None


class _Chunk(msgspec.Struct, frozen=True):
    choices: tuple[_Choice, ...] = ()


class _ResponseEvent(msgspec.Struct, frozen=True):
    type: str
    delta: str = ""


class _MessageEvent(msgspec.Struct, frozen=True):
    type: str
    delta: _Delta | None = None


def text_reader(api: StreamApi) -> Callable[[bytes], str]:
    """A function that returns the text in the data of an event."""
    if api == "responses":
        response = msgspec.json.Decoder(_ResponseEvent)
        plain = msgspec.json.Decoder(dict[str, Any])

        def of_response(data: bytes) -> str:
            if b'"response.output_text.delta"' not in data[:60]:
                plain.decode(data)
                return ""
            return response.decode(data).delta

        return of_response
    if api == "messages":
        message = msgspec.json.Decoder(_MessageEvent)

        def of_message(data: bytes) -> str:
            event = message.decode(data)
            return (event.delta.text or "") if event.delta is not None else ""

        return of_message
    chunk = msgspec.json.Decoder(_Chunk)

    def of_chunk(data: bytes) -> str:
        if data == b"[DONE]":
            return ""
        choices = chunk.decode(data).choices
        if not choices:
            return ""
        choice = choices[0]
        return choice.text or (choice.delta.content if choice.delta is not None else "") or ""

    return of_chunk


class StreamReader:
    """One stream: its socket, and what has come. `begun`: the headers are there; `ended`: HTTP's last chunk is, or an error."""

    def __init__(self, job: ReaderJob, stream: int, expected: str, lengths: list[int], text_of: Callable[[bytes], str]) -> None:
        self.expected, self._lengths, self._text_of = expected, lengths, text_of
        self.begun = self.ended = False
        self.failure = ""
        self.steps = self.events = self.bytes_read = self._chars = 0
        self._texts: list[str] = []
        self._data = b""
        body = msgspec.json.encode(body_of(job.load, stream))
        head = f"POST {PATHS[job.load.api]} HTTP/1.1\r\nHost: {job.host}:{job.port}\r\nContent-Type: application/json\r\n"
        self.socket = socket.create_connection((job.host, job.port))
        self.socket.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self.socket.setblocking(False)

    @property
    def text(self) -> str:
        """What has come."""
        return "".join(self._texts)

    def read(self) -> None:
        """Take what the socket has."""
        data = self.socket.recv(READ_BYTES)
        self.bytes_read += len(data)
        self._data += data
        if not data:
            self._end("the connection was closed")
        elif not self.begun:
            self._read_head()
        if self.begun and not self.ended:
            self._read_chunks()

    def _read_head(self) -> None:
        head, end, rest = self._data.partition(b"\r\n\r\n")
        if not end:
            return  # an error that ends in the head is found at the end of the connection
        if not head.startswith(b"HTTP/1.1 200 ") or b"transfer-encoding: chunked" not in head.lower():
            self._end(self._data[:400].decode(errors="replace"))
            return
        self.begun, self._data = True, rest

    def _read_chunks(self) -> None:
        data, at = self._data, 0
        while (line := data.find(b"\r\n", at)) >= 0:
            size = int(data[at:line], 16)
            end = line + 2 + size
            if len(data) < end + 2:
                break
            if size == 0:
                self.ended = True
            else:
                self._read_events(data[line + 2 : end])
            at = end + 2
        self._data = data[at:]

    def _read_events(self, events: bytes) -> None:
        """Take a chunk, which the server fills with whole events."""
        if not events.endswith(b"\n\n"):
            self._end("a chunk does not end with an event")
            return
        for event in events[:-2].split(b"\n\n"):
            _, field, data = event.rpartition(b"data: ")
            if field and (text := self._text_of(data)):  # no field: a comment that keeps the connection open
                self.events += 1
                self._chars += len(text)
                self._texts.append(text)
        while self.steps < len(self._lengths) and self._lengths[self.steps] <= self._chars:
            self.steps += 1

    def _end(self, failure: str) -> None:
        self.ended, self.failure = True, failure


class RoundReader:
    """One round of all streams."""

    def __init__(self, job: ReaderJob, expected: list[tuple[str, list[int]]]) -> None:
        self._job, self._begin_s = job, time.perf_counter()
        self._allowed = self._done = 0
        self._at_step = [0] * (job.load.output_len + 1)
        self._step_s: list[float] = []
        self._epoll = select.epoll()
        self._rss_begin = memory_of(job.server_pid)[0]
        self._readers: dict[int, StreamReader] = {}
        text_of = text_reader(job.load.api)
        for stream, (text, lengths) in enumerate(expected):
            reader = StreamReader(job, stream, text, lengths, text_of)
            self._readers[reader.socket.fileno()] = reader
            self._epoll.register(reader.socket, select.EPOLLIN)

    def run(self) -> RoundFigures:
        """Read all streams to their ends."""
        left, waiting = len(self._readers), len(self._readers)
        begin_s = server_s = client_s = 0.0
        while left:
            ready = self._epoll.poll(SILENT_S)
            if not ready:
                break
            for descriptor, _ in ready:
                reader = self._readers[descriptor]
                begun, before = reader.begun, reader.steps
                reader.read()
                waiting -= reader.begun and not begun
                if reader.steps > before:
                    self._advance(before, reader.steps)
                if reader.ended:
                    left -= 1
                    self._epoll.unregister(descriptor)
            if not waiting and not begin_s:
                begin_s, server_s, client_s = time.perf_counter(), cpu_s(self._job.server_pid), time.process_time()
                self._allow(WINDOW)
        end_s, figures = time.perf_counter(), list(self._readers.values())
        server_s, client_s = cpu_s(self._job.server_pid) - server_s, time.process_time() - client_s
        for reader in figures:
            reader.socket.close()
        wrong = [lost_and_mixed(reader.expected, reader.text) for reader in figures]
        rss, peak = memory_of(self._job.server_pid)
        steps_ms = sorted(1e3 * (after - before) for before, after in pairwise(self._step_s)) or [0.0]
        return RoundFigures(
            tokens=sum(reader.steps for reader in figures),
            events=sum(reader.events for reader in figures),
            bytes_read=sum(reader.bytes_read for reader in figures),
            lost=sum(lost for lost, _ in wrong),
            mixed=sum(mixed for _, mixed in wrong),
            duration_s=end_s - begin_s,
            server_s=server_s,
            client_s=client_s,
            open_s=(begin_s or end_s) - self._begin_s,
            step_p50_ms=round(percentile(steps_ms, 0.5), 3),
            step_p99_ms=round(percentile(steps_ms, 0.99), 3),
            rss_begin=self._rss_begin,
            rss_end=rss,
            rss_peak=peak,
            failure=next((reader.failure for reader in figures if reader.failure), ""),
        )

    def _advance(self, before: int, steps: int) -> None:
        """A stream has `steps` steps now: perhaps all have one more."""
        for step in range(before + 1, steps + 1):
            self._at_step[step] += 1
        while self._done < self._job.load.output_len and self._at_step[self._done + 1] == len(self._readers):
            self._done += 1
            self._step_s.append(time.perf_counter())
        self._allow(self._done + WINDOW)

    def _allow(self, steps: int) -> None:
        steps = min(steps, self._job.load.output_len)
        if steps > self._allowed:
            self._allowed = steps
            os.write(self._job.pace, steps.to_bytes(4, "little"))


def cpu_s(pid: int) -> float:
    """The processor time of a process with all its threads, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def memory_of(pid: int) -> tuple[int, int]:
    """The resident bytes of a process, now and at most."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) << 10, int(lines["VmHWM"].split()[0]) << 10


def main() -> int:
    """Run all rounds; returns the exit code."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=ReaderJob)
    die_with(job.parent_pid)
    tokenizer = Tokenizer.load(job.tokenizer)
    expected = [texts_of(job.load, tokenizer, stream) for stream in range(job.load.streams)]
    for _ in range(job.load.rounds):
        sys.stdout.write(msgspec.json.encode(RoundReader(job, expected).run()).decode() + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
