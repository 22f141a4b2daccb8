"""The kernels inside the model give what the CPU form gives: in Triton's interpreter everywhere, on a card where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.parity.two_forms import OWN, dtypes

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"torch.float32": 1e-4, "torch.bfloat16": 0.2}
"""Logits are near 1; bfloat16 keeps 8 bits, and two layers add up their roundings."""


def assert_close(other: str, environment: dict[str, str]) -> None:
    """Run the script and hold every difference that it prints to its dtype's limit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "tests.parity.two_forms", other]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == sum(len(dtypes(family, other)) for family in OWN)
    for family, dtype, difference in lines:
        assert float(difference) < LIMITS[dtype], (family, dtype, difference)


def test_kernels_in_the_interpreter() -> None:
    assert_close("interpreter", {"TRITON_INTERPRET": "1"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_a_card() -> None:
    assert_close("cuda", {})
