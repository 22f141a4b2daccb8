"""Compile every kernel for Hopper with no card at hand, by calling the ops with a driver that only names the target.

Run as a process of its own (without TRITON_INTERPRET): the interpreter accepts programs that the compiler refuses. Prints one
JSON line a compiled kernel: name, dtype, bytes of shared memory, and whether it uses the warp-group matrix unit.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tpserve_kernels import activation, attention, combination, grouped, kv, norm, permutation, rope, router, routing


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
        wgmma = "wgmma" in kernel.asm["ptx"]
        print(json.dumps({"name": self.__name__, "dtype": dtype, "shared": kernel.metadata.shared, "wgmma": wgmma}), flush=True)

    return call


def attend(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, longest: int, latent: int | None = None, **options: Any
) -> None:
    """Attention of two requests, the longer one of `longest` rows. `latent`: values are so many channels of the keys."""
    q, k = torch.zeros(4, num_heads, head_dim, dtype=dtype), torch.zeros(128, 16, num_kv_heads, head_dim, dtype=dtype)
    v = torch.zeros_like(k) if latent is None else k[..., :latent]
    tables = torch.zeros(2, 64, dtype=torch.int32)
    starts, contexts = torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([1, 1000], dtype=torch.int32)
    attention.paged_attention(q, k, v, tables, starts, contexts, longest, head_dim**-0.5, **options)


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
    q, k = x.view(4, 32, 128), torch.zeros(4, 8, 128, dtype=dtype)
    angles = torch.zeros(64, 32)
    rope.apply_rope(q, k, angles, angles, torch.arange(4))
    cache, latents = torch.zeros(128, 16, 8, 128, dtype=dtype), torch.zeros(128, 16, 1, 576, dtype=dtype)
    kv.write_kv(k, k, cache, cache, torch.arange(4))
    kv.write_kv(latents[:4, 0], None, latents, latents[..., :512], torch.arange(4))
    attend(32, 8, 128, torch.bfloat16, 3)  # split over segments, then merged
    attend(32, 8, 128, torch.float32, 99)
    attend(16, 8, 256, torch.bfloat16, 99)  # the largest tile
    attend(16, 8, 256, torch.bfloat16, 99, window=4096, cap=50.0)
    attend(64, 8, 64, torch.bfloat16, 3, sinks_N=torch.zeros(64))
    attend(64, 8, 64, torch.bfloat16, 99, window=128, sinks_N=torch.zeros(64))
    for longest in (3, 99):
        attend(16, 1, 576, torch.bfloat16, longest, latent=512)
    attend(128, 1, 576, torch.bfloat16, 3, latent=512)

    mixtures(dtype, {128, 32, 256})
    mixtures(torch.float32, {256})
    mixtures(torch.float16, {128})


def mixtures(dtype: torch.dtype, counts: set[int]) -> None:
    """A layer with experts: Qwen3's 128, gpt-oss's 32 with biases, DeepSeek's 256 with groups, a shared expert and padding."""
    slots = torch.arange(4)
    qwen = {"renormalise": True}
    gpt_oss = {"bias": "logits", "bias_E": torch.zeros(32), "renormalise": True}
    deepseek = {
        "scores": "sigmoid", "bias": "choice", "bias_E": torch.zeros(256), "num_groups": 8, "num_top_groups": 4,
        "group_best": 2, "renormalise": True, "scale": 2.5,
    }  # fmt: skip
    layers = ((128, 8, 2048, qwen, 0), (32, 4, 2880, gpt_oss, 0), (256, 8, 7168, deepseek, 1))
    for experts, active, hidden, kind, shared in layers:
        if experts not in counts:
            continue
        x = torch.zeros(4, hidden, dtype=dtype)
        terms = router.router_logits(x, torch.zeros(experts + shared, hidden))
        padding = slots if shared else None
        weights, ids, gate = routing.route(terms, experts, active, **kind, slots_T=padding)  # type: ignore[arg-type]
        tokens, rows, ends = permutation.permute(ids, range(experts // 2), torch.zeros(experts, dtype=torch.int64))
        up = torch.zeros(experts // 2, 96, 64, dtype=dtype)
        bias = None if shared else up[..., 0].contiguous()
        gate_up = grouped.grouped_matmul(x[:, :64], up, ends, bias, tokens)
        activation.silu_mul(gate_up, ends[-1:])
        grouped.grouped_matmul(gate_up[:, :64], up, ends, bias)
        out = torch.zeros(4 * active, hidden, dtype=dtype)
        combination.combine(out, rows, weights, x if shared else None, gate if shared else None, padding)


if __name__ == "__main__":
    main()
