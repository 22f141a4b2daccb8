"""One streamed answer of an OpenAI server, whoever's: what its bytes say, and when they came.

`ResponseRecord` is pure: pieces of the body and times in, facts out. Servers differ, and all of these are read: chunks without
choices,
usage in a chunk of its own, in every chunk or not at all, comments between events, lines that end in CRLF, reasoning in a field
of its own, a finish reason without `[DONE]` and `[DONE]` without a finish reason. A stream with neither was cut off.
`send_request` fills one from a socket. Never retries, never raises for what a server does: a failed request is a fact like the
others.
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
    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: Details | None = None


class ChatDelta(msgspec.Struct, frozen=True):
    """Of chat. Whatever is in any of these was generated; `reasoning` is vLLM's newer name."""

    content: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    tool_calls: Any = None


class ResponseChoice(msgspec.Struct, frozen=True):
    text: str | None = None
    delta: ChatDelta | None = None
    finish_reason: Any = None

    def generated(self) -> bool:
        delta = self.delta
        return bool(self.text or (delta and (delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls)))


class ResponseChunk(msgspec.Struct, frozen=True):
    choices: tuple[ResponseChoice, ...] | None = None
    usage: Usage | None = None
    error: Any = None


RESPONSE_CHUNK = msgspec.json.Decoder(ResponseChunk)


class ResponseRecord:
    """One request, from its sending on. Times are those of `time.perf_counter`."""

    def __init__(self, request: BenchRequest, begin_s: float) -> None:
        self.request = request
        self.begin_s = begin_s
        self.token_s: list[float] = []
        """When each chunk with generated text came."""
        self.end_s = begin_s
        """When the last chunk with a choice came; of a failure, when it was noticed."""
        self.usage: Usage | None = None
        self.failure = ""
        """What kind of failure it was; empty for an answer that is whole."""
        self.detail = ""
        self._finished = False
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes, now_s: float) -> None:
        """More of the body, which came at `now_s`."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            self._line(line.removesuffix(b"\r"), now_s)

    def close(self, now_s: float) -> None:
        """The body has ended as bodies do."""
        self.feed(b"\n\n", now_s)  # the last event may lack its blank line
        if not self._finished:
            self.fail("cut off", "the stream ended without a finish reason or [DONE]", now_s)
        elif not self.output_tokens:
            self.fail("no tokens", "the answer is empty", now_s)

    def fail(self, kind: str, detail: str, now_s: float) -> None:
        """It went wrong; the first reason counts. Not once the answer is whole: what happens to its connection is no matter."""
        if not self.failure and not (kind == "cut off" and self._finished):
            self.failure, self.detail, self.end_s = kind, detail[:DETAIL_CHARS], now_s

    def _line(self, line: bytes, now_s: float) -> None:
        """Server-sent events: `data` lines up to a blank one are an event, all other lines say nothing that matters here."""
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
        """Whether the server said how many tokens it generated; else a chunk counts as one."""
        return self.usage is not None and self.usage.completion_tokens is not None

    @property
    def output_tokens(self) -> int:
        said = self.usage.completion_tokens if self.usage else None
        return len(self.token_s) if said is None else said

    @property
    def input_tokens(self) -> int:
        """As the server counts; if it does not, as many as were asked for."""
        said = self.usage.prompt_tokens if self.usage else None
        return self.request.input_len if said is None else said

    @property
    def cached_tokens(self) -> int | None:
        """How many of them were in the server's prefix cache; None when it does not say."""
        details = self.usage.prompt_tokens_details if self.usage else None
        return details.cached_tokens if details else None

    @property
    def timing(self) -> RequestTiming:
        """What its times say."""
        return RequestTiming(self.begin_s, self.token_s, self.end_s, self.output_tokens)


async def send_request(
    session: aiohttp.ClientSession, url: str, model: str, workload: Workload, what: BenchRequest
) -> ResponseRecord:
    """Send one request to the server at `url` and read its answer to the end."""
    data = msgspec.json.encode(body(workload, model, what))
    answer = ResponseRecord(what, time.perf_counter())
    try:
        async with session.post(url + PATHS[workload.endpoint], data=data) as response:
            if response.status != 200:
                detail = said(await response.read())
                answer.fail(f"HTTP {response.status}", detail, time.perf_counter())
                return answer
            async for piece in response.content.iter_any():
                answer.feed(piece, time.perf_counter())
            answer.close(time.perf_counter())
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        answer.fail("no connection", str(error), time.perf_counter())
    except TimeoutError:
        answer.fail("timeout", f"no end after {session.timeout.total} s", time.perf_counter())
    except (aiohttp.ClientError, OSError) as error:
        answer.fail("cut off", f"{type(error).__name__}: {error}", time.perf_counter())
    return answer


def body(workload: Workload, model: str, what: BenchRequest) -> dict[str, Any]:
    """The request. `ignore_eos` is no field of OpenAI's own API, so that it is not sent when it is off."""
    fields = {"model": model, "max_tokens": what.output_len, "temperature": workload.temperature}
    fields |= {"stream": True, "stream_options": {"include_usage": True}}
    if workload.ignore_eos:
        fields["ignore_eos"] = True
    if workload.endpoint == "chat":
        return fields | {"messages": [{"role": "user", "content": what.prompt}]}
    return fields | {"prompt": what.prompt}


def said(content: bytes) -> str:
    """What an error body says, on one line: OpenAI's form, or whatever it is."""
    try:
        found: Any = msgspec.json.decode(content)
        while isinstance(found, dict):
            found = next(found[name] for name in ("error", "message", "detail") if name in found)
    except (msgspec.DecodeError, StopIteration):
        found = content.decode(errors="replace")
    return " ".join(str(found).split())[:DETAIL_CHARS]
