"""What the keys of each name use, against their limits: requests at once, requests a minute, tokens a minute and a day.

Owns the counts, by name: they outlive a change of the file of keys. Invariants:

    admission   a request is refused while another one like it would pass a limit; its prompt counts, as it is known
    output      counts at the times at which its tokens came, looked up when somebody asks and at the end: no token costs more.
                A request that was admitted is never cut, so outputs may pass a limit, and the next request waits for it
    end         a request counts as one at once until all of its choices have ended, whether somebody reads it or not
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from tpserve.engine_client.requests import RequestHandle
from tpserve.errors import UserError
from tpserve.frontend.api_keys import LIMITS, KeyOwner
from tpserve.frontend.sliding_window import SlidingWindow

MINUTE_S, DAY_S = 60.0, 86400.0
COUNT_EVERY_S = 0.1
"""How old the counts of outputs may be: every open request is looked at for them."""
MINUTE_SLOTS, DAY_SLOTS = 60, 288
PARALLEL, REQUESTS, TOKENS, TOKENS_DAY = LIMITS
CODE = "rate_limit_exceeded"
TEXTS = {
    PARALLEL: "parallel requests",
    REQUESTS: "requests per min (RPM)",
    TOKENS: "tokens per min (TPM)",
    TOKENS_DAY: "tokens per day (TPD)",
}
"""As OpenAI's errors say it."""
PARALLEL_RETRY_S = 1.0


class LimitState(NamedTuple):
    """One limit of a name now: `reset_s` seconds until nothing of it is used, if nothing comes."""

    limit: int
    used: int
    reset_s: float

    @property
    def remaining(self) -> int:
        return max(0, self.limit - self.used)


@dataclass
class NameUsage:
    """The counts of one name. `open`: handle -> the tokens of each of its sequences that are counted."""

    open: dict[RequestHandle, list[int]] = field(default_factory=dict)
    windows: dict[str, SlidingWindow] = field(
        default_factory=lambda: {
            REQUESTS: SlidingWindow(MINUTE_S, MINUTE_SLOTS),
            TOKENS: SlidingWindow(MINUTE_S, MINUTE_SLOTS),
            TOKENS_DAY: SlidingWindow(DAY_S, DAY_SLOTS),
        }
    )
    num_requests: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    counted_s: float = -math.inf
    """When the output of all open requests was counted last."""
    refused: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LIMITS, 0))

    def begin(self, handle: RequestHandle, prompt_tokens: int, now_s: float) -> None:
        """A request is admitted. What it has drawn before, in an earlier process, was counted there."""
        self.open[handle] = [len(sequence.token_s) for sequence in handle.sequences]
        self.num_requests += 1
        self.prompt_tokens += prompt_tokens
        self.windows[REQUESTS].add(now_s, 1, now_s)
        for name in (TOKENS, TOKENS_DAY):
            self.windows[name].add(now_s, prompt_tokens, now_s)

    def count(self, handles: Iterable[RequestHandle], now_s: float) -> None:
        """Count the output of some open requests so far. What came within a second counts as coming now."""
        num_recent, recent_s = 0, now_s - MINUTE_S / MINUTE_SLOTS
        for handle in handles:
            counted = self.open[handle]
            for index, sequence in enumerate(handle.sequences):
                begin, times_s = counted[index], sequence.token_s
                if begin == len(times_s):
                    continue
                counted[index] = len(times_s)
                self.generation_tokens += counted[index] - begin
                if times_s[begin] >= recent_s:
                    num_recent += counted[index] - begin
                    continue
                for name in (TOKENS, TOKENS_DAY):
                    self.windows[name].add_each(times_s, begin, now_s)
        for name in (TOKENS, TOKENS_DAY):
            self.windows[name].add(now_s, num_recent, now_s)

    def count_open(self, now_s: float) -> None:
        """Count the output of all open requests so far, unless that was done just now."""
        if now_s - self.counted_s >= COUNT_EVERY_S:
            self.counted_s = now_s
            self.count(self.open, now_s)

    def state(self, name: str, limit: int, now_s: float) -> LimitState:
        """A limit of a window, once `count_open` has been called."""
        used = self.windows[name].used(now_s)
        return LimitState(limit, used, self.windows[name].frees_s(now_s, used))


class KeyUsage(Collector):
    """The counts of all names, and what /metrics shows of them. `clock`: that of the request table."""

    def __init__(self, model_name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._model_name, self._clock = model_name, clock
        self._by_name: dict[str, NameUsage] = {}

    def refuse(self, owner: KeyOwner, prompt_tokens: int) -> None:
        """UserError 429 when a request with so many prompt tokens would pass a limit of its key now."""
        if not owner.name:
            return
        usage, now_s = self._usage(owner.name), self._clock()
        usage.count_open(now_s)
        for name, asked in ((PARALLEL, 1), (REQUESTS, 1), (TOKENS, prompt_tokens), (TOKENS_DAY, prompt_tokens)):
            limit = getattr(owner.limits, name)
            if limit is None:
                continue
            used = len(usage.open) if name == PARALLEL else usage.windows[name].used(now_s)
            if used + asked > limit:
                usage.refused[name] += 1
                wait_s = PARALLEL_RETRY_S if name == PARALLEL else usage.windows[name].frees_s(now_s, used + asked - limit)
                raise passed_limit(owner.name, name, limit, used, asked, wait_s)

    def begin(self, name: str, handle: RequestHandle, prompt_tokens: int) -> None:
        """A request of a key of this name is admitted."""
        if name:
            self._usage(name).begin(handle, prompt_tokens, self._clock())

    def end(self, name: str, handle: RequestHandle) -> None:
        """It has ended."""
        if name:
            usage = self._usage(name)
            usage.count([handle], self._clock())
            del usage.open[handle]

    def headers(self, owner: KeyOwner) -> dict[str, str]:
        """OpenAI's headers about the limits of a key: requests and tokens a minute, and of tokens a day if fewer are left."""
        usage, now_s, limits = self._usage(owner.name), self._clock(), owner.limits
        usage.count_open(now_s)
        tokens = [
            usage.state(name, limit, now_s)
            for name, limit in ((TOKENS, limits.tokens_per_minute), (TOKENS_DAY, limits.tokens_per_day))
            if limit is not None
        ]
        headers: dict[str, str] = {}
        if limits.requests_per_minute is not None:
            headers |= _headers("requests", usage.state(REQUESTS, limits.requests_per_minute, now_s))
        if tokens:
            headers |= _headers("tokens", min(tokens, key=lambda state: state.remaining))
        return headers

    def collect(self) -> Iterator[Metric]:
        """The series of each name, for prometheus_client."""
        labels = ("model_name", "api_key_name")
        running = GaugeMetricFamily("tpserve:key_requests_running", "Open requests of a key's name.", labels=labels)
        requests = CounterMetricFamily("tpserve:key_requests", "Requests admitted of a key's name.", labels=labels)
        prompt = CounterMetricFamily("tpserve:key_prompt_tokens", "Prompt tokens of a key's name.", labels=labels)
        output = CounterMetricFamily("tpserve:key_generation_tokens", "Tokens generated for a key's name.", labels=labels)
        refused = CounterMetricFamily(
            "tpserve:key_requests_refused", "Requests refused, by the limit that they would pass.", labels=(*labels, "limit")
        )
        for name, usage in self._by_name.items():
            usage.count_open(self._clock())
            values = (self._model_name, name)
            running.add_metric(values, len(usage.open))
            requests.add_metric(values, usage.num_requests)
            prompt.add_metric(values, usage.prompt_tokens)
            output.add_metric(values, usage.generation_tokens)
            for limit, count in usage.refused.items():
                refused.add_metric((*values, limit), count)
        yield from (running, requests, prompt, output, refused)

    def _usage(self, name: str) -> NameUsage:
        return self._by_name.setdefault(name, NameUsage())


def passed_limit(owner: str, name: str, limit: int, used: int, asked: int, wait_s: float) -> UserError:
    """The error 429 of a request that would pass a limit; one that is larger than the limit should not be sent again."""
    numbers = f"Limit {limit}, Used {used}, Requested {asked}"
    if asked > limit:
        text, wait_s = f"Request too large for {owner} on {TEXTS[name]}: {numbers}. Send a shorter one.", math.inf
    else:
        text = f"Rate limit reached for {owner} on {TEXTS[name]}: {numbers}. Please try again in {duration(wait_s)}."
    return UserError(text, code=CODE, status=429, retry_s=wait_s)


def duration(seconds: float) -> str:
    """Seconds as OpenAI's headers show them, such as 6m0s or 1.5s."""
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    text = f"{rest:.1f}".removesuffix(".0") + "s"
    return f"{hours}h{minutes}m{text}" if hours else f"{minutes}m{text}" if minutes else text


def _headers(kind: str, state: LimitState) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{kind}": str(state.limit),
        f"x-ratelimit-remaining-{kind}": str(state.remaining),
        f"x-ratelimit-reset-{kind}": duration(state.reset_s),
    }
