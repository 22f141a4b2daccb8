"""Prometheus metrics with the names, labels and buckets of vLLM's dashboards, and the prefix `tpserve:`.

Each `Metrics` owns its registry, so two servers in one process do not collide. Never reads a clock: durations come in seconds.
The engine sends totals that start at 0 in every epoch; the counters here only grow. With `vllm_names` the metrics that vLLM has
are there once more with its prefix, for routers, autoscalers and dashboards that were made for it.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from tpserve.types.messages import FinishReason, PhaseTimes, Stats

TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
ITL_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
LATENCY_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))
CAUSES: tuple[Literal["outside", "unclear", "error"], ...] = ("outside", "unclear", "error")
FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")
ITERATION_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
VLLM_NAMES = frozenset((
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info", "prompt_tokens",
    "generation_tokens", "prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "request_success",
    "time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
    "request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens", "request_generation_tokens",
    "iteration_tokens_total",
))  # fmt: skip
"""What vLLM's dashboards read, without the prefix."""
NO_STATS = Stats(0, 0, 0, 0, 0, 0, 0, 0)


class Metrics:
    """All metrics of one server. Series exist from the start, so a scrape before the first request shows zeros."""

    def __init__(self, model_name: str, block_size: int = 0, *, vllm_names: bool = False) -> None:
        self._block_size = block_size
        self.registry = CollectorRegistry()
        self._renamed = CollectorRegistry()
        if vllm_names:
            self._renamed.register(_VllmNames(self.registry))
        labels = {"model_name": model_name}

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"tpserve:{name}", text, tuple(labels), registry=self.registry).labels(**labels)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"tpserve:{name}", text, tuple(labels), registry=self.registry).labels(**labels)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"tpserve:{name}", text, tuple(labels), registry=self.registry, buckets=buckets).labels(**labels)

        self._running = gauge("num_requests_running", "Sequences that hold a slot.")
        self._waiting = gauge("num_requests_waiting", "Sequences that wait for a slot.")
        self._cache = gauge("kv_cache_usage_perc", "KV cache blocks in use, 1 means all of them.")
        self._totals = {
            "prompt_tokens": counter("prompt_tokens", "Prompt tokens computed."),
            "generation_tokens": counter("generation_tokens", "Tokens generated."),
            "preemptions": counter("num_preemptions", "Sequences that gave their blocks back and start over."),
            "prefix_cache_queries": counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
            "prefix_cache_hits": counter("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
            "resumed": counter("resumed_requests", "Requests that went on after a fault, with the tokens they had."),
            "resume_mismatches": counter("resume_mismatch", "Tokens of such requests that were drawn again and differ."),
        }
        self._last = dict.fromkeys(self._totals, 0)
        self.totals = dict.fromkeys(self._totals, 0)
        """The values of the counters."""
        self.stats = NO_STATS
        """The engine's last Stats."""
        self._experts = Counter(
            "tpserve:expert_tokens",
            "Tokens routed to each expert of a mixture of experts.",
            (*labels, "layer", "expert"),
            registry=self.registry,
        )
        self._labels = labels
        self._expert_totals: dict[int, array[int]] = {}
        success = Counter("tpserve:request_success", "Requests ended.", (*labels, "finished_reason"), registry=self.registry)
        self._ended = {reason: success.labels(**labels, finished_reason=reason) for reason in FINISH_REASONS}
        recoveries = Counter("tpserve:recoveries", "Epochs that ran after a fault.", (*labels, "cause"), registry=self.registry)
        self._recoveries = {cause: recoveries.labels(**labels, cause=cause) for cause in CAUSES}
        self._quarantined = counter("requests_quarantined", "Requests ended because they kill the engine.")
        self._recovery = histogram("recovery_seconds", "From a fault to the next epoch that runs.", LATENCY_S)
        self._ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", TTFT_S)
        self._itl = _TokenHistogram(
            "tpserve:inter_token_latency_seconds", "Between two consecutive outputs of a request.", labels, ITL_S
        )
        self.registry.register(self._itl)
        self._e2e = histogram("e2e_request_latency_seconds", "From arrival to the end.", LATENCY_S)
        self._queue = histogram("request_queue_time_seconds", "Waiting for a slot.", LATENCY_S)
        self._prefill = histogram("request_prefill_time_seconds", "From the slot to the first token.", LATENCY_S)
        self._decode = histogram("request_decode_time_seconds", "From the first token to the last.", LATENCY_S)
        self._inference = histogram("request_inference_time_seconds", "From the slot to the last token.", LATENCY_S)
        self._per_token = histogram("request_time_per_output_token_seconds", "Mean time between tokens of a request.", ITL_S)
        self._iteration = histogram("iteration_tokens_total", "Tokens of a step, prompts and outputs.", ITERATION_TOKENS)
        self._config = Gauge(
            "tpserve:cache_config_info", "1, labelled with the size of the KV cache.", (*labels, "block_size", "num_gpu_blocks"),
            registry=self.registry,
        )  # fmt: skip
        self._prompt = histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self._generation = histogram("request_generation_tokens", "Generated tokens of a request.", TOKENS)

    def engine(self, stats: Stats) -> None:
        """Record the engine's gauges and running totals."""
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._cache.set(stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0)
        for name, counter in self._totals.items():
            total = int(getattr(stats, name))
            before = self._last[name] if stats.epoch == self.stats.epoch else 0
            counter.inc(total - before)
            self.totals[name] += total - before
            self._last[name] = total
        earlier = self.stats if stats.epoch == self.stats.epoch else NO_STATS
        if stats.steps > earlier.steps:
            tokens = stats.prompt_tokens + stats.generation_tokens - earlier.prompt_tokens - earlier.generation_tokens
            self._iteration.observe(tokens)
        if stats.blocks_total != self.stats.blocks_total:
            self._config.clear()
            self._config.labels(**self._labels, block_size=self._block_size, num_gpu_blocks=stats.blocks_total).set(1)
        self.stats = stats

    def experts(self, layers: Sequence[int], tokens: bytes) -> None:
        """Record running totals of experts. `tokens`: 64-bit integers, [len(layers), experts] row by row."""
        totals = array("q", tokens)
        count = len(totals) // len(layers)
        for i, layer in enumerate(layers):
            now = totals[i * count : (i + 1) * count]
            last = self._expert_totals.get(layer, array("q", bytes(8 * count)))
            for expert, (total, before) in enumerate(zip(now, last, strict=True)):
                series = self._experts.labels(**self._labels, layer=layer, expert=expert)
                series.inc(total - before if total >= before else total)  # a new epoch counts from 0
            self._expert_totals[layer] = now

    def recovered(self, cause: Literal["outside", "unclear", "error"], took_s: float) -> None:
        """Record the time from a fault to the next epoch that runs."""
        self._recoveries[cause].inc()
        self._recovery.observe(took_s)

    def quarantined(self) -> None:
        """Record a request that was ended because it kills the engine."""
        self._quarantined.inc()

    def first_token(self, since_arrival_s: float) -> None:
        """Record a sequence's time to first token."""
        self._ttft.observe(since_arrival_s)

    def next_tokens(self, since_last_s: Sequence[float]) -> None:
        """Record times between two outputs of a sequence, all those of a frame together."""
        self._itl.observe(since_last_s)

    def ended(
        self, reason: FinishReason, since_arrival_s: float, prompt_tokens: int, generation_tokens: int, times: PhaseTimes | None
    ) -> None:
        """Record the end of a sequence. `times`: None when the client's answer was complete before the engine's Done."""
        self._ended[reason].inc()
        self._e2e.observe(since_arrival_s)
        self._prompt.observe(prompt_tokens)
        self._generation.observe(generation_tokens)
        if times is not None:
            self._queue.observe(times.queue_s)
            self._prefill.observe(times.prefill_s)
            self._decode.observe(times.decode_s)
            self._inference.observe(times.prefill_s + times.decode_s)
            if generation_tokens > 1:
                self._per_token.observe(times.decode_s / (generation_tokens - 1))

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry) + generate_latest(self._renamed)


class _TokenHistogram(Collector):
    """A histogram that takes many values at once: one value of the library's takes as long as twenty here."""

    def __init__(self, name: str, text: str, labels: dict[str, str], buckets: Sequence[float]) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._buckets = tuple(map(float, buckets))
        self._counts, self._sum = [0] * (len(buckets) + 1), 0.0

    def observe(self, values: Sequence[float]) -> None:
        """Count the values. A bucket holds its upper bound."""
        for value in values:
            self._counts[bisect_left(self._buckets, value)] += 1
        self._sum += sum(values)

    def collect(self) -> Iterator[Metric]:
        bounds = (*map(floatToGoString, self._buckets), "+Inf")
        family = HistogramMetricFamily(self._name, self._text, labels=tuple(self._labels))
        buckets = list(zip(bounds, map(float, accumulate(self._counts)), strict=True))
        family.add_metric(tuple(self._labels.values()), buckets, self._sum)
        yield family


class _VllmNames(Collector):
    """The metrics of `registry` that vLLM has, with its prefix."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            if metric.name.removeprefix("tpserve:") in VLLM_NAMES:
                renamed = Metric(metric.name.replace("tpserve:", "vllm:"), metric.documentation, metric.type)
                renamed.samples = [sample._replace(name=sample.name.replace("tpserve:", "vllm:")) for sample in metric.samples]
                yield renamed
