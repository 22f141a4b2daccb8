"""Compile every kernel for Hopper with no card at hand, by calling the ops with a driver that only names the target.

Run as a process of its own (without TRITON_INTERPRET): the interpreter accepts programs that the compiler refuses. Prints one
JSON line a launch: name, dtype, the compiled variant, bytes of shared memory, registers and bytes of stack (spills) of a thread,
whether it uses the warp-group matrix unit, and whether it is one of the launches that differ in the sizes of the step alone.
"""

import functools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tpserve_kernels import activation, attention, grouped, heads, norm
from tpserve_kernels.attention_plan import PagedRequests, plan_attention
from tpserve_kernels.cpu.qkv_heads import HeadNorms, Rotation

SIZES = (1, 16, 17)
"""Triton makes other variants for 1 and for multiples of 16, unless it is told not to."""
only_sizes_differ = False


class Hopper:
    """What compiling asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def compile_instead_of_launch(self: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    def call(*args: Any, **options: Any) -> None:
        kernel = self.run(*args, grid=grid, warmup=True, **options)
        dtype = str(args[0].dtype).removeprefix("torch.")
        registers, stack = resources(kernel.asm["cubin"])
        line = {
            "name": self.__name__, "dtype": dtype, "variant": kernel.hash, "shared": kernel.metadata.shared,
            "registers": registers, "stack": stack, "wgmma": "wgmma" in kernel.asm["ptx"], "sizes": only_sizes_differ,
        }  # fmt: skip
        print(json.dumps(line), flush=True)

    return call


@functools.cache
def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2])


def attend(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, longest: int, latent: int | None = None, **options: Any
) -> None:
    """Attention of two requests, the longer one of `longest` rows. `latent`: values are so many channels of the keys."""
    window = options.pop("window", None)
    q, k = torch.zeros(4, num_heads, head_dim, dtype=dtype), torch.zeros(128, 16, num_kv_heads, head_dim, dtype=dtype)
    v = torch.zeros_like(k) if latent is None else k[..., :latent]
    tables = torch.zeros(2, 64, dtype=torch.int32)
    starts, contexts = torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([1, 1000], dtype=torch.int32)
    requests = PagedRequests(tables, starts[:2], starts, contexts, 4, longest, window)
    attention.paged_attention(q, k, v, plan_attention(requests, num_heads, v), head_dim**-0.5, **options)


def decode(num_requests: int, width: int) -> None:
    """What stands between the products of a layer in a decode step. Integers are in packed buffers, at any offset."""
    dtype, (num_heads, num_kv, dim) = torch.bfloat16, (32, 8, 128)
    integers = torch.zeros(1 + 3 * num_requests + num_requests * width, dtype=torch.int32)
    rows, starts, contexts, tables = integers.split((num_requests, num_requests + 1, num_requests, num_requests * width))
    longs = torch.zeros(1 + 2 * num_requests, dtype=torch.int64)[1:]
    qkv = torch.zeros(num_requests, num_heads + 2 * num_kv, dim, dtype=dtype)
    q, k, v = qkv.tensor_split((num_heads, num_heads + num_kv), dim=1)
    k_cache, v_cache = (torch.zeros(128, 64, num_kv, dim, dtype=dtype) for _ in range(2))
    slots_of = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    angles = torch.zeros(64, 64)
    slots, positions = longs.split(num_requests)
    q = heads.place_heads(q, k, v, *slots_of, slots, rotation=Rotation(positions, angles, angles))
    requests = PagedRequests(tables.view(num_requests, width), rows, starts, contexts, num_requests, 1)
    attention.paged_attention(q, k_cache, v_cache, plan_attention(requests, num_heads, v_cache), 0.1)


def place(
    num_heads: int, num_kv: int, dim: int, dtype: torch.dtype, angles: int, *, bias: bool = False, norm: bool = False
) -> None:
    qkv = torch.zeros(4, num_heads + 2 * num_kv, dim, dtype=dtype)
    cache = torch.zeros(64, num_kv, dim, dtype=dtype)
    rotation = Rotation(torch.arange(4), torch.zeros(64, angles), torch.zeros(64, angles)) if angles else None
    norms = HeadNorms(qkv[0, 0], qkv[0, 1], 1e-5) if norm else None
    q, k, v = qkv.tensor_split((num_heads, num_heads + num_kv), dim=1)
    heads.place_heads(q, k, v, cache, cache, torch.arange(4), norms, rotation, qkv[0].flatten() if bias else None)


def place_latents(num_heads: int, dtype: torch.dtype) -> None:
    """As DeepSeek V3 has them."""
    down, q = torch.zeros(4, 1536 + 576, dtype=dtype), torch.zeros(4, num_heads, 192, dtype=dtype)
    out, cache = torch.zeros(4, num_heads, 576, dtype=dtype), torch.zeros(64, 576, dtype=dtype)
    rotation = Rotation(torch.arange(4), torch.zeros(64, 32), torch.zeros(64, 32), interleaved=True)
    places = down[:, 1536:2048], down[:, 2048:], q[..., 128:], out[..., 512:], cache
    heads.place_latents(*places, torch.arange(4), down[0, :512], 1e-6, 0.0, rotation)


def main() -> None:
    driver.set_active(Hopper())
    JITFunction.__getitem__ = compile_instead_of_launch
    dtype = torch.bfloat16
    x, weight = torch.zeros(4, 4096, dtype=dtype), torch.zeros(4096, dtype=dtype)
    norm.rms_norm(x, weight, 1e-5)
    norm.add_rms_norm(x, x, weight, 1e-5)
    activation.silu_mul(x)
    activation.gelu_tanh_mul(x)
    activation.clamped_swiglu(x, 1.702, 7.0)
    norm.layer_norm(x, weight, weight, 1e-5)
    norm.add_layer_norm(x, x, weight, None, 1e-5)
    place(32, 8, 128, dtype, 64)
    place(28, 4, 128, dtype, 64, bias=True)
    place(16, 8, 128, dtype, 64, norm=True)
    place(25, 25, 64, dtype, 0, bias=True)
    place(32, 8, 128, torch.float32, 16, bias=True, norm=True)
    place_latents(16, dtype)
    attend(32, 8, 128, torch.bfloat16, 3)  # split over segments, then merged
    attend(32, 8, 128, torch.float32, 99)
    attend(16, 8, 256, torch.bfloat16, 99)  # the largest tile
    attend(16, 8, 256, torch.bfloat16, 99, window=4096, cap=50.0)
    attend(64, 8, 64, torch.bfloat16, 3, sinks_N=torch.zeros(64))
    attend(64, 8, 64, torch.bfloat16, 99, window=128, sinks_N=torch.zeros(64))
    for longest in (3, 99):
        attend(16, 1, 576, torch.bfloat16, longest, latent=512)
    attend(128, 1, 576, torch.bfloat16, 3, latent=512)

    weight = torch.zeros(60, 512, 96, dtype=dtype)
    grouped.grouped_matmul(
        torch.zeros(8, 96, dtype=dtype), weight, torch.zeros(60, dtype=torch.int32), weight[..., 0].contiguous()
    )
    grouped.grouped_matmul(torch.zeros(8, 96), weight.float(), torch.zeros(60, dtype=torch.int32))

    global only_sizes_differ
    only_sizes_differ = True
    for num_requests, width in product(SIZES, SIZES):
        decode(num_requests, width)


if __name__ == "__main__":
    main()
