"""Spans of requests: one each, at its end, with the sender's place in its trace. tests/clients sends them to a real receiver."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.http import checks
from tests.http.inprocess import Server, serving, until
from tpserve.errors import UserError
from tpserve.observe.spans import Span, SpanExporter

TRACE, SENDER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{SENDER}-01", "tracestate": "congo=t61", "x-request-id": "r"}


class Spans:
    """In the place of a `SpanExporter`."""

    def __init__(self) -> None:
        self.got: list[Span] = []

    def export(self, span: Span) -> None:
        self.got.append(span)


@pytest.fixture(scope="module")
def spans() -> Spans:
    return Spans()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, spans: Spans) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("model"), spans=spans) as server:
        yield server


def test_a_span_for_each_request(server: Server, spans: Spans) -> None:
    client, begin_ns = checks.Client(server.url, HEADERS), time.time_ns()
    fields = {"max_tokens": 5, "ignore_eos": True, "temperature": 0.5, "top_p": 0.9, "n": 2}
    usage = client.completion(prompt=["zanzibar", "a b"], **fields).json["usage"]
    until(lambda: len(spans.got) == 1)
    span = spans.got.pop()
    assert span.parent == (TRACE, SENDER, 1, (("congo", "t61"),)) and not span.error
    assert begin_ns <= span.begin_ns < span.end_ns <= time.time_ns()
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.id": "cmpl-r",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.n": 2,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.usage.num_sequences": 4,
        "gen_ai.usage.prompt_tokens": usage["prompt_tokens"],
        "gen_ai.usage.completion_tokens": usage["completion_tokens"],
        "gen_ai.response.finish_reasons": ["length"] * 4,
    }
    assert {name: span.attributes[name] for name in expected} == expected
    times = {name.rpartition(".")[2]: value for name, value in span.attributes.items() if ".latency." in name}
    assert 0 <= times["time_in_queue"] <= times["time_to_first_token"] <= times["e2e"]
    assert times["time_in_model_prefill"] + times["time_in_model_decode"] == pytest.approx(times["time_in_model_inference"])
    assert "zanzibar" not in str(span)


def test_streams_chats_and_requests_that_are_refused(server: Server, spans: Spans) -> None:
    client = checks.Client(server.url)
    client.chat(max_tokens=2, ignore_eos=True, stream=True)
    client.completion(max_tokens=-1)
    client.post("/v1/responses", input="hi", max_output_tokens=2, background=True)
    until(lambda: len(spans.got) == 2)
    chat, response = spans.got.pop(0), spans.got.pop(0)
    assert chat.attributes["gen_ai.operation.name"] == response.attributes["gen_ai.operation.name"] == "chat"
    assert chat.parent is None and chat.attributes["gen_ai.usage.output_tokens"] == 2


def test_a_client_that_leaves(server: Server, spans: Spans) -> None:
    stream = checks.open_stream(server.url, prompt="a", max_tokens=200)
    next(stream)
    server.engine.paused = True
    stream.close()
    until(lambda: len(spans.got) == 1)
    server.engine.paused = False
    assert spans.got.pop().attributes["gen_ai.response.finish_reasons"] == ["abort"]


def test_a_request_that_the_engine_fails(server: Server, spans: Spans) -> None:
    server.engine.paused = True
    with ThreadPoolExecutor() as pool:
        reply = pool.submit(checks.Client(server.url).completion, max_tokens=9)
        until(lambda: server.request_table.num_open == 1)
        server.loop.call_soon_threadsafe(server.request_table.fail_all, "the engine has ended", 503)
        assert reply.result().status == 503
    until(lambda: len(spans.got) == 1)
    server.engine.paused = False
    span = spans.got.pop()
    assert span.error == "the engine has ended" and span.attributes["error.type"] == "engine_unavailable"
    assert "gen_ai.latency.time_to_first_token" not in span.attributes


@pytest.mark.parametrize("endpoint", ["localhost:4317", "grpc://collector:4317", "http://", "http://host:x"])
def test_an_endpoint_that_is_no_url(endpoint: str) -> None:
    with pytest.raises(UserError, match="4318/v1/traces"):
        SpanExporter(endpoint)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(UserError, match=r"pip install 'tpserve\[otel\]'"):
        SpanExporter("http://127.0.0.1:4318")
