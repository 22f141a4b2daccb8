"""`tpserve bench step` as a process with real sockets: what table and JSON hold. Nothing depends on how fast it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tpserve", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_every_case_is_measured(transport: str, tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    arguments = ["step", "--batch", "1,4", "--steps", "20", "--context", "40", "--subscribers", "2", "--transport"]
    done = bench(*arguments, transport, "--output", str(output))
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert report["machine"]["cores"] > 0 and set(report["versions"]) == {"tpserve", "python", "torch", "pyzmq"}
    assert report["workload"] == {
        "batch": [1, 4], "subscribers": [2], "context": 40, "steps": 20, "transport": transport
    }  # fmt: skip
    cases = report["figures"]["cases"]
    assert [(case["batch"], case["subscribers"], case["bound_ms"]) for case in cases] == [(1, 2, 0.3), (4, 2, 0.326)]
    for case in cases:
        total, phases = case["total"], case["phases"]
        assert list(phases) == ["schedule", "encode", "broadcast", "build", "apply"]
        assert all(0 < spread["p50_ms"] <= spread["p99_ms"] < 1000 for spread in (total, case["total_cpu"], *phases.values()))
        assert max(phases[phase]["p50_ms"] for phase in ("schedule", "broadcast", "build", "apply")) < total["p50_ms"]
        assert case["holds"] is (total["p50_ms"] < case["bound_ms"])
        assert 14 * case["batch"] <= case["plan_bytes"] < 1000, "four numbers and two flags a chunk"
    rows = [line.split() for line in done.stdout.splitlines()[3:]]
    assert [row[:2] for row in rows] == [["1", "2"], ["4", "2"]]
    assert [row[-1] for row in rows] == ["holds" if case["holds"] else "MISSED" for case in cases]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("step --batch 0", "--batch must be positive numbers joined by commas, such as 3,2, not '0'"),
        ("step --batch 1,x", "--batch must be positive numbers joined by commas, such as 3,2, not '1,x'"),
        ("step --transport udp", "--transport must be one of ipc, tcp, not 'udp'"),
        ("step --stpes 3", "unknown flag --stpes: did you mean --steps?"),
        ("step --steps 5 --output /nowhere/step.json", "--output /nowhere/step.json: No such file or directory"),
        ("setp", "tpserve bench setp: there is no such benchmark: latency, throughput, serve, frontend, roofline, step"),
        ("", "tpserve bench: say which one: latency, "),
    ],
)
def test_what_cannot_be_measured_is_one_line(line: str, said: str) -> None:
    done = bench(*line.split())
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("tpserve: error: ") and said in done.stderr


def test_the_help_needs_no_torch() -> None:
    code = "import sys; from tpserve.__main__ import main; main(['bench', 'step', '--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0 and "--subscribers N,N" in done.stdout
