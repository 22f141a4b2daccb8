"""Spans of a server with --otlp-traces-endpoint, as a collector of OpenTelemetry gets them. There is none until a test begins:
requests before are served all the same.
"""

import gzip
import os
import queue
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from openai import OpenAI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

HOST, _, PORT = os.environ["TPSERVE_OTLP_ADDRESS"].partition(":")
MODEL = os.environ["TPSERVE_MODEL"]
TRACE, SENDER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{SENDER}-01", "tracestate": "congo=t61rcWkgMzE"}
WAIT_S = 30.0
"""The SDK tries a batch that nobody took again for ten seconds."""
client = OpenAI(base_url=os.environ["TPSERVE_URL"], api_key="none", max_retries=0)


class Collector(ThreadingHTTPServer):
    """What was posted to /v1/traces."""

    daemon_threads = True

    def __init__(self) -> None:
        self.spans: queue.Queue[tuple[dict[str, Any], Any]] = queue.Queue()
        super().__init__((HOST, int(PORT)), Receiver)

    def span(self, request_id: str) -> tuple[dict[str, Any], dict[str, Any], Any]:
        """The span of a request: attributes of its resource, its own, and the span."""
        deadline_s = time.monotonic() + WAIT_S
        while True:
            resource, span = self.spans.get(timeout=max(0.1, deadline_s - time.monotonic()))
            if (found := attributes(span.attributes))["gen_ai.request.id"] == request_id:
                return resource, found, span


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        assert self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf"
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.server.spans.put((attributes(resource.resource.attributes), span))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: value(pair.value) for pair in pairs}


def value(any_value: Any) -> Any:
    kind = any_value.WhichOneof("value")
    if kind == "array_value":
        return [value(each) for each in any_value.array_value.values]
    return getattr(any_value, kind)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    for _ in range(20):  # while nobody listens
        assert client.completions.create(model=MODEL, prompt="Once", max_tokens=1, timeout=20).choices
    with Collector() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_the_span_of_a_chat(collector: Collector) -> None:
    chat = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=6,
        temperature=0.5,
        top_p=0.9,
        extra_headers=HEADERS,
        extra_body={"ignore_eos": True},
    )
    resource, found, span = collector.span(chat.id)
    assert resource["service.name"] == "tpserve" and span.name == "llm_request" and span.kind == span.SPAN_KIND_SERVER
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.trace_state) == (TRACE, SENDER, HEADERS["tracestate"])
    assert chat.usage is not None and found["gen_ai.usage.prompt_tokens"] == chat.usage.prompt_tokens
    assert found["gen_ai.usage.completion_tokens"] == found["gen_ai.usage.output_tokens"] == 6
    assert (found["gen_ai.request.max_tokens"], found["gen_ai.request.temperature"], found["gen_ai.request.top_p"]) == (
        6,
        0.5,
        0.9,
    )
    assert found["gen_ai.response.model"] == MODEL and found["gen_ai.response.finish_reasons"] == ["length"]
    assert found["gen_ai.latency.time_in_queue"] >= 0 and found["gen_ai.latency.time_to_first_token"] > 0
    took_s = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    assert found["gen_ai.latency.e2e"] == pytest.approx(took_s, abs=0.01)
    assert abs(span.end_time_unix_nano / 1e9 - time.time()) < WAIT_S
    assert "hello" not in str(span)


def test_a_request_without_a_trace_begins_one(collector: Collector) -> None:
    completion = client.completions.create(model=MODEL, prompt="Once", max_tokens=2, extra_headers={"traceparent": "00-nonsense"})
    _, _, span = collector.span(completion.id)
    assert not span.parent_span_id and len(span.trace_id) == 16


def test_a_trace_that_is_not_recorded(collector: Collector) -> None:
    off = {"traceparent": f"00-{TRACE}-{SENDER}-00"}
    left_out = client.completions.create(model=MODEL, prompt="Once", max_tokens=2, extra_headers=off)
    after = client.completions.create(model=MODEL, prompt="Once", max_tokens=2)
    seen = []
    while not seen or seen[-1] != after.id:
        _, span = collector.spans.get(timeout=WAIT_S)
        seen.append(attributes(span.attributes)["gen_ai.request.id"])
    assert left_out.id not in seen
