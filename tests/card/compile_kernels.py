"""Compile kernels for cards with none at hand: python -m tests.card.compile_kernels {calls|variants} 80 90 100

calls: those of `kernel_calls`, with a driver that only names the target. variants: `tests.card.variants.Variant`s, JSON lines on
standard input. Prints a JSON line for each launch or variant and target (`Compiled`). Run as a process of its own, without
TRITON_INTERPRET: the interpreter accepts programs that the compiler refuses.
"""

import ast
import functools
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.card import kernel_calls
from tests.card.compilation import Compiled

USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
MATRIX_UNITS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
APPROXIMATE = (".approx", ".ftz", "fma.", ".full")
"""In PTX: what is no operation of IEEE 754 alone."""


class CompileTarget:
    """What compiling asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return device


def tell(kernel: str, target: int, dtype: str, compiled: Any, *, sizes: bool = False) -> None:
    """Print what was compiled."""
    ptx, (registers, spilled) = compiled.asm["ptx"], resources(compiled.asm["cubin"])
    matrix_unit = next((unit for unit in MATRIX_UNITS if unit in ptx), "")
    exact = not any(word in ptx for word in APPROXIMATE)
    shared = compiled.metadata.shared
    line = Compiled(kernel, target, dtype, compiled.hash, registers, spilled, shared, matrix_unit, exact, sizes)
    print(json.dumps(line), flush=True)


@functools.cache
def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack and of local memory (spills)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = USAGE.search(usage)
    assert used is not None, usage
    registers, stack, local = map(int, used.groups())
    return registers, stack + local


def compile_calls(target: int) -> None:
    """Compile what `kernel_calls` launches."""

    def compile_instead_of_launch(kernel: Any, grid: tuple[int, ...], *, sizes: bool) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            compiled = kernel.run(*args, grid=grid, warmup=True, **options)
            tell(kernel.__name__, target, str(args[0].dtype).removeprefix("torch."), compiled, sizes=sizes)

        return call

    for calls, sizes in ((kernel_calls.all_kernels, False), (kernel_calls.sizes, True)):
        JITFunction.__getitem__ = functools.partialmethod(compile_instead_of_launch, sizes=sizes)
        calls()


def argument(name: str, known: str) -> Any:
    """A value of which the compiler knows just this."""
    if name in ("WIDEN", "INTERPRETED"):
        return False  # the interpreter's ways
    if known.startswith("= "):
        return ast.literal_eval(known[2:])
    if known.startswith("*"):
        dtype = getattr(torch, known[1:].removesuffix(" % 16"))
        return torch.empty(32, dtype=dtype)[0 if known.endswith("% 16") else 1 :]
    return {"i32": 3, "i32 % 16": 16, "i64": 2**40 + 1, "i64 % 16": 2**40, "fp32": 0.5}[known]


def compile_variant(target: int, variant: dict[str, Any]) -> None:
    """Compile one of `tests.card.variants`."""
    kernel = getattr(importlib.import_module(variant["module"]), variant["kernel"])
    arguments = {name: argument(name, known) for name, known in variant["arguments"]}
    compiled = kernel.run(**arguments, **dict(variant["options"]), grid=(1,), warmup=True)
    pointer = next(known for _, known in variant["arguments"] if known.startswith("*"))
    tell(variant["kernel"], target, pointer[1:].removesuffix(" % 16"), compiled)


def main() -> None:
    variants = [json.loads(line) for line in sys.stdin] if sys.argv[1] == "variants" else None
    for target in map(int, sys.argv[2:]):
        driver.set_active(CompileTarget(target))
        if variants is None:
            compile_calls(target)
        for variant in variants or ():
            compile_variant(target, variant)


if __name__ == "__main__":
    main()
