"""What kernels must hold when they are compiled for a card: memory, matrix units, exactness. Runs `compile_kernels`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import NamedTuple

from tests.card.variants import Variant

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""What a block of threads may have, by generation: A100, H100, B200."""
MATRIX_UNIT = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
PRODUCTS = ("attention_kernel", "_grouped_kernel")
SMALL_PRODUCTS = {"_router_kernel": {"mma.sync"}}
"""Whose tiles may have fewer rows than a warp group multiplies."""
SPILLED_BYTES = {
    80: {"attention_kernel": 1100},
    90: {"attention_kernel": 1100, "_router_kernel": 8},
    100: {"attention_kernel": 1280, "_ban_kernel": 8},
}
"""Of a thread. Attention keeps its state there while it walks a segment (latents: 1080), not in the loop over tiles."""
EXACT = {
    "_blocks_kernel", "_draw_kernel", "_pick_kernel", "_truncate_kernel", "_write_kernel", "_mask_bits_kernel", "_allow_kernel",
    "_ban_kernel", "_bias_kernel", "_penalize_kernel", "_best_keys_kernel", "_masses_kernel", "_from_parts_kernel",
}  # fmt: skip
"""Kernels of the sampler: their bits are those of their references."""


class Compiled(NamedTuple):
    """A kernel for a target (80 is sm_80): bytes that a thread spills, shared memory, the matrix unit ("": none)."""

    kernel: str
    target: int
    dtype: str
    variant: str
    registers: int
    spilled: int
    shared: int
    matrix_unit: str
    exact: bool
    """It consists of operations of IEEE 754 alone."""
    sizes: bool
    """The launch differs from others in the sizes of the step alone."""

    def __str__(self) -> str:
        spilled = f", {self.spilled} B spilled" if self.spilled else ""
        unit = f", {self.matrix_unit}" if self.matrix_unit else ""
        return f"sm_{self.target} {self.kernel} {self.dtype}: {self.registers} registers{spilled}, {self.shared} B shared{unit}"


def compiled(*targets: int, variants: Iterable[Variant] | None = None) -> list[Compiled]:
    """Compile what `kernel_calls` launches, or `variants`."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    what = "calls" if variants is None else "variants"
    command = [sys.executable, "-m", "tests.card.compile_kernels", what, *map(str, targets)]
    text = "\n".join(json.dumps(variant._asdict()) for variant in sorted(variants or ()))
    run = subprocess.run(command, input=text, capture_output=True, text=True, env=environ, timeout=1200, check=False)
    assert run.returncode == 0, run.stderr
    return [Compiled(*json.loads(line)) for line in run.stdout.splitlines()]


def hold(kernels: Iterable[Compiled]) -> None:
    """Each fits its card and keeps its values in registers, products use the matrix unit, and the sampler is exact."""
    for kernel in kernels:
        assert kernel.shared <= SHARED_BYTES[kernel.target], kernel
        assert kernel.spilled <= SPILLED_BYTES[kernel.target].get(kernel.kernel, 0), kernel
        assert kernel.exact or kernel.kernel not in EXACT, kernel
        is_product = kernel.kernel in PRODUCTS and kernel.dtype != "float32"
        units = {MATRIX_UNIT[kernel.target]} if is_product else {""}
        assert kernel.matrix_unit in units | SMALL_PRODUCTS.get(kernel.kernel, set()), kernel
