"""Every kernel compiles for Hopper, fits its shared memory and uses its matrix units, without a card."""

import json
import os
import subprocess
import sys
from pathlib import Path

HOPPER_SHARED_BYTES = 227 * 1024
PRODUCTS = ("attention_kernel", "_grouped_kernel")


def test_kernels_compile_for_hopper() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_for_hopper.py")
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {kernel["name"] for kernel in kernels} == {
        "_norm_kernel", "_gated_kernel", "_rope_kernel", "_write_kv_kernel", "attention_kernel", "merge_kernel",
        "_grouped_kernel", "_router_kernel", "_route_kernel", "_permute_kernel", "_combine_kernel",
    }  # fmt: skip
    for kernel in kernels:
        assert kernel["shared"] <= HOPPER_SHARED_BYTES, kernel
        assert kernel["wgmma"] == (kernel["name"] in PRODUCTS and kernel["dtype"] != "float32"), kernel
