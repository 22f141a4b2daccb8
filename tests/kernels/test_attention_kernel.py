"""Paged attention: parity with the reference, one case a boundary, and bits that depend on a row's own context only."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.kernels.device import DEVICE
from tests.kernels.paged_case import NOBODY, PagedCase, attend, listed, paged_requests
from tpserve_kernels import attention, attention_plan

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
HALF, BRAIN = torch.float16, torch.bfloat16

# float32 tiles are 16 rows by 32 positions, the others 64 by 64; segments are 512 positions.
CASES = {
    "one token": PagedCase(requests=((1, 1),)),
    "decode around tile and page edges": PagedCase(requests=tuple((1, c) for c in (15, 16, 17, 31, 32, 33, 63, 64, 65))),
    "decode around tile and page edges, half": PagedCase(requests=((1, 63), (1, 64), (1, 65)), dtype=HALF, page=32),
    "decode over segments": PagedCase(requests=((1, 512), (1, 513), (1, 3)), num_heads=4, num_kv_heads=1, dtype=HALF, page=64),
    "drafts over segments": PagedCase(requests=((3, 514), (2, 20)), num_heads=2, num_kv_heads=1),
    "prompt of one tile": PagedCase(requests=((8, 8),)),
    "prompt of one tile and one row": PagedCase(requests=((9, 9),), head_dim=32, page=48),
    "mixed, with an idle request": PagedCase(requests=((1, 40), (20, 20), (0, 7), (1, 1), (9, 50)), num_heads=2, page=32),
    "mixed, half, over segments": PagedCase(requests=((70, 540), (1, 17), (64, 64)), num_heads=2, dtype=HALF),
    "seven heads a key head": PagedCase(requests=((11, 30), (1, 70)), num_heads=7, num_kv_heads=1, head_dim=80, dtype=HALF),
    "more heads a key head than tile rows": PagedCase(requests=((2, 40),), num_heads=20, num_kv_heads=1, head_dim=96),
    "largest head": PagedCase(requests=((3, 70), (1, 5)), head_dim=256, dtype=HALF, page=64),
    "bfloat16": PagedCase(requests=((33, 70), (1, 100)), head_dim=64, dtype=BRAIN),
    "window of one": PagedCase(requests=((1, 70), (5, 40)), window=1),
    "window in a tile": PagedCase(requests=((1, 70), (40, 70), (3, 3), (0, 9), (1, 5)), window=5, num_heads=2),
    "window of a tile and one, half": PagedCase(requests=((1, 64), (1, 65), (1, 66), (1, 700)), window=65, page=64, dtype=HALF),
    "window over segments": PagedCase(requests=((70, 1100), (1, 40)), window=600, num_heads=2, num_kv_heads=1, dtype=HALF),
    "window over segments, split": PagedCase(requests=((1, 1400), (2, 1024), (1, 600), (1, 3)), window=515, num_heads=2),
    "window of a segment, not split": PagedCase(requests=((1, 1030), (1, 512)), window=512),
    "cap": PagedCase(requests=((9, 50), (1, 70)), cap=0.7),
    "sinks": PagedCase(requests=((9, 50), (1, 1)), sinks=True),
    "sinks, split": PagedCase(requests=((1, 1100), (3, 30)), num_heads=6, sinks=True, dtype=HALF),
    "cap and window, head of 256": PagedCase(requests=((9, 50), (1, 70)), head_dim=256, cap=0.7, window=20, dtype=HALF),
    "sinks and window, bfloat16": PagedCase(requests=((9, 200), (1, 70)), head_dim=64, sinks=True, window=128, dtype=BRAIN),
    "latents": PagedCase(requests=((9, 50), (1, 70)), num_heads=4, num_kv_heads=1, head_dim=48, latent=32),
    "latents without a tail": PagedCase(requests=((9, 50), (1, 70)), num_heads=4, num_kv_heads=1, head_dim=32, latent=32),
    "latents, split": PagedCase(((1, 600), (2, 9)), num_heads=5, num_kv_heads=1, head_dim=96, latent=80, dtype=HALF, page=64),
    "latents of two tiles of heads": PagedCase(
        ((3, 70), (1, 9)), num_heads=96, num_kv_heads=1, head_dim=48, latent=32, dtype=HALF
    ),
    "latents as published": PagedCase(((2, 70), (1, 9)), num_heads=16, num_kv_heads=1, head_dim=576, latent=512, dtype=BRAIN),
    "latents as published, float32": PagedCase(((2, 40), (1, 9)), num_heads=18, num_kv_heads=1, head_dim=576, latent=512),
    "everything": PagedCase(((20, 90), (1, 40)), 6, 2, head_dim=48, latent=32, window=33, cap=0.7, sinks=True),
}


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel reads before it is written, or never writes, must show."""
    empty = torch.empty

    def unwritten(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return empty(*shape, dtype=dtype, device=device).fill_(float("nan") if dtype.is_floating_point else NOBODY)

    monkeypatch.setattr(torch, "empty", unwritten)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_parity(case: PagedCase) -> None:
    arguments = case.arguments(DEVICE)
    scale, scoring = case.head_dim**-0.5, case.scoring(DEVICE)
    actual = attend(*arguments, scale, **scoring)
    expected = attention.paged_attention_reference(*arguments, scale, **scoring)
    assert actual.dtype == expected.dtype == case.dtype
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[case.dtype], atol=TOLERANCE[case.dtype])


def test_reference_is_scaled_dot_product_attention() -> None:
    q, k_cache, v_cache, requests = arguments = PagedCase(requests=((20, 20),), page=32).arguments(DEVICE)
    block = requests.tables_XB[requests.table_rows_R[0], 0].long()
    k, v = (cache[block, :20].transpose(0, 1) for cache in (k_cache, v_cache))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(attention.paged_attention_reference(*arguments, 0.3), expected[0].transpose(0, 1))


def test_packed_queries_and_caches_that_keep_heads_first() -> None:
    q, k_cache, v_cache, requests = arguments = PagedCase(requests=((3, 20),)).arguments(DEVICE)
    packed = torch.cat([q.flatten(1), torch.full_like(q.flatten(1), float("nan"))], dim=1)
    heads_first = torch.stack([k_cache, v_cache], dim=1).transpose(2, 3).contiguous().transpose(2, 3)
    strided = (packed[:, : q[0].numel()].view(q.shape), heads_first[:, 0], heads_first[:, 1], requests)
    assert torch.equal(attend(*strided), attend(*arguments))


@pytest.fixture
def every_row_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's BLAS rounds a row by its place in the tile, as matrix units do not: have it multiply row by row."""
    matmul = np.matmul
    if DEVICE == "cpu":
        monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.concatenate([matmul(row[None], b, dtype=dtype) for row in a]))


def attend_in_chunks(case: PagedCase, cuts: list[int], together: bool) -> torch.Tensor:
    """The rows of the case's only request, cut into chunks at `cuts`, the chunks in one step or in steps of their own."""
    q, k_cache, v_cache, requests = case.arguments(DEVICE)
    num_rows, context = case.requests[0]
    edges = [0, *cuts, num_rows]
    steps = [edges] if together else [list(pair) for pair in pairwise(edges)]
    outputs = []
    for step in steps:
        lens = [b - a for a, b in pairwise(step)]
        contexts = [end + context - num_rows for end in step[1:]]
        chunks = paged_requests(requests.tables_XB, requests.table_rows_R.repeat(len(lens)), lens, contexts, case.window)
        outputs.append(attend(q[step[0] : step[-1]], k_cache, v_cache, chunks, **case.scoring(DEVICE)))
    return torch.cat(outputs)


@pytest.mark.usefixtures("every_row_alike")
@pytest.mark.parametrize(("dtype", "group"), [(torch.float32, 2), (HALF, 4)])
def test_bits_do_not_depend_on_chunking_or_batch(dtype: torch.dtype, group: int) -> None:
    """Rows at positions 500 to 518, over the edge of two segments at 512."""
    case = PagedCase(requests=((19, 519),), num_heads=group, num_kv_heads=1, dtype=dtype)
    one_chunk = attend_in_chunks(case, [], together=True)
    for cuts, together in (([18], True), ([1, 2, 11, 13], False), ([4, 8, 12, 16], True)):
        assert torch.equal(attend_in_chunks(case, cuts, together), one_chunk), (cuts, together)


WINDOWED = {
    "over segments": PagedCase(((13, 1035),), 4, 1, window=518, cap=2.0, sinks=True, dtype=HALF),
    "over tiles": PagedCase(((13, 520),), 4, 1, window=8, dtype=HALF),
    "latents": PagedCase(((13, 520),), 4, 1, head_dim=48, latent=32, dtype=HALF),
}


@pytest.mark.usefixtures("every_row_alike")
@pytest.mark.parametrize("case", WINDOWED.values(), ids=WINDOWED.keys())
def test_bits_of_windows_and_latents_do_not_depend_on_chunking_or_batch(case: PagedCase) -> None:
    """What the first rows see begins before position 512, an edge of tiles and segments, what the last ones see after it."""
    one_chunk = attend_in_chunks(case, [], together=True)
    for cuts, together in (([12], True), ([1, 2, 7, 9], False), (list(range(1, 13)), True)):
        assert torch.equal(attend_in_chunks(case, cuts, together), one_chunk), (cuts, together)


LONG_AND_SHORT = ((1, 1300), *((1, 1 + 9 * r) for r in range(5)), (1, 0), (1, 600))
SPLITS = {
    "one long among short ones": PagedCase(LONG_AND_SHORT, 3, 1, dtype=HALF),
    "drafts and prompts": PagedCase(((1, 1100), (2, 513), (0, 5), (22, 30)), 3, 1, dtype=HALF),
    "window, cap and sinks": PagedCase(((1, 1100), (22, 1030), (1, 0)), 3, 1, dtype=HALF, window=515, cap=2.0, sinks=True),
    "latents": PagedCase(((1, 1100), (2, 20)), 5, 1, head_dim=48, latent=32, dtype=HALF),
}


@pytest.mark.parametrize("case", SPLITS.values(), ids=SPLITS.keys())
def test_bits_do_not_depend_on_the_split_or_the_grid(case: PagedCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for states, room for some, other grids: other items, one result. A row keeps its place in its tile."""
    arguments, scoring = case.arguments(DEVICE), case.scoring(DEVICE)
    expected, splits = attend(*arguments, **scoring), set()
    for processors, state_bytes in ((30, 64 << 20), (30, 0), (30, 4000)):
        monkeypatch.setattr(attention_plan, "num_processors", lambda _, n=processors: n)
        monkeypatch.setattr(attention_plan, "MAX_STATE_BYTES", state_bytes)
        plan = attention_plan.plan_attention(arguments[3], case.num_heads, arguments[2])
        assert listed(plan) == attention_plan.plan_reference(plan)
        splits.add(int(plan.counts_2[1]))
        assert torch.equal(attention.paged_attention(*arguments[:3], plan, 0.25, **scoring), expected), (processors, state_bytes)
    assert len(splits) > 1 and 0 in splits


@pytest.mark.parametrize("window", [None, 1000])
def test_the_plan_is_that_of_plain_python(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over more requests than the kernel sums at a time; only those much longer than the others are split."""
    generator = random.Random(0)
    lens = [generator.choice((1, 1, 1, 0, 3, 70)) for _ in range(300)]
    contexts = [length + generator.choice((0, 40, 600)) if length else 0 for length in lens]
    contexts[7], contexts[290], lens[7], lens[290] = 130_000, 90_000, 1, 40
    cache, tables = torch.zeros(1, 16, 2, 16, dtype=HALF, device=DEVICE), torch.zeros(1, 9000, dtype=torch.int32, device=DEVICE)
    requests = paged_requests(tables, torch.zeros(300, dtype=torch.int32, device=DEVICE), lens, contexts, window)
    for processors, heads in ((1, 128), (132, 8)):
        monkeypatch.setattr(attention_plan, "num_processors", lambda _, n=processors: n)
        plan = attention_plan.plan_attention(requests, heads, cache)
        items, split = listed(plan)
        assert (items, split) == attention_plan.plan_reference(plan)
        assert len(items) <= len(plan.items_I4) and len(split) <= len(plan.split_C4)
        assert {request for request, _, _ in items} == {r for r, length in enumerate(lens) if length}
    assert window or {request for request, _, _ in split} == {7, 290}


def test_rows_that_pad_a_graph_are_zeros_and_read_nothing() -> None:
    """Their row of the tables names blocks that there are not."""
    q, k_cache, v_cache, requests = PagedCase(((1, 33), (1, 0), (1, 0)), sinks=True).arguments(DEVICE)
    requests.tables_XB[requests.table_rows_R[1:].long()] = NOBODY
    for sinks in (None, torch.ones(4, device=DEVICE)):
        out = attend(q, k_cache, v_cache, requests, sinks_N=sinks)
        assert (out[1:] == 0).all() and (out[0] != 0).all()


def test_bits_do_not_depend_on_the_page_size() -> None:
    q, k_cache, v_cache, requests = arguments = PagedCase(requests=((9, 64), (1, 128)), page=64).arguments(DEVICE)
    small_k, small_v = (cache.unflatten(1, (4, 16)).flatten(0, 1) for cache in (k_cache, v_cache))  # block b is 4 b ... 4 b + 3
    small_tables = (4 * requests.tables_XB.unsqueeze(2) + torch.arange(4, dtype=torch.int32, device=DEVICE)).flatten(1)
    assert torch.equal(attend(q, small_k, small_v, requests._replace(tables_XB=small_tables)), attend(*arguments))


def test_shapes_outside_the_contract_are_refused() -> None:
    q, k_cache, v_cache, requests = PagedCase(requests=((2, 3),), head_dim=32).arguments(DEVICE)
    refused = [
        (q[..., :24], k_cache[..., :24], v_cache[..., :24], requests),
        (q, k_cache[:, :8], v_cache[:, :8], requests),
        (q[:, :3], k_cache, v_cache, requests),
        (q.half(), k_cache, v_cache, requests),
        (q, k_cache, v_cache, requests._replace(tables_XB=requests.tables_XB.long())),
        (q, k_cache, v_cache, requests._replace(query_starts_R1=requests.query_starts_R1[:1])),
        (q, k_cache, v_cache, requests._replace(table_rows_R=requests.query_starts_R1)),
        (q, k_cache, v_cache[..., :16], requests),
        (q[..., :16], k_cache[..., :16], v_cache, requests),
    ]
    for arguments in refused:
        with pytest.raises(AssertionError):
            attend(*arguments)
    plan = attention_plan.plan_attention(requests, 8, v_cache)
    with pytest.raises(AssertionError):
        attention.paged_attention(q, k_cache, v_cache, plan, 0.25)
    for sinks in (torch.zeros(3, device=DEVICE), torch.zeros(4, dtype=HALF, device=DEVICE)):
        with pytest.raises(AssertionError):
            attend(q, k_cache, v_cache, requests, sinks_N=sinks)
