"""The roofline benchmark runs from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "kernels" / "bench_roofline.py"


def test_smoke(tmp_path: Path) -> None:
    output = tmp_path / "roofline.json"
    command = [sys.executable, str(SCRIPT), "--smoke", "--output", str(output)]
    run = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    report = json.loads(output.read_text())
    kernels = {"rms_norm", "add_rms_norm", "silu_mul", "place_heads", "paged_attention"}
    assert {row["kernel"] for row in report["rows"]} == kernels
    for row in report["rows"]:
        assert row["us"] > 0 and row["share_of_floor"] > 0 and row["kernel"] in run.stdout
        assert (row["tflop_s"] > 0) == (row["kernel"] == "paged_attention")


def test_without_a_card_it_says_what_to_do(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "roofline.json")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and "no CUDA device" in run.stderr and "--smoke" in run.stderr
