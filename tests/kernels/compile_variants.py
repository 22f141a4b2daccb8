"""Compile kernels for cards with none at hand: python -m tests.kernels.compile_variants 80 90 100 < VARIANTS

Reads `tests.card.variants.Variant`s as JSON lines. Prints a JSON line for each variant and target: kernel, target, registers of a
thread, bytes of its stack and of local memory (spills), and bytes of shared memory. Run as a process of its own, without
TRITON_INTERPRET: the interpreter accepts programs that the compiler refuses.
"""

import ast
import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


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


def compile_for(target: int, variant: dict[str, Any]) -> dict[str, Any]:
    """The use of registers and memory of one variant."""
    kernel = getattr(importlib.import_module(variant["module"]), variant["kernel"])
    arguments = {name: argument(name, known) for name, known in variant["arguments"]}
    compiled = kernel.run(**arguments, **dict(variant["options"]), grid=(1,), warmup=True)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = USAGE.search(dump)
    assert used is not None, dump
    registers, stack, local = map(int, used.groups())
    return {
        "kernel": variant["kernel"],
        "target": target,
        "registers": registers,
        "spilled": stack + local,
        "shared": compiled.metadata.shared,
        "tensor_cores": any(word in compiled.asm["ptx"] for word in ("mma.sync", "wgmma", "tcgen05")),
    }


def main() -> None:
    variants = [json.loads(line) for line in sys.stdin]
    for target in map(int, sys.argv[1:]):
        driver.set_active(CompileTarget(target))
        for variant in variants:
            print(json.dumps(compile_for(target, variant)), flush=True)


if __name__ == "__main__":
    main()
