"""Output that goes to the socket without a task: the same bytes, in the same order, and a slow client waits by itself."""

import asyncio
import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_chat_tools import output, reader, request
from tests.unit.test_request_table import CAT, EOS, TOKENIZER, Harness
from tpserve.engine_client.requests import RequestHandle
from tpserve.frontend.openai.encoder import ChunkEncoder
from tpserve.frontend.openai.prompts import Prompt
from tpserve.frontend.openai.response_builder import ChatResponseBuilder, CompletionResponseBuilder, ResponseMeta
from tpserve.frontend.openai.schema import CompletionRequest, StreamOptions
from tpserve.frontend.openai.sender import MAX_UNSENT_BYTES, DirectWriter
from tpserve.frontend.openai.sse import IdleTimer, event
from tpserve.text.assembler import OutputDelta
from tpserve.types.messages import Delta, Done, EngineOutput

PROMPT = Prompt([1, 2], "ab")
SEQUENCE: Any = SimpleNamespace(index=0, request=SimpleNamespace(choice=0), cached_tokens=0)


def meta(*warnings: str) -> ResponseMeta:
    return ResponseMeta("cmpl-1", "text_completion", "text_completion", 'a "tiny" one', 1, [*warnings])


def encoder(*warnings: str, options: StreamOptions | None = None, **fields: Any) -> ChunkEncoder:
    call = CompletionRequest(prompt="ab", stream=True, **fields)
    return ChunkEncoder(CompletionResponseBuilder(meta(*warnings), call, [PROMPT], TOKENIZER), meta(*warnings), [PROMPT], options)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6), st.integers(0, 2), st.booleans())
def test_an_event_from_a_frame_of_bytes_is_that_of_its_value(texts: list[str], index: int, usage: bool) -> None:
    """Whatever the text: quotes, control characters, the mark itself."""
    options = StreamOptions(include_usage=True) if usage else None
    encoded, sequence = encoder(options=options, n=3), SimpleNamespace(**{**vars(SEQUENCE), "index": index})
    for number, text in enumerate([*texts, "\0text\0"]):
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}
        value = meta().chunk(choice) | ({"usage": None} if usage else {})
        assert encoded.deltas(sequence, OutputDelta(text, [5], [], number + 1)) == [event(value)]  # type: ignore[arg-type]


def test_what_is_more_than_a_text_is_a_value() -> None:
    """Warnings come once, usage in every event, token ids with each: none of it is lost to the frame."""
    first, second = (json.loads(encoded[6:]) for encoded in _events(encoder("odd"), "a", "b"))
    assert first["warnings"] == ["odd"] and "warnings" not in second
    counted = [
        json.loads(data[6:])["usage"]
        for data in _events(encoder(options=StreamOptions(include_usage=True, continuous_usage_stats=True)), "a", "b")
    ]
    assert [usage["completion_tokens"] for usage in counted] == [1, 2]
    ids = [json.loads(data[6:])["choices"][0]["token_ids"] for data in _events(encoder(return_token_ids=True), "a", "b")]
    assert ids == [[5], [5]]


def _events(encoded: ChunkEncoder, *texts: str) -> list[bytes]:
    return [data for i, text in enumerate(texts) for data in encoded.deltas(SEQUENCE, OutputDelta(text, [5], [], i + 1))]


def test_reasoning_has_both_names() -> None:
    call = request(stream=True)
    form = ResponseMeta("chat-1", "", "chat.completion.chunk", "tiny", 1, [])
    builder = ChatResponseBuilder(form, call, PROMPT, TOKENIZER, [reader(call)])
    encoded = ChunkEncoder(builder, form, [PROMPT], None)
    chunks = [
        json.loads(data[6:]) for text in ("<think>H", "m", "</think>x", "y") for data in encoded.deltas(SEQUENCE, output(text))
    ]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    said = [delta for delta in deltas if "reasoning" in delta]
    assert "".join(delta["reasoning"] for delta in said) == "Hm" and all(
        delta == {"reasoning": delta["reasoning"], "reasoning_content": delta["reasoning"]} for delta in said
    )
    assert "".join(delta.get("content", "") for delta in deltas) == "xy"
    assert all(chunk["choices"][0]["logprobs"] is None and chunk["choices"][0]["stop_reason"] is None for chunk in chunks)


class Transport:
    """A socket's transport; `unsent` is the size of its buffer."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.unsent = 0
        self.closing = False

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def write(self, data: bytes) -> None:
        self.written.append(data)


def direct(handle: RequestHandle, transport: Transport, idle: IdleTimer, *, chunked: bool = True) -> DirectWriter:
    headers = {"Transfer-Encoding": "chunked"} if chunked else {}
    return DirectWriter(
        SimpleNamespace(transport=transport),
        SimpleNamespace(headers=headers),
        handle,
        encoder(),
        idle,  # type: ignore[arg-type]
    )


def text_of(written: Sequence[bytes], *, chunked: bool = True) -> list[str]:
    """The text of each write."""
    found = []
    for data in written:
        if chunked:
            size, _, rest = data.partition(b"\r\n")
            assert rest.endswith(b"\r\n") and int(size, 16) == len(rest) - 2
            data = rest[:-2]
        events = [json.loads(part.removeprefix(b"data: ")) for part in data.split(b"\n\n") if part]
        found.append("".join(chunk["choices"][0]["text"] for chunk in events))
    return found


@pytest.mark.parametrize("chunked", [True, False])
def test_a_frame_is_one_write_of_each_stream(chunked: bool) -> None:
    """All are encoded before the first is written; HTTP/1.0 has no chunks. The reader sleeps until the end."""

    async def play() -> None:
        harness = Harness()
        handles = [harness.open() for _ in range(2)]
        with IdleTimer(handles[0].wake) as idle:
            transports = [Transport(), Transport()]
            for handle, transport in zip(handles, transports, strict=True):
                handle.sink = direct(handle, transport, idle, chunked=chunked)
            frames: list[list[EngineOutput]] = [
                [Delta(0, 0, tuple(CAT[:1])), Delta(1, 0, tuple(CAT[:2])), Delta(0, 1, tuple(CAT[1:2]))],
                [Delta(1, 2, tuple(CAT[2:]))],
            ]
            for frame in frames:
                harness.request_table.receive(frame)
            first = TOKENIZER.decode(CAT[:2])
            assert text_of(transports[0].written, chunked=chunked) == [first]
            assert text_of(transports[1].written, chunked=chunked) == [first, TOKENIZER.decode(CAT)[len(first) :]]
            waits = [asyncio.ensure_future(handle.wait()) for handle in handles]
            await asyncio.sleep(0)
            assert not any(wait.done() for wait in waits)
            harness.request_table.receive([Delta(0, 2, (EOS,)), Done(0, "stop", 3)])
            await asyncio.wait_for(waits[0], 1)
            ((_, delta),) = handles[0].take()
            assert (delta.text, delta.finish, len(transports[0].written)) == ("", "stop", 1), "the end is the reader's"
            waits[1].cancel()

    asyncio.run(play())


def test_a_slow_client_is_its_tasks() -> None:
    """Nothing is taken or written above the bound: the reader wakes, and finds all of it as one delta."""

    async def play() -> None:
        harness, transport = Harness(), Transport()
        handle = harness.open()
        with IdleTimer(handle.wake) as idle:
            handle.sink = direct(handle, transport, idle)
            transport.unsent = MAX_UNSENT_BYTES + 1
            for at, token in enumerate(CAT):
                harness.request_table.receive([Delta(0, at, (token,))])
            await asyncio.wait_for(handle.wait(), 1)
            ((_, delta),) = handle.take()
            assert delta.text == TOKENIZER.decode(CAT) and not transport.written
            transport.unsent, transport.closing = 0, True
            harness.request_table.receive([Delta(0, len(CAT), (CAT[0],))])
            await asyncio.wait_for(handle.wait(), 1)
            assert handle.take() and not transport.written, "who left is the reader's, too"

    asyncio.run(play())


def test_an_error_of_the_encoder_is_its_streams_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        harness, transports = Harness(), [Transport(), Transport()]
        handles = [harness.open() for _ in transports]
        with IdleTimer(handles[0].wake) as idle:
            writers = [direct(handle, transport, idle) for handle, transport in zip(handles, transports, strict=True)]
            for handle, writer in zip(handles, writers, strict=True):
                handle.sink = writer
            monkeypatch.setattr(writers[0]._encoder, "deltas", lambda *_: 1 / 0)
            harness.request_table.receive([Delta(0, 0, tuple(CAT)), Delta(1, 0, tuple(CAT))])
            await asyncio.wait_for(handles[0].wait(), 1)
            assert isinstance(writers[0].failure, ZeroDivisionError) and not transports[0].written
            assert text_of(transports[1].written) == [TOKENIZER.decode(CAT)] and writers[1].failure is None

    asyncio.run(play())
