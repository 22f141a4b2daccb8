"""Traces of requests: the place of each in its client's trace, and one span for each that was admitted. Owns no state.

Names of attributes are those of OpenTelemetry's conventions for generative AI, and vLLM's where those have none. A span has no
text of prompt or output.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web

from tpserve.engine_client.requests import RequestHandle
from tpserve.observe.spans import Span, SpanExporter
from tpserve.observe.trace_context import TraceContext, trace_context

TRACE = web.RequestKey("trace", TraceContext)
"""The sender's place in a trace; missing where it sent none."""
NAME = "llm_request"
"""vLLM's name of a request's span."""


def note_trace(request: web.Request) -> None:
    """Keep the trace context of a request's headers, if they have a valid one."""
    if "traceparent" in request.headers:
        found = trace_context(request.headers.getall("traceparent"), request.headers.getall("tracestate", []))
        if found is not None:
            request[TRACE] = found


def span_reporter(
    exporter: SpanExporter | None, request_id: str, model: str, operation: str, parent: TraceContext | None
) -> Callable[[RequestHandle], object] | None:
    """What to call at the end of a request's handle; None when spans go nowhere. `operation`: chat or text_completion."""
    if exporter is None:
        return None

    def report(handle: RequestHandle) -> None:
        error = "" if handle.failure is None else str(handle.failure)
        now_ns, now_s = time.time_ns(), time.monotonic()
        begin_ns = now_ns - int((now_s - min(sequence.arrived_s for sequence in handle.sequences)) * 1e9)
        attributes = {"gen_ai.operation.name": operation, "gen_ai.request.id": request_id, **attributes_of(handle, model, now_s)}
        exporter.export(Span(NAME, begin_ns, now_ns, attributes, parent, error))

    loop = asyncio.get_running_loop()
    return lambda handle: loop.call_soon(report, handle)  # not amid the work of the request table


def attributes_of(handle: RequestHandle, model: str, now_s: float) -> dict[str, Any]:
    """The attributes of an ended request; those of times are missing without a token. `now_s`: a time of `time.monotonic`."""
    sequences = handle.sequences
    params, prompts = sequences[0].request.params, [each for each in sequences if each.request.choice == 0]
    input_tokens = sum(sequence.prompt_tokens for sequence in prompts)
    output_tokens = sum(sequence.assembler.num_tokens for sequence in sequences)
    found: dict[str, Any] = {
        "gen_ai.provider.name": "tpserve",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.request.n": len(sequences) // len(prompts),
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.usage.num_sequences": len(sequences),
        "gen_ai.usage.input_tokens": input_tokens,
        "gen_ai.usage.prompt_tokens": input_tokens,
        "gen_ai.usage.output_tokens": output_tokens,
        "gen_ai.usage.completion_tokens": output_tokens,
        "gen_ai.response.finish_reasons": [sequence.assembler.finish or "error" for sequence in sequences],
        "gen_ai.latency.e2e": now_s - min(sequence.arrived_s for sequence in sequences),
    }
    if handle.failure is not None:
        found["error.type"] = handle.failure.code or str(handle.failure.status)
    if begun := [sequence for sequence in sequences if sequence.token_s]:
        first = min(begun, key=lambda sequence: sequence.token_s[0])
        ttft_s, decode_s = first.token_s[0] - first.arrived_s, max(each.token_s[-1] for each in begun) - first.token_s[0]
        found |= {
            "gen_ai.latency.time_to_first_token": ttft_s,
            "gen_ai.latency.time_in_queue": first.queue_s,
            "gen_ai.latency.time_in_model_prefill": ttft_s - first.queue_s,
            "gen_ai.latency.time_in_model_decode": decode_s,
            "gen_ai.latency.time_in_model_inference": ttft_s - first.queue_s + decode_s,
        }
    return found
