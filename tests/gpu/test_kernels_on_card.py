"""Kernels on a card at the sizes of real models: parity with the references, and bits that depend on the row alone."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tests.kernels.device import DEVICE
from tests.kernels.paged_case import PagedCase, attend, listed, paged_requests
from tpserve_kernels import activation, attention, attention_plan, heads, norm
from tpserve_kernels.cpu.qkv_heads import HeadNorms, Rotation

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
    arguments, scoring = case.arguments(DEVICE), case.scoring(DEVICE)
    actual = attend(*arguments, SCALE, **scoring)
    assert_close(actual, attention.paged_attention_reference(*arguments, SCALE, **scoring))


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
    q, k_cache, v_cache, requests = replace(case, dtype=dtype).arguments(DEVICE)
    scoring, (tables, row) = case.scoring(DEVICE), requests[:2]
    expected = attend(q, k_cache, v_cache, requests, SCALE, **scoring)
    for chunk in CHUNKS:
        edges = [*range(0, 600, chunk), 600]
        lens = [last - first for first, last in pairwise(edges)]
        together = paged_requests(tables, row.repeat(len(lens)), lens, [700 + last for last in edges[1:]], case.window)
        assert torch.equal(attend(q, k_cache, v_cache, together, SCALE, **scoring), expected), chunk
        for first, last in list(pairwise(edges))[-3:]:
            alone = paged_requests(tables, row, [last - first], [700 + last], case.window)
            actual = attend(q[first:last], k_cache, v_cache, alone, SCALE, **scoring)
            assert torch.equal(actual, expected[first:last]), (chunk, first)


@pytest.mark.parametrize("dtype", [BRAIN, HALF, SINGLE])
def test_attention_bits_in_any_batch_and_page(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = PagedCase((*((1, 1 + 29 * r) for r in range(60)), (1, 9000)), 8, 2, 128, page=64, dtype=dtype)
    q, k_cache, v_cache, requests = arguments = case.arguments(DEVICE)
    expected = attend(*arguments, SCALE)
    small_k, small_v = (cache.unflatten(1, (4, 16)).flatten(0, 1) for cache in (k_cache, v_cache))
    small_tables = (4 * requests.tables_XB.unsqueeze(2) + torch.arange(4, dtype=torch.int32, device=DEVICE)).flatten(1)
    assert torch.equal(attend(q, small_k, small_v, requests._replace(tables_XB=small_tables), SCALE), expected)
    for r, (_, context) in enumerate(case.requests):
        alone = paged_requests(requests.tables_XB, requests.table_rows_R[r : r + 1], [1], [context])
        assert torch.equal(attend(q[r : r + 1], k_cache, v_cache, alone, SCALE)[0], expected[r]), r
    for processors, state_bytes in ((1, 0), (1000, 0), (1000, 64 << 20)):
        monkeypatch.setattr(attention_plan, "num_processors", lambda _, n=processors: n)
        monkeypatch.setattr(attention_plan, "MAX_STATE_BYTES", state_bytes)
        plan = attention_plan.plan_attention(requests, 8, v_cache)
        assert listed(plan) == attention_plan.plan_reference(plan)
        assert torch.equal(attention.paged_attention(q, k_cache, v_cache, plan, SCALE), expected), processors


def test_attention_in_a_captured_graph() -> None:
    """Its plan, too: the lengths change between replays, and one request becomes padding."""
    case = PagedCase(((1, 2000), (1, 30), (1, 700)), 32, 8, 128, dtype=BRAIN)
    q, k_cache, v_cache, requests = case.arguments(DEVICE)
    contexts = requests.context_lens_R.clone()
    static_q, static = torch.zeros_like(q), requests._replace(context_lens_R=torch.zeros_like(contexts))
    attend(static_q, k_cache, v_cache, static, SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(static_q, k_cache, v_cache, static, SCALE)
    static_q.copy_(q)
    for lens in (contexts, contexts // 2, contexts * torch.tensor([1, 0, 1], dtype=torch.int32, device=DEVICE)):
        static.context_lens_R.copy_(lens)
        graph.replay()
        assert torch.equal(out, attend(q, k_cache, v_cache, requests._replace(context_lens_R=lens), SCALE))
    assert (out[1] == 0).all()


def test_a_cache_of_more_than_two_to_the_31_values() -> None:
    page, num_kv, head_dim = 64, 8, 128
    num_blocks = 2**31 // (page * num_kv * head_dim) + 2
    if torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GiB of free memory on the card")
    cache = torch.empty(num_blocks, page, num_kv, head_dim, dtype=BRAIN, device=DEVICE)
    values, last_block = torch.empty_like(cache), num_blocks - 1
    k, v = random(40, num_kv, head_dim, dtype=BRAIN), random(40, num_kv, head_dim, dtype=BRAIN, seed=1)
    q = random(40, 32, head_dim, dtype=BRAIN, seed=2)
    slots = last_block * page + torch.arange(40, device=DEVICE)
    assert torch.equal(heads.place_heads(q, k, v, cache.flatten(0, 1), values.flatten(0, 1), slots), q)
    assert torch.equal(cache[last_block, :40], k) and torch.equal(values[last_block, :40], v)
    row, table = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0], [[last_block]]))
    actual = attend(q, cache, values, paged_requests(table, row, [40], [40]), SCALE)
    first = cache[last_block:], values[last_block:], paged_requests(torch.zeros_like(table), row, [40], [40])
    assert torch.equal(actual, attend(q, *first, SCALE))


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
    assert_close(norm.layer_norm(x, weight, weight, 1e-5), norm.layer_norm_reference(x, weight, weight, 1e-5))
    y, total = norm.add_layer_norm(x, residual, weight, None, 1e-5)
    expected_y, expected_total = norm.add_layer_norm_reference(x, residual, weight, None, 1e-5)
    assert_close(y, expected_y)
    assert torch.equal(total, expected_total)


def qkv_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value heads of 128 channels: all but two, one, one."""
    q, k, v = x.view(len(x), -1, 128).tensor_split((-2, -1), dim=1)
    return q, k, v


def turning(rows: slice | int, interleaved: bool = False) -> Rotation:
    angle, positions = random(1000, 64, dtype=SINGLE), torch.randint(1000, (600,), generator=torch.Generator().manual_seed(3))
    return Rotation(positions.to(DEVICE)[rows if isinstance(rows, slice) else slice(rows)], angle.cos(), angle.sin(), interleaved)


@pytest.mark.parametrize("dtype", [BRAIN, HALF, SINGLE])
@pytest.mark.parametrize(("num_rows", "hidden", "interleaved"), [(1, 4096, False), (600, 4096, True), (33, 896, False)])
def test_heads_are_placed(dtype: torch.dtype, num_rows: int, hidden: int, interleaved: bool) -> None:
    qkv, weight = qkv_of(random(num_rows, hidden, dtype=dtype)), random(hidden, dtype=dtype, seed=2)
    norms, slots = HeadNorms(weight[:128], weight[128:256], 1e-5), torch.randperm(640, device=DEVICE)[:num_rows]
    results = []
    for place in (heads.place_heads, heads.place_heads_reference):
        k_cache, v_cache = (torch.zeros(640, 1, 128, dtype=dtype, device=DEVICE) for _ in range(2))
        q = place(*qkv, k_cache, v_cache, slots, norms, turning(num_rows, interleaved), weight)
        results.append((q, k_cache, v_cache))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [BRAIN, HALF, SINGLE])
def test_row_kernels_have_the_bits_of_a_row_alone(dtype: torch.dtype) -> None:
    x, weight = random(600, 4096, dtype=dtype), random(4096, dtype=dtype, seed=1)
    norms = HeadNorms(weight[:128], weight[128:256], 1e-5)

    def outputs(rows: slice) -> list[torch.Tensor]:
        k_cache, v_cache = (torch.zeros(600, 1, 128, dtype=dtype, device=DEVICE) for _ in range(2))
        slots = torch.arange(600, device=DEVICE)
        q = heads.place_heads(*qkv_of(x[rows]), k_cache, v_cache, slots[rows], norms, turning(rows), weight)
        placed = [q, k_cache[rows], v_cache[rows]]
        fused = norm.add_rms_norm(x[rows], x[rows], weight, 1e-5)
        gated = [activation.silu_mul(x[rows]), activation.gelu_tanh_mul(x[rows]), activation.clamped_swiglu(x[rows], 1.7, 1.0)]
        return [norm.rms_norm(x[rows], weight, 1e-5), norm.layer_norm(x[rows], weight, None, 1e-5), *fused, *gated, *placed]

    together = outputs(slice(None))
    for chunk in CHUNKS:
        rows = slice(600 - chunk, 600)
        for part, whole in zip(outputs(rows), together, strict=True):
            assert torch.equal(part, whole[rows]), chunk
