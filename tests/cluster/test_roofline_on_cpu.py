"""`tpserve bench roofline`: what table, JSON and picture hold, and the counts of its floor. Nothing depends on speed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from msgspec.structs import replace

from tests.specs import EXPERTS, small
from tpserve.__main__ import main
from tpserve.bench.roofline_work import MachineRates, StepWork, step_work
from tpserve.cli.server_flags import parse
from tpserve.config.engine_config import EngineConfig
from tpserve.config.resolve import resolve
from tpserve.types.machine import Machine
from tpserve.types.model_files import ModelFiles
from tpserve.types.model_spec import CacheGroup, ModelSpec
from tpserve_kernels.cpu.library import load

SMALL = ("--batch", "1,3", "--context", "40", "--prefill", "24", "--steps", "2")


def bench(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tpserve", "bench", "roofline", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env={**os.environ, **environ})


@pytest.mark.parametrize(
    ("flags", "environ", "kind"),
    [
        pytest.param(
            *(("-q", "int8", "--kv-cache-dtype", "int8"), {}, "int8"),
            marks=pytest.mark.skipif(load()[0] is None, reason="no library of CPU kernels"),
        ),
        (("--dtype", "float32"), {"TPSERVE_ISA": "off"}, "float32"),
    ],
    ids=["int8", "without the library"],
)
def test_every_step_is_measured(flags: tuple[str, ...], environ: dict[str, str], kind: str, tmp_path: Path) -> None:
    output, picture = tmp_path / "roofline.json", tmp_path / "roofline.svg"
    done = bench("--shapes", "built-in", *SMALL, *flags, "--output", str(output), "--plot", str(picture), **environ)
    assert done.returncode == 0, done.stderr
    assert ("without the library of CPU kernels, by torch's operators: TPSERVE_ISA is off" in done.stdout) == bool(environ)
    report = json.loads(output.read_text())
    assert report["benchmark"] == "roofline" and report["workload"]["engine"] == list(flags)
    figures = report["figures"]
    assert list(figures["rates"]) == [kind] and ("off" in figures["kernels"]) == bool(environ)
    rates = MachineRates(**figures["rates"][kind])
    assert rates.bytes_per_s > 1e8 and rates.flops_per_s > 1e8
    assert [case["step"] for case in figures["cases"]] == ["decode 1", "decode 3", "prefill 24"]
    rows = [line.split() for line in done.stdout.splitlines()[-3:]]
    for case, row, tokens in zip(figures["cases"], rows, (1, 3, 24), strict=True):
        work = StepWork(**case["work"])
        assert case["floor_ms"] == pytest.approx(work.floor_s(rates) * 1e3, abs=1e-4) and case["bound"] == work.bound(rates)
        assert (
            case["share"] == pytest.approx(case["floor_ms"] / case["p50_ms"], abs=2e-4) and 0 < case["best_ms"] <= case["p50_ms"]
        )
        assert case["tokens_per_s"] == pytest.approx(tokens / case["p50_ms"] * 1e3, rel=1e-3)
        assert row[0] == "built-in" and " ".join(row[1:3]) == case["step"] and row[-1] == f"({case['bound']})"
    drawn = ElementTree.fromstring(picture.read_text())
    assert len(drawn.findall("{*}circle")) == 3 and len(drawn.findall("{*}polyline")) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shapes", "2B"), "--shapes takes built-in, 100M, 1B, not '2B'"),
        (("MODEL", "--shapes", "1B"), "--shapes are measured without MODEL, and MODEL is given"),
        (("--device", "cuda"), "is for the CPU: `python kernels/bench_roofline.py"),
        (("--shapes", "built-in", "--context", "100000"), "built-in has "),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "roofline", *arguments]) == 2
    text = capsys.readouterr().err
    assert text.startswith("tpserve: error: ") and said in text and text.count("\n") == 1


def work(spec: ModelSpec, line: str, *spans: tuple[int, int], library: bool = True) -> StepWork:
    flags = parse(["m", "--device", "cpu", "--dtype", "float32", *line.split()])
    config: EngineConfig = resolve(flags, ModelFiles("m", "m"), spec, Machine(1, 1, 1, 0, 2, "serve"))
    return step_work(spec, config, spans, library=library)


def test_what_a_step_reads_and_computes() -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    spec = small(**sizes, head_dim=16, vocab_size=128, max_position=4096, tie_embeddings=True)
    layer = 64 * (4 + 2 * 2) * 16 + 64 * 64 + 3 * 64 * 96
    norms, head, position = 5 * 64, 128 * 64, 2 * 2 * 2 * 16
    decode = work(spec, "", (9, 1), (99, 1), library=False)
    assert decode.num_bytes == 4 * (2 * layer + norms + head + position * (10 + 100))
    assert decode.flops == 2 * 2 * (2 * layer + norms + head) + 2 * 2 * (4 * 32) * (10 + 100)
    prefill = work(spec, "", (0, 50), library=False)
    assert prefill.num_bytes == 4 * (2 * layer + norms + head + position * 50)
    assert prefill.flops == 2 * (50 * (2 * layer + norms) + head) + 2 * 2 * (4 * 32) * (50 * 51 // 2)
    assert work(spec, "-q int8-head --kv-cache-dtype int8", (9, 1)).num_bytes < 0.45 * work(spec, "", (9, 1)).num_bytes
    windowed = replace(spec, cache=(CacheGroup((0,), 8), CacheGroup((1,), None)))
    assert decode.num_bytes - work(windowed, "", (9, 1), (99, 1), library=False).num_bytes == 4 * position // 2 * (110 - 16)
    assert prefill.flops - work(windowed, "", (0, 50), library=False).flops == 2 * (4 * 32) * (50 * 51 // 2 - (36 + 42 * 8))


def test_of_experts_those_of_a_token_count() -> None:
    spec = small(experts=replace(EXPERTS, count=8, shared_size=0, layers=(0,)), num_layers=1)
    few = small(experts=replace(EXPERTS, count=EXPERTS.routing.num_active, shared_size=0, layers=(0,)), num_layers=1)
    assert work(spec, "", (9, 1)) == work(few, "", (9, 1))
