"""One streamed response of any server with the OpenAI API: its content and the times of its chunks.

`ResponseRecord` is pure: it takes pieces of the body with their times. It reads all variants that servers send: chunks without
choices; usage in a chunk of its own, in every chunk or in none; comments between events; lines that end in CRLF; reasoning in
separate fields; a finish reason without `[DONE]`, and `[DONE]` without a finish reason. A stream with neither was cut off.
`send_request` fills a record from a socket. It never retries and never raises for a server's error: a failure is recorded.
"""

import time
from typing import Any

import aiohttp
import msgspec

from tpserve.bench.request_timing import RequestTiming
from tpserve.bench.workload import Api, BenchRequest, Workload

PATHS: dict[Api, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
DETAIL_CHARS = 200


class Details(msgspec.Struct, frozen=True):
    """The `prompt_tokens_details` of a usage."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """The server's own count of tokens."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: Details | None = None


class ChatDelta(msgspec.Struct, frozen=True):
    """A chunk's delta of a chat. All fields hold generated content; `reasoning` is vLLM's newer name."""

    content: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    tool_calls: Any = None


class ResponseChoice(msgspec.Struct, frozen=True):
    """A chunk's part of one choice: `text` of a completion or `delta` of a chat."""

    text: str | None = None
    delta: ChatDelta | None = None
    finish_reason: Any = None

    def generated(self) -> bool:
        """Whether the chunk holds generated content."""
        delta = self.delta
        return bool(self.text or (delta and (delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls)))


class ResponseChunk(msgspec.Struct, frozen=True):
    """One event of the stream."""

    choices: tuple[ResponseChoice, ...] | None = None
    usage: Usage | None = None
    error: Any = None


RESPONSE_CHUNK = msgspec.json.Decoder(ResponseChunk)


class ResponseRecord:
    """One request and its response. Times are those of `time.perf_counter`."""

    def __init__(self, request: BenchRequest, begin_s: float) -> None:
        self.request = request
        self.begin_s = begin_s
        self.token_s: list[float] = []
        """The time of each chunk with generated content."""
        self.end_s = begin_s
        """The time of the last chunk with a choice; for a failed request, the time of the failure."""
        self.usage: Usage | None = None
        self.failure = ""
        """The kind of failure; empty for a complete response."""
        self.detail = ""
        self._finished = False
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes, now_s: float) -> None:
        """Take a piece of the body that arrived at `now_s`."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            self._line(line.removesuffix(b"\r"), now_s)

    def close(self, now_s: float) -> None:
        """The body has ended without an error of the connection."""
        self.feed(b"\n\n", now_s)  # the last event may lack its blank line
        if not self._finished:
            self.fail("cut off", "the stream ended without a finish reason or [DONE]", now_s)
        elif not self.output_tokens:
            self.fail("no tokens", "the response is empty", now_s)

    def fail(self, kind: str, detail: str, now_s: float) -> None:
        """Record a failure; the first one counts. A connection that is cut after a complete response is no failure."""
        if not self.failure and not (kind == "cut off" and self._finished):
            self.failure, self.detail, self.end_s = kind, detail[:DETAIL_CHARS], now_s

    def _line(self, line: bytes, now_s: float) -> None:
        """Server-sent events: the `data` lines up to a blank line are one event. Other lines are ignored."""
        if line.startswith(b"data:"):
            self._data.append(line[5:].strip())
        elif not line and self._data:
            data, self._data = b"\n".join(self._data), []
            self._event(data, now_s)

    def _event(self, data: bytes, now_s: float) -> None:
        if data == b"[DONE]":
            self._finished = True
            return
        try:
            chunk = RESPONSE_CHUNK.decode(data)
        except msgspec.DecodeError as error:
            self.fail("unreadable chunk", f"{error}: {data[:DETAIL_CHARS].decode(errors='replace')}", now_s)
            return
        if chunk.error is not None:
            self.fail("error in the stream", data.decode(errors="replace"), now_s)
        self.usage = chunk.usage or self.usage
        for choice in chunk.choices or ():
            self.end_s = now_s
            if choice.generated():
                self.token_s.append(now_s)
            self._finished = self._finished or choice.finish_reason is not None

    @property
    def counted(self) -> bool:
        """Whether the server reported the number of generated tokens; otherwise a chunk counts as one token."""
        return self.usage is not None and self.usage.completion_tokens is not None

    @property
    def output_tokens(self) -> int:
        """Generated tokens: the server's count, or the number of chunks."""
        count = self.usage.completion_tokens if self.usage else None
        return len(self.token_s) if count is None else count

    @property
    def input_tokens(self) -> int:
        """Tokens of the prompt: the server's count, or the length that was requested."""
        count = self.usage.prompt_tokens if self.usage else None
        return self.request.input_len if count is None else count

    @property
    def cached_tokens(self) -> int | None:
        """Tokens of the prompt that were in the server's prefix cache; None when the server does not report it."""
        details = self.usage.prompt_tokens_details if self.usage else None
        return details.cached_tokens if details else None

    @property
    def timing(self) -> RequestTiming:
        """The times of the request, for the latencies."""
        return RequestTiming(self.begin_s, self.token_s, self.end_s, self.output_tokens)


async def send_request(
    session: aiohttp.ClientSession, url: str, model: str, workload: Workload, request: BenchRequest
) -> ResponseRecord:
    """Send one request to the server at `url` and read its response to the end. Never raises for a failure."""
    data = msgspec.json.encode(body(workload, model, request))
    record = ResponseRecord(request, time.perf_counter())
    try:
        async with session.post(url + PATHS[workload.endpoint], data=data) as response:
            if response.status != 200:
                detail = error_text(await response.read())
                record.fail(f"HTTP {response.status}", detail, time.perf_counter())
                return record
            async for piece in response.content.iter_any():
                record.feed(piece, time.perf_counter())
            record.close(time.perf_counter())
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        record.fail("no connection", str(error), time.perf_counter())
    except TimeoutError:
        record.fail("timeout", f"no end after {session.timeout.total} s", time.perf_counter())
    except (aiohttp.ClientError, OSError) as error:
        record.fail("cut off", f"{type(error).__name__}: {error}", time.perf_counter())
    return record


def body(workload: Workload, model: str, request: BenchRequest) -> dict[str, Any]:
    """The JSON body of a request. `ignore_eos` is sent only when it is on, since OpenAI's own API has no such field."""
    fields = {"model": model, "max_tokens": request.output_len, "temperature": workload.temperature}
    fields |= {"stream": True, "stream_options": {"include_usage": True}}
    if workload.ignore_eos:
        fields["ignore_eos"] = True
    if workload.endpoint == "chat":
        return fields | {"messages": [{"role": "user", "content": request.prompt}]}
    return fields | {"prompt": request.prompt}


def error_text(content: bytes) -> str:
    """The message of an error body on one line: OpenAI's form, or the text as it is."""
    try:
        message: Any = msgspec.json.decode(content)
        while isinstance(message, dict):
            message = next(message[name] for name in ("error", "message", "detail") if name in message)
    except (msgspec.DecodeError, StopIteration):
        message = content.decode(errors="replace")
    return " ".join(str(message).split())[:DETAIL_CHARS]
