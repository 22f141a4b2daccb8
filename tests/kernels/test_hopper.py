"""Every kernel compiles for Hopper, fits its shared memory and uses its matrix units, without a card."""

import json
import os
import subprocess
import sys
from pathlib import Path

HOPPER_SHARED_BYTES = 227 * 1024
PRODUCTS = ("attention_kernel", "_grouped_kernel")
STACK_BYTES = {"attention_kernel": 1100, "_router_kernel": 8}
"""Of a thread. Attention keeps its state there while it walks a segment (latents: 1080), not in the loop over tiles."""
OF_A_DECODE_STEP = {"_place_heads_kernel", "plan_kernel", "attention_kernel", "merge_kernel"}
EXACT = {
    "_blocks_kernel", "_draw_kernel", "_pick_kernel", "_truncate_kernel", "_write_kernel", "_mask_bits_kernel", "_allow_kernel",
    "_ban_kernel", "_bias_kernel", "_penalize_kernel", "_best_keys_kernel", "_masses_kernel", "_from_parts_kernel",
}  # fmt: skip
"""Kernels of the sampler: their bits are those of their references."""


def test_kernels_compile_for_hopper() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_for_hopper.py")
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {kernel["name"] for kernel in kernels} == {
        "_norm_kernel", "_gated_kernel", "_place_heads_kernel", "_place_latents_kernel", "plan_kernel", "attention_kernel",
        "merge_kernel", "_grouped_kernel", "_router_kernel", "_route_kernel", "_permute_kernel", "_combine_kernel", *EXACT,
    }  # fmt: skip
    for kernel in kernels:
        assert kernel["shared"] <= HOPPER_SHARED_BYTES and kernel["stack"] <= STACK_BYTES.get(kernel["name"], 0), kernel
        assert kernel["exact"] or kernel["name"] not in EXACT, kernel
        assert kernel["wgmma"] == (kernel["name"] in PRODUCTS and kernel["dtype"] != "float32"), kernel
    variants = {(kernel["name"], kernel["variant"]) for kernel in kernels if kernel["sizes"]}
    assert {name for name, _ in variants} == OF_A_DECODE_STEP
    assert len(variants) == len(OF_A_DECODE_STEP), "the number of requests and the tables' width make no variants"
