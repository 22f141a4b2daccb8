"""Limits of keys: windows that slide, requests at once, prompts and outputs, and what clients and operators are told."""

import math
import random
from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tpserve.engine_client.requests import RequestHandle, RequestState
from tpserve.errors import UserError
from tpserve.frontend.api_keys import NOBODY, KeyLimits, KeyOwner
from tpserve.frontend.key_usage import KeyUsage, duration
from tpserve.frontend.sliding_window import SlidingWindow


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.25

    def __call__(self) -> float:
        return self.now_s


def handle(choices: int = 1) -> RequestHandle:
    """A request of the table, as far as usage looks at it."""
    request = RequestHandle(streaming=True)
    request.sequences = [cast(RequestState, SimpleNamespace(token_s=array("d"))) for _ in range(choices)]
    return request


def refused(act: Callable[[], None]) -> UserError:
    with pytest.raises(UserError) as caught:
        act()
    assert caught.value.status == 429 and caught.value.code == "rate_limit_exceeded"
    return caught.value


def test_no_window_of_time_holds_more_than_its_limit_and_none_is_late_by_more_than_a_slot() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        window, now_s, came = SlidingWindow(60.0, 60), rng.uniform(0, 1e6), list[tuple[float, int]]()
        for _ in range(300):
            now_s += rng.expovariate(1.0)
            amount, used = rng.randint(1, 9), window.used(now_s)
            exact = sum(each for at_s, each in came if at_s > now_s - 60)
            late = sum(each for at_s, each in came if at_s > now_s - 61)
            assert exact <= used <= late
            if used + amount <= 100:
                window.add(now_s, amount, now_s)
                came.append((now_s, amount))
            else:
                wait_s = window.frees_s(now_s, used + amount - 100)
                assert 0 < wait_s <= 61
                assert sum(each for at_s, each in came if at_s > now_s + wait_s - 60) + amount <= 100
        assert window.used(now_s + 61) == 0 and window.frees_s(now_s + 61, 5) == 0


def test_tokens_at_their_times_are_counted_as_one_by_one() -> None:
    rng = random.Random(1)
    for length_s, slots in ((60.0, 60), (86400.0, 288)):
        times_s = array("d", sorted(rng.uniform(0, 3 * length_s) for _ in range(5000)))
        now_s, begin = times_s[-1] + 1, 700
        at_once, single = SlidingWindow(length_s, slots), SlidingWindow(length_s, slots)
        at_once.add_each(times_s, begin, now_s)
        for at_s in times_s[begin:]:
            single.add(at_s, 1, now_s)
        for later_s in (0.0, length_s / 3, length_s / 2, length_s * 2):
            assert at_once.used(now_s + later_s) == single.used(now_s + later_s)


def test_requests_at_once_until_the_last_choice_has_ended() -> None:
    clock = Clock()
    usage, owner = KeyUsage("m", clock), KeyOwner("a", KeyLimits(max_parallel_requests=2))
    first, second = handle(3), handle()
    for each in (first, second):
        usage.refuse(owner, 10)
        usage.begin("a", each, 10)
    error = refused(lambda: usage.refuse(owner, 1))
    assert error.retry_s == 1 and "parallel requests: Limit 2, Used 2, Requested 1" in str(error)
    usage.refuse(KeyOwner("b", owner.limits), 1)  # another name has its own
    usage.refuse(KeyOwner("a", KeyLimits(max_parallel_requests=3)), 1)  # the file has changed: this counts at once
    usage.refuse(NOBODY, 10**9)
    usage.end("a", first)
    usage.refuse(owner, 1)


def test_requests_a_minute() -> None:
    clock = Clock()
    usage, owner = KeyUsage("m", clock), KeyOwner("a", KeyLimits(requests_per_minute=2))
    for _ in range(2):
        usage.refuse(owner, 1)
        usage.begin("a", each := handle(), 1)
        usage.end("a", each)
        clock.now_s += 20
    headers = usage.headers(owner)
    assert headers["x-ratelimit-limit-requests"] == "2" and headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-reset-requests"] == "40.8s" and "x-ratelimit-limit-tokens" not in headers
    error = refused(lambda: usage.refuse(owner, 1))
    assert error.retry_s == 20.75 and "Rate limit reached for a on requests per min (RPM)" in str(error)
    clock.now_s += 20.7
    refused(lambda: usage.refuse(owner, 1))
    clock.now_s += 0.1
    usage.refuse(owner, 1)


def test_prompts_and_outputs_count_while_they_come() -> None:
    clock = Clock()
    usage, owner = KeyUsage("m", clock), KeyOwner("a", KeyLimits(tokens_per_minute=100, tokens_per_day=300))
    usage.refuse(owner, 40)
    usage.begin("a", stream := handle(2), 40)
    usage.refuse(owner, 60)
    refused(lambda: usage.refuse(owner, 61))
    for second in range(120):  # nobody looks for two minutes
        clock.now_s += 1
        stream.sequences[second % 2].token_s.append(clock.now_s)
    assert usage.headers(owner)["x-ratelimit-remaining-tokens"] == "39", "61 slots, one token each"
    usage.refuse(owner, 39)
    error = refused(lambda: usage.refuse(owner, 40))
    assert error.retry_s is not None and 0 < error.retry_s <= 1
    clock.now_s += 3600
    assert usage.headers(owner)["x-ratelimit-limit-tokens"] == "100"
    usage.begin("a", other := handle(), 90)
    clock.now_s += 120
    headers = usage.headers(owner)
    assert (headers["x-ratelimit-limit-tokens"], headers["x-ratelimit-remaining-tokens"]) == ("300", "50"), "the day is tighter"
    assert headers["x-ratelimit-reset-tokens"].startswith("23h") or headers["x-ratelimit-reset-tokens"].startswith("24h")
    assert "tokens per day (TPD)" in str(refused(lambda: usage.refuse(owner, 51)))
    too_large = refused(lambda: usage.refuse(owner, 101))
    assert too_large.retry_s == math.inf and "Request too large for a on tokens per min (TPM): Limit 100" in str(too_large)
    usage.end("a", stream)
    usage.end("a", other)
    text = generate(usage)
    assert 'tpserve:key_generation_tokens_total{api_key_name="a",model_name="m"} 120.0' in text
    assert 'tpserve:key_prompt_tokens_total{api_key_name="a",model_name="m"} 130.0' in text
    assert 'tpserve:key_requests_running{api_key_name="a",model_name="m"} 0.0' in text
    assert 'tpserve:key_requests_refused_total{api_key_name="a",limit="tokens_per_minute",model_name="m"} 3.0' in text
    assert 'tpserve:key_requests_refused_total{api_key_name="a",limit="tokens_per_day",model_name="m"} 1.0' in text


def generate(usage: KeyUsage) -> str:
    registry = CollectorRegistry()
    registry.register(usage)
    return generate_latest(registry).decode()


def test_what_an_earlier_process_has_drawn_is_not_counted_again() -> None:
    clock = Clock()
    usage, resumed = KeyUsage("m", clock), handle()
    resumed.sequences[0].token_s.extend([clock.now_s] * 50)
    usage.begin("a", resumed, 0)
    resumed.sequences[0].token_s.append(clock.now_s)
    usage.end("a", resumed)
    assert 'tpserve:key_generation_tokens_total{api_key_name="a",model_name="m"} 1.0' in generate(usage)


def test_durations_as_openai_shows_them() -> None:
    shown = {0.0: "0s", 1.0: "1s", 1.55: "1.6s", 59.96: "1m0s", 360.0: "6m0s", 86399.0: "23h59m59s"}
    assert {seconds: duration(seconds) for seconds in shown} == shown
