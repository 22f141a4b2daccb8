"""Kernels on a card at the sizes of real models: parity with the references, and bits that depend on the row alone."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tests.kernels.device import DEVICE
from tests.kernels.paged_case import PagedCase
from tpserve_kernels import activation, attention, kv, norm, rope

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")]

BRAIN, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
RELATIVE_ERROR = {BRAIN: 6e-3, HALF: 1e-3, SINGLE: 5e-6}
CHUNKS = (1, 2, 3, 4, 5, 16, 17, 256, 257, 600)
SCALE = 0.09

MIXED = ((1, 3000), (700, 700), (1, 1), (129, 2049), (0, 5), (3, 515), (64, 64), (1, 512))
CASES = {
    "8B, bfloat16": PagedCase(MIXED, num_heads=32, num_kv_heads=8, head_dim=128, dtype=BRAIN),
    "8B, float16, large pages": PagedCase(MIXED, num_heads=32, num_kv_heads=8, head_dim=128, page=64, dtype=HALF),
    "8B, float32": PagedCase(MIXED, num_heads=8, num_kv_heads=2, head_dim=128, dtype=SINGLE),
    "one key head a rank": PagedCase(MIXED, num_heads=8, num_kv_heads=1, head_dim=128, dtype=BRAIN),
    "seven heads a key head": PagedCase(MIXED, num_heads=28, num_kv_heads=4, head_dim=128, page=32, dtype=BRAIN),
    "all heads their own": PagedCase(MIXED, num_heads=8, num_kv_heads=8, head_dim=64, dtype=HALF),
    "head of 80": PagedCase(MIXED, num_heads=8, num_kv_heads=4, head_dim=80, dtype=BRAIN),
    "head of 256": PagedCase(MIXED, num_heads=8, num_kv_heads=4, head_dim=256, dtype=BRAIN),
    "head of 256, float32": PagedCase(MIXED, num_heads=4, num_kv_heads=2, head_dim=256, dtype=SINGLE),
    "decode, split": PagedCase(((1, 5000), (1, 1), (1, 513), (1, 4096)), num_heads=32, num_kv_heads=8, head_dim=128, dtype=BRAIN),
    "drafts, split": PagedCase(((5, 5000), (3, 513), (1, 7)), num_heads=32, num_kv_heads=8, head_dim=128, dtype=BRAIN),
    "decode of many": PagedCase(tuple((1, 1 + 37 * r) for r in range(200)), 32, 8, 128, dtype=BRAIN),
    "window and cap": PagedCase(MIXED, num_heads=16, num_kv_heads=8, head_dim=256, dtype=BRAIN, window=1000, cap=5.0),
    "window and sinks": PagedCase(MIXED, num_heads=64, num_kv_heads=8, head_dim=64, dtype=BRAIN, window=128, sinks=True),
    "latents": PagedCase(MIXED, num_heads=16, num_kv_heads=1, head_dim=576, dtype=BRAIN, latent=512, page=64),
    "latents, split": PagedCase(((1, 5000), (1, 1), (2, 513)), 128, 1, 576, dtype=BRAIN, latent=512, page=64),
}


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert error <= RELATIVE_ERROR[actual.dtype], error  # NaN fails too


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attention_parity(case: PagedCase) -> None:
    arguments = case.arguments(DEVICE)
    rest, scoring = (case.max_query_len, SCALE), case.scoring(DEVICE)
    actual = attention.paged_attention(*arguments, *rest, **scoring)
    assert_close(actual, attention.paged_attention_reference(*arguments, *rest, **scoring))


@pytest.mark.parametrize("dtype", [BRAIN, HALF, SINGLE])
@pytest.mark.parametrize(
    "case",
    [
        PagedCase(((600, 1300),), 8, 2, 128),
        PagedCase(((600, 1300),), 7, 1, 64),
        PagedCase(((600, 1300),), 4, 4, 80),
        PagedCase(((600, 1300),), 2, 1, 256),
        PagedCase(((600, 1300),), 8, 2, 64, window=530, cap=3.0, sinks=True),
        PagedCase(((600, 1300),), 16, 1, 576, latent=512),
    ],
    ids=str,
)
def test_attention_bits_in_any_chunk(case: PagedCase, dtype: torch.dtype) -> None:
    """The last 600 positions of a context of 1300, in chunks of every size: whole walks and split ones."""
    q, k_cache, v_cache, tables, starts, contexts = replace(case, dtype=dtype).arguments(DEVICE)
    scoring = case.scoring(DEVICE)
    expected = attention.paged_attention(q, k_cache, v_cache, tables, starts, contexts, 600, SCALE, **scoring)
    for chunk in CHUNKS:
        edges = [*range(0, 600, chunk), 600]
        chunk_starts = torch.tensor(edges, dtype=torch.int32, device=DEVICE)
        together = (tables.repeat(len(edges) - 1, 1), chunk_starts, chunk_starts[1:] + 700)
        assert torch.equal(attention.paged_attention(q, k_cache, v_cache, *together, chunk, SCALE, **scoring), expected), chunk
        for first, last in list(pairwise(edges))[-3:]:
            alone = (tables, torch.tensor([0, last - first], device=DEVICE).int(), contexts - 600 + last)
            actual = attention.paged_attention(q[first:last], k_cache, v_cache, *alone, chunk, SCALE, **scoring)
            assert torch.equal(actual, expected[first:last]), (chunk, first)


@pytest.mark.parametrize("dtype", [BRAIN, HALF, SINGLE])
def test_attention_bits_in_any_batch_and_page(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = PagedCase(tuple((1, 1 + 29 * r) for r in range(60)), 8, 2, 128, page=64, dtype=dtype)
    q, k_cache, v_cache, tables, starts, contexts = arguments = case.arguments(DEVICE)
    expected = attention.paged_attention(*arguments, 1, SCALE)
    small_k, small_v = (cache.unflatten(1, (4, 16)).flatten(0, 1) for cache in (k_cache, v_cache))
    small_tables = (4 * tables.unsqueeze(2) + torch.arange(4, dtype=torch.int32, device=DEVICE)).flatten(1)
    assert torch.equal(attention.paged_attention(q, small_k, small_v, small_tables, starts, contexts, 1, SCALE), expected)
    one = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    for r in range(60):
        alone = (q[r : r + 1], k_cache, v_cache, tables[r : r + 1], one, contexts[r : r + 1])
        assert torch.equal(attention.paged_attention(*alone, 1, SCALE)[0], expected[r]), r
    monkeypatch.setattr(attention, "MAX_PARTIAL_BYTES", 0)
    assert torch.equal(attention.paged_attention(*arguments, 1, SCALE), expected)


def test_attention_in_a_captured_graph() -> None:
    case = PagedCase(((1, 2000), (1, 30)), 32, 8, 128, dtype=BRAIN)
    q, k_cache, v_cache, tables, starts, contexts = case.arguments(DEVICE)
    expected = attention.paged_attention(q, k_cache, v_cache, tables, starts, contexts, 1, SCALE)
    static_q = torch.zeros_like(q)
    attention.paged_attention(static_q, k_cache, v_cache, tables, starts, contexts, 1, SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.paged_attention(static_q, k_cache, v_cache, tables, starts, contexts, 1, SCALE)
    static_q.copy_(q)
    graph.replay()
    assert torch.equal(out, expected)


def test_a_cache_of_more_than_two_to_the_31_values() -> None:
    page, heads, head_dim = 64, 8, 128
    num_blocks = 2**31 // (page * heads * head_dim) + 2
    if torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GiB of free memory on the card")
    cache = torch.empty(num_blocks, page, heads, head_dim, dtype=BRAIN, device=DEVICE)
    k, v = random(40, heads, head_dim, dtype=BRAIN), random(40, heads, head_dim, dtype=BRAIN, seed=1)
    values = torch.empty_like(cache)
    last_block = num_blocks - 1
    kv.write_kv(k, v, cache, values, last_block * page + torch.arange(40, device=DEVICE))
    assert torch.equal(cache[last_block, :40], k) and torch.equal(values[last_block, :40], v)
    q = random(40, 32, head_dim, dtype=BRAIN, seed=2)
    starts, contexts = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 40], [40]))
    table = torch.tensor([[last_block]], dtype=torch.int32, device=DEVICE)
    actual = attention.paged_attention(q, cache, values, table, starts, contexts, 40, SCALE)
    first = (cache[last_block:], values[last_block:], torch.zeros_like(table))
    assert torch.equal(actual, attention.paged_attention(q, *first, starts, contexts, 40, SCALE))


@pytest.mark.parametrize("dtype", [BRAIN, HALF, SINGLE])
@pytest.mark.parametrize(("num_rows", "hidden"), [(1, 4096), (600, 4096), (7, 8192), (33, 896)])
def test_row_kernels(dtype: torch.dtype, num_rows: int, hidden: int) -> None:
    x, residual = random(num_rows, hidden, dtype=dtype), random(num_rows, hidden, dtype=dtype, seed=1)
    weight = random(hidden, dtype=dtype, seed=2)
    assert_close(norm.rms_norm(x, weight, 1e-5), norm.rms_norm_reference(x, weight, 1e-5))
    y, total = norm.add_rms_norm(x, residual, weight, 1e-5)
    expected_y, expected_total = norm.add_rms_norm_reference(x, residual, weight, 1e-5)
    assert_close(y, expected_y)
    assert torch.equal(total, expected_total)
    assert_close(norm.rms_norm(x, weight, 1e-5, 1.0), norm.rms_norm_reference(x, weight, 1e-5, 1.0))
    assert_close(activation.silu_mul(x), activation.silu_mul_reference(x))
    assert_close(activation.gelu_tanh_mul(x), activation.gelu_tanh_mul_reference(x))
    assert_close(activation.clamped_swiglu(x, 1.702, 1.0), activation.clamped_swiglu_reference(x, 1.702, 1.0))
    heads = x.view(num_rows, -1, 128)
    q, k = heads[:, :-1], heads[:, -1:]
    angle = random(1000, 64, dtype=SINGLE)
    positions = torch.randint(1000, (num_rows,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    turned = (q, k, angle.cos(), angle.sin(), positions)
    for actual, expected in zip(rope.apply_rope(*turned), rope.apply_rope_reference(*turned), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [BRAIN, HALF, SINGLE])
def test_row_kernels_have_the_bits_of_a_row_alone(dtype: torch.dtype) -> None:
    x, weight = random(600, 4096, dtype=dtype), random(4096, dtype=dtype, seed=1)
    angle, positions = random(600, 64, dtype=SINGLE), torch.arange(600, device=DEVICE)

    def outputs(rows: slice) -> list[torch.Tensor]:
        heads = x[rows].view(-1, 32, 128)
        turned = rope.apply_rope(heads, heads, angle.cos(), angle.sin(), positions[rows])
        fused = norm.add_rms_norm(x[rows], x[rows], weight, 1e-5)
        gated = [activation.silu_mul(x[rows]), activation.gelu_tanh_mul(x[rows]), activation.clamped_swiglu(x[rows], 1.7, 1.0)]
        return [norm.rms_norm(x[rows], weight, 1e-5), *fused, *gated, *turned]

    together = outputs(slice(None))
    for chunk in CHUNKS:
        rows = slice(600 - chunk, 600)
        for part, whole in zip(outputs(rows), together, strict=True):
            assert torch.equal(part, whole[rows]), chunk
