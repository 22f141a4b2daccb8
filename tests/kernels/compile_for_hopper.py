"""Compile every kernel for Hopper with no card at hand, by calling the ops with a driver that only names the target.

Run as a process of its own (without TRITON_INTERPRET): the interpreter accepts programs that the compiler refuses. Prints one
JSON line a compiled kernel: name, dtype, bytes of shared memory, whether it uses the warp-group matrix unit, and whether it
consists of operations of IEEE 754 alone.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tpserve_kernels import activation, attention, draw, grouped, kv, logits, logprobs, masks, norm, rope, truncate
from tpserve_kernels.sampler_types import Noise, RawLogits, Sequences, Target


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
        ptx = kernel.asm["ptx"]
        exact = not any(word in ptx for word in (".approx", ".ftz", "fma.", ".full"))
        found = {"shared": kernel.metadata.shared, "wgmma": "wgmma" in ptx, "exact": exact}
        print(json.dumps({"name": self.__name__, "dtype": dtype, **found}), flush=True)

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


def sample(vocab: int, rows: int = 4) -> None:
    """The sampler's kernels, of the whole vocabulary and of shards."""
    numbers, columns = torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.float64)
    noise, tokens = Noise(torch.ones(rows), numbers, numbers, numbers), torch.zeros(8, 100, dtype=torch.int32)
    target, target_of_graph = Target(numbers), Target(numbers, numbers.int(), tokens)
    written, raw = torch.zeros(rows, vocab), RawLogits(torch.zeros(rows, vocab, dtype=torch.bfloat16), 0.5, 30.0)
    logits.write_logits(raw)
    draw.draw(RawLogits(written), noise, target)
    draw.draw(raw, noise, target_of_graph)
    draw.pick(draw.best(raw, noise, 128)[None], numbers, target_of_graph)
    truncate.truncate(written, noise.temperature_S, columns, numbers, columns)
    sequences = Sequences(tokens, numbers, numbers, numbers)
    masks.mask_bits(written, numbers, torch.zeros(rows, -(-vocab // 32), dtype=torch.int32))
    masks.allow(written, numbers, numbers)
    masks.ban(written, numbers, torch.zeros(rows, 2, dtype=torch.int32), numbers, numbers, sequences)
    masks.add_bias(written, numbers, numbers, torch.ones(rows))
    masks.penalize(written, numbers, torch.ones(rows), torch.ones(rows), torch.ones(rows), sequences)
    keys = logprobs.best_keys(raw, 0, -(-vocab // logprobs.PART), 20)[None]
    logprobs.from_parts(keys, logprobs.masses(raw, 0, numbers, keys)[None], 20)


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

    weight = torch.zeros(60, 512, 96, dtype=dtype)
    grouped.grouped_matmul(
        torch.zeros(8, 96, dtype=dtype), weight, torch.zeros(60, dtype=torch.int32), weight[..., 0].contiguous()
    )
    grouped.grouped_matmul(torch.zeros(8, 96), weight.float(), torch.zeros(60, dtype=torch.int32))
    sample(128_256)


if __name__ == "__main__":
    main()
