"""Every kernel called as layers and the sampler call it, to be compiled with no card at hand: see `compile_kernels`."""

from itertools import product
from typing import Any

import torch

from tpserve_kernels import (
    activation,
    attention,
    combination,
    draw,
    grouped,
    heads,
    logits,
    logprobs,
    masks,
    norm,
    permutation,
    router,
    routing,
    truncate,
)
from tpserve_kernels.attention_plan import PagedRequests, plan_attention
from tpserve_kernels.cpu.qkv_heads import HeadNorms, Rotation
from tpserve_kernels.sampler_types import DrawTarget, Noise, RawLogits, Sequences

SIZES = (1, 16, 17)
"""Triton makes other variants for 1 and for multiples of 16, unless it is told not to."""


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


def sample(vocab: int, rows: int = 4) -> None:
    """The sampler's kernels, of the whole vocabulary and of shards."""
    numbers, columns = torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.float64)
    noise, tokens = Noise(torch.ones(rows), numbers, numbers, numbers), torch.zeros(8, 100, dtype=torch.int32)
    target, target_of_graph = DrawTarget(numbers), DrawTarget(numbers, numbers.int(), tokens)
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


def all_kernels() -> None:
    """In the dtypes and shapes that differ in what is compiled."""
    dtype = torch.bfloat16
    x, weight = torch.zeros(4, 4096, dtype=dtype), torch.zeros(4096, dtype=dtype)
    norm.rms_norm(x, weight, 1e-5)
    norm.add_rms_norm(x, x, weight, 1e-5)
    norm.norm_add_rms_norm(x, weight, x, weight, 1e-5, 1.0)
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

    mixtures(dtype, {128, 32, 256})
    mixtures(torch.float32, {256})
    mixtures(torch.float16, {128})
    sample(128_256)


def mixtures(dtype: torch.dtype, counts: set[int]) -> None:
    """A layer with experts: Qwen3's 128, gpt-oss's 32 with biases, DeepSeek's 256 with groups, a shared expert and padding."""
    slots = torch.arange(4)
    qwen = {"renormalise": True}
    gpt_oss = {"bias": "logits", "bias_E": torch.zeros(32), "renormalise": True}
    deepseek = {
        "scores": "sigmoid", "bias": "choice", "bias_E": torch.zeros(256), "num_groups": 8, "num_top_groups": 4,
        "group_best": 2, "renormalise": True, "scale": 2.5,
    }  # fmt: skip
    for experts, active, hidden, kind, shared in (
        (128, 8, 2048, qwen, 0),
        (32, 4, 2880, gpt_oss, 0),
        (256, 8, 7168, deepseek, 1),
    ):
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
        shared_x, gate = (x, gate) if shared else (None, None)
        combination.combine(torch.zeros(4 * active, hidden, dtype=dtype), rows, weights, shared_x, gate, padding)


def sizes() -> None:
    """The launches of a decode step that differ in the number of requests and the width of the tables alone."""
    for num_requests, width in product(SIZES, SIZES):
        decode(num_requests, width)
