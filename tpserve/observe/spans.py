"""Spans to a collector of OpenTelemetry, over OTLP in HTTP. Needs the extra `tpserve[otel]`; nothing here is imported without it.

The SDK's thread encodes and sends them in batches. `SpanExporter.export` only appends to its queue, and drops when that is full
(2048 spans), so that a collector that is slow or gone costs spans and nothing else. Its variables (OTEL_SERVICE_NAME,
OTEL_EXPORTER_OTLP_HEADERS, OTEL_TRACES_SAMPLER, OTEL_BSP_...) hold as everywhere.
"""

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tpserve.errors import UserError
from tpserve.observe.trace_context import TraceContext
from tpserve.version import __version__

log = logging.getLogger(__name__)

TRACES_PATH = "/v1/traces"
CLOSE_S = 2.0
"""The time for what is left at the end of the process."""
TOLD_AGAIN_S = 600.0
MISSING = "--otlp-traces-endpoint needs OpenTelemetry's SDK, which is not installed: pip install 'tpserve[otel]'"


@dataclass(frozen=True)
class Span:
    """One piece of work. `begin_ns`, `end_ns`: since the epoch. `attributes` without null. `error`: empty when it went well.
    `parent`: the sender's span; None begins a trace."""

    name: str
    begin_ns: int
    end_ns: int
    attributes: dict[str, Any]
    parent: TraceContext | None = None
    error: str = ""


class SpanExporter:
    """The way of finished spans to the collector at `endpoint`."""

    def __init__(self, endpoint: str) -> None:
        """UserError for an endpoint that is no URL of HTTP, and without the SDK."""
        url = _traces_url(endpoint)
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise UserError(MISSING, param="otlp_traces_endpoint") from error
        resource = Resource({"service.name": "tpserve", "service.version": __version__}).merge(OTELResourceDetector().detect())
        self._trace = trace
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        self._tracer = self._provider.get_tracer("tpserve", __version__)
        sdk_log = logging.getLogger("opentelemetry")
        sdk_log.handlers[:], sdk_log.propagate = [_LostSpans(url)], False

    def export(self, span: Span) -> None:
        """Queue a span; never waits. One whose parent is not sampled is dropped."""
        trace, context = self._trace, None
        if span.parent is not None:
            sender = trace.SpanContext(
                int(span.parent.trace_id, 16),
                int(span.parent.span_id, 16),
                is_remote=True,
                trace_flags=trace.TraceFlags(span.parent.flags),
                trace_state=trace.TraceState(list(span.parent.state)),
            )
            context = trace.set_span_in_context(trace.NonRecordingSpan(sender))
        begun = self._tracer.start_span(
            span.name, context=context, kind=trace.SpanKind.SERVER, attributes=span.attributes, start_time=span.begin_ns
        )
        if span.error:
            begun.set_status(trace.Status(trace.StatusCode.ERROR, span.error))
        begun.end(span.end_ns)

    def close(self) -> None:
        """Send what is queued, for `CLOSE_S` at most."""
        thread = threading.Thread(target=self._provider.shutdown, name="spans", daemon=True)
        thread.start()
        thread.join(CLOSE_S)


class _LostSpans(logging.Handler):
    """Says in one line that spans are lost, in place of the SDK's line for each batch."""

    def __init__(self, url: str) -> None:
        super().__init__(logging.WARNING)
        self._url, self._told_s = url, -TOLD_AGAIN_S

    def emit(self, record: logging.LogRecord) -> None:
        """Tell of the first failure, and again after ten minutes."""
        now_s = time.monotonic()
        if now_s - self._told_s >= TOLD_AGAIN_S:
            self._told_s = now_s
            log.warning("spans are lost, serving goes on: the collector at %s: %.300s", self._url, record.getMessage())


def _traces_url(endpoint: str) -> str:
    """The URL that spans are posted to. UserError when `endpoint` is none."""
    try:
        parts = urlsplit(endpoint)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid:
        raise UserError(
            "--otlp-traces-endpoint must be the URL of a collector that takes OTLP over HTTP, such as "
            f"http://HOST:4318{TRACES_PATH}, got {endpoint!r}",
            param="otlp_traces_endpoint",
        )
    return endpoint.rstrip("/") + TRACES_PATH if parts.path in ("", "/") else endpoint
