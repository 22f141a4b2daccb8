"""What an operator reads in the log."""

import logging
import re
import time
from pathlib import Path

import pytest

from tests.http import checks
from tests.http.inprocess import serving, until
from tpserve.engine_client.status import EngineStatus
from tpserve.frontend import traffic
from tpserve.frontend.traffic import Throughput
from tpserve.observe.metrics import Metrics
from tpserve.types.messages import Stats

LINE = re.compile(
    r"Avg prompt throughput: (\d+\.\d) tokens/s, Avg generation throughput: (\d+\.\d) tokens/s, Running: (\d+) reqs, "
    r"Waiting: (\d+) reqs, KV cache usage: (\d+\.\d)%, Prefix cache hit rate: (\d+\.\d)%"
)


def test_throughput_is_what_came_since_the_last_line() -> None:
    metrics = Metrics("m")
    throughput = Throughput(metrics, 0.0)
    assert throughput.line(10.0) is None, "nothing is said while nothing happens"
    metrics.engine(
        Stats(2, 1, 5, 50, 0, 9, prompt_tokens=400, generation_tokens=120, prefix_cache_queries=200, prefix_cache_hits=50)
    )
    match = LINE.fullmatch(throughput.line(20.0) or "")
    assert match is not None and match.groups() == ("40.0", "12.0", "2", "1", "10.0", "25.0")
    idle = Stats(0, 0, 0, 50, 0, 9, prompt_tokens=400, generation_tokens=140, prefix_cache_queries=200, prefix_cache_hits=50)
    metrics.engine(idle)
    match = LINE.fullmatch(throughput.line(24.0) or "")
    assert match is not None and match.groups()[:3] == ("0.0", "5.0", "0")
    assert throughput.line(34.0) is None
    metrics.engine(Stats(1, 0, 1, 50, 0, 1, prompt_tokens=10, generation_tokens=0, epoch=1))  # a new epoch counts from 0
    match = LINE.fullmatch(throughput.line(44.0) or "")
    assert match is not None and match[1] == "1.0"


def test_totals_of_every_epoch_add_up() -> None:
    """Also where the first that is heard of an epoch is as much as the last of the one before."""
    metrics = Metrics("m")
    for epoch, resumed in ((1, 0), (2, 0), (2, 5), (3, 5), (3, 5), (4, 7)):
        metrics.engine(Stats(0, 0, 0, 50, 0, 9, 0, 0, epoch=epoch, resumed=resumed, resume_mismatches=epoch))
    text = metrics.render().decode()
    assert 'tpserve:resumed_requests_total{model_name="m"} 17.0' in text
    assert 'tpserve:resume_mismatch_total{model_name="m"} 10.0' in text


def test_a_line_for_each_request_and_nothing_of_its_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), serving(tmp_path, log_requests=True) as server:
        client = checks.Client(server.url, {"X-Request-Id": "abc"})
        client.completion(prompt="zanzibar", max_tokens=3, ignore_eos=True, n=2)
        traced = checks.Client(
            server.url, client.headers | {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
        )
        traced.chat(messages=[{"role": "user", "content": "zanzibar"}], max_tokens=2, ignore_eos=True, stream=True)
        client.completion(prompt="zanzibar", max_tokens=-1)
        client.get("/zanzibar")
        client.get("/livez")
        client.get("/metrics")
        server.engine.paused = True
        stream = checks.open_stream(server.url, prompt="zanzibar", max_tokens=9, request_id="left")
        server.engine.paused = False
        next(stream)
        server.engine.paused = True
        stream.close()
        until(lambda: "left" in caplog.text)
    lines = [record.getMessage() for record in caplog.records if record.name == traffic.__name__]
    whole, streamed, wrong, missing, left = (line for line in lines if line.startswith("request "))
    time = r"\d+\.\d{3} s"
    assert re.fullmatch(
        rf"request cmpl-abc: POST /v1/completions, model tiny, \d+ prompt tokens, 6 output tokens, finish length, TTFT {time}, "
        rf"status 200, {time}",
        whole,
    )
    assert re.fullmatch(
        r"request chatcmpl-abc: POST /v1/chat/completions, .* 2 output tokens, finish length, .* status 200, "
        rf"{time}, trace 0af7651916cd43dd8448eb211c80319c",
        streamed,
    )
    assert re.fullmatch(rf"request abc: POST /v1/completions, status 400, {time}", wrong)
    assert re.fullmatch(rf"request abc: GET \(no such route\), status 404, {time}", missing)
    assert re.search(r"request cmpl-left: .* finish abort, .* status (499|200), ", left)
    assert "zanzibar" not in caplog.text


def test_requests_are_not_logged_unless_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), serving(tmp_path) as server:
        checks.Client(server.url).completion(max_tokens=1)
    assert "request cmpl" not in caplog.text


def test_the_log_tells_of_traffic_and_of_a_drain(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LINE_S", 0.05), ("DRAIN_LINE_S", 0.05), ("TICK_S", 0.01)):
        monkeypatch.setattr(traffic, name, value)
    with caplog.at_level(logging.INFO), serving(tmp_path, drain_timeout=7.0) as server:
        stream = checks.open_stream(server.url, prompt="The red fox", max_tokens=200, ignore_eos=True)
        next(stream)
        until(lambda: LINE.search(caplog.text) is not None)
        server.engine.paused = True
        server.states.append(EngineStatus("draining"))
        until(lambda: "draining: waiting for" in caplog.text)
        server.engine.paused = False
        for _ in stream:
            pass
    assert "draining: 1 open sequence may take up to 7 s more (--drain-timeout)" in caplog.text
    assert re.search(
        r"draining: waiting for 1 open sequence \(\d+ tokens so far, the oldest came \d+ s ago\); [67] s left", caplog.text
    )
    assert re.search(r"drained in \d+\.\d s", caplog.text)


@pytest.mark.parametrize("log_stats", [True, False])
def test_the_line_about_throughput_can_be_left_out(
    log_stats: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic, "LINE_S", 0.01)
    monkeypatch.setattr(traffic, "TICK_S", 0.01)
    with caplog.at_level(logging.INFO), serving(tmp_path, log_stats=log_stats) as server:
        checks.Client(server.url).completion(prompt="a", max_tokens=3, ignore_eos=True)
        time.sleep(0.3)
    assert ("Avg prompt throughput" in caplog.text) is log_stats
