"""`tpserve bench latency` and `throughput` on real ranks: what their reports hold. Nothing depends on how fast it is."""

import json
import os
import re
import signal
import threading
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from tests.server import environment, pids_with
from tpserve.__main__ import main


@pytest.fixture(autouse=True)
def nothing_stays() -> Any:
    yield
    deadline = time.monotonic() + 10
    while left := pids_with("--seed\x00770"):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.1)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "report.json"


def test_latency(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--batch-size", "3", "--input-len", "20", "--output-len", "9", "--num-iters", "2", "--num-iters-warmup", "1"]
    picture = output.with_name("batches.svg")
    line = ["-tp", "2", "--seed", "7701", *load, "--log_level=warning", "--output", str(output), "--plot", str(picture)]
    assert main(["bench", "latency", *line]) == 0
    report = json.loads(output.read_text())
    assert list(report) == ["benchmark", "date", "versions", "machine", "workload", "figures"]
    assert set(report["versions"]) == {"tpserve", "python", "torch"} and report["benchmark"] == "latency"
    assert report["workload"] == {
        "batch_size": 3, "input_len": 20, "output_len": 9, "num_iters": 2, "num_iters_warmup": 1, "seed": 7701,
        "engine": {"tensor_parallel_size": 2, "log_level": "warning"},
    }  # fmt: skip
    result = report["figures"]
    for name in ("prefill", "whole"):
        assert 0 < result[name]["p50_ms"] <= result[name]["p90_ms"] <= result[name]["p99_ms"]
    assert result["ms_per_token"] == pytest.approx((result["whole"]["p50_ms"] - result["prefill"]["p50_ms"]) / 8, abs=1e-3)
    assert result["prefill_tokens_per_s"] == pytest.approx(60_000 / result["prefill"]["p50_ms"], rel=1e-3)
    assert result["output_tokens_per_s"] == pytest.approx(3000 / result["ms_per_token"], rel=1e-2)
    assert set(result["latency"]) == {"ttft", "tpot", "itl", "e2el"}, "of the batches of all tokens, request by request"
    assert 0 < result["latency"]["ttft"]["p50_ms"] < result["latency"]["e2el"]["p50_ms"] <= result["whole"]["p99_ms"]
    assert result["latency"]["itl"]["p50_ms"] < result["latency"]["e2el"]["p50_ms"] / 4
    said = capsys.readouterr().out
    assert "ms_per_token" in said and re.search(r"^ITL( +[\d.,]+){4}$", said, re.M)
    drawn = picture.read_text()
    assert len(ET.fromstring(drawn).findall("{*}polyline")) == 5 and "batches of 3, 20 tokens in, 9 out, seed 7701" in drawn


def test_throughput(output: Path) -> None:
    load = ["--num-prompts", "12", "--input-len", "20", "--output-len", "8", "--range-ratio", "0.5", "--prefix-len", "32"]
    engine = ["--load-format", "dummy", "--seed", "7702", "--log-level", "warning"]
    assert main(["bench", "throughput", *engine, *load, "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert report["workload"]["engine"] == {"load_format": "dummy", "log_level": "warning"}
    result = report["figures"]
    assert 12 * (32 + 10) <= result["input_tokens"] <= 12 * (32 + 30) and 12 * 4 <= result["output_tokens"] <= 12 * 12
    assert result["cached_tokens"] == 12 * 32, "the warm-up leaves the shared prefix, and only that, in the cache"
    assert result["requests_per_s"] == pytest.approx(12 / result["duration_s"], rel=0.01)
    total = result["input_tokens"] + result["output_tokens"]
    rounded_ms = result["duration_s"] * 1e3 + 1
    assert result["latency"]["ttft"]["p50_ms"] <= result["latency"]["e2el"]["p99_ms"] <= rounded_ms
    assert result["total_tokens_per_s"] == pytest.approx(total / result["duration_s"], rel=0.01)


def test_answers_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--input-len", "2040", "--output-len", "20", "--batch-size", "1", "--seed", "7703", "--log-level", "warning"]
    assert main(["bench", "latency", *load]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert "2040 tokens in and 20 out do not fit the context, 8 came out: lower --input-len" in said.err


def test_an_agent_that_dies(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The death of a rank would change nothing."""

    def strike() -> None:
        def parent(pid: int) -> int:
            return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

        agents: list[int] = []
        while not any(environment(pid).get("TPSERVE_RUNTIME_DIR") for pid in agents):
            agents = [pid for pid in pids_with("tpserve.agent") if parent(pid) == os.getpid()]
            time.sleep(0.01)
        time.sleep(1.0)
        os.kill(agents[0], signal.SIGKILL)

    output.write_text("of an earlier run")
    threading.Thread(target=strike).start()
    assert main(["bench", "throughput", "--seed", "7704", "--output", str(output)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("tpserve bench throughput: ")
    assert output.read_text() == "of an earlier run"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("latency --batch-size 0", "--batch-size must be at least 1, not '0'"),
        ("latency --tensor-parallel-sise 2", "unknown flag --tensor-parallel-sise: did you mean --tensor-parallel-size?"),
        ("latency --port 3", "port is only for `tpserve serve`"),
        ("latency /nowhere", "no model directory /nowhere"),
        ("throughput -pp 5", "--pipeline-parallel-size 5, but the model has 4 layers"),
        ("throughput --output /nowhere/x.json", "--output /nowhere/x.json: No such file or directory"),
        ("latency --plot /nowhere/x.svg", "--plot /nowhere/x.svg: No such file or directory"),
        ("latency --plot x.png", "--plot must be an .svg file"),
    ],
)
def test_what_cannot_be_measured_offline(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *line.split()]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert printed.err.startswith("tpserve: error: ") and said in printed.err
