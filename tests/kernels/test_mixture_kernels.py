"""Router, routing, permutation and combination of a mixture: each kernel against its reference, and what each one promises."""

from typing import Any

import pytest
import torch

from tests.kernels.device import DEVICE
from tpserve_kernels import combination, permutation, router, routing

FLOATS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DEALS: list[tuple[int, int, int, range]] = [
    (1, 4, 1, range(4)),
    (7, 6, 4, range(2, 5)),  # experts without a token, before and after a rank's own
    (100, 24, 8, range(24)),
    (33, 256, 8, range(248, 256)),
    (40, 5, 2, range(5)),
    (0, 4, 2, range(4)),
]
"""(tokens, experts, experts per token, the rank's own)"""
KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "qwen": {"renormalise": True},
    "gpt-oss": {"bias": "logits", "renormalise": True},
    "sigmoid": {"scores": "sigmoid", "bias": "choice", "renormalise": True, "scale": 2.5},
    "groups": {"num_groups": 4, "num_top_groups": 2, "scale": 1.7},
    "groups of two": {
        "scores": "sigmoid", "bias": "choice", "num_groups": 4, "num_top_groups": 2, "group_best": 2, "renormalise": True,
    },
}  # fmt: skip


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def distinct(tokens: int, experts: int, active: int) -> torch.Tensor:
    """Some experts for each token, int32."""
    return random(tokens, experts).argsort(1)[:, :active].int().contiguous()


def slots_of(rows: int) -> torch.Tensor:
    """All rows count but the last."""
    return torch.arange(rows - 1, -1, -1, device=DEVICE) * 16 - 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("tokens", "hidden", "outputs"), [(1, 64, 4), (35, 1100, 17), (3, 512, 33)])
def test_router(tokens: int, hidden: int, outputs: int, dtype: torch.dtype) -> None:
    x, weight = random(tokens, 2 * hidden, dtype=dtype)[:, :hidden], random(outputs, hidden, seed=1) / hidden**0.5
    terms = router.router_logits(x, weight)
    assert terms.dtype == torch.float32
    torch.testing.assert_close(terms, router.router_logits_reference(x, weight), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(terms.double().sum(0), x.double() @ weight.double().T, rtol=1e-5, atol=2e-6)


@pytest.mark.usefixtures("every_row_alike")
def test_a_row_of_the_router_is_its_own() -> None:
    x, weight = random(40, 700, dtype=torch.bfloat16), random(9, 700, seed=1)
    together = router.router_logits(x, weight)
    for row in (0, 1, 31, 32, 39):
        assert torch.equal(router.router_logits(x[row : row + 1], weight)[:, 0], together[:, row])


@pytest.mark.parametrize(("tokens", "terms", "experts", "active", "gate"), [(4, 3, 24, 5, 1), (3, 1, 4, 1, 0), (2, 2, 256, 8, 1)])
@pytest.mark.parametrize("name", KINDS)
def test_routing(name: str, tokens: int, terms: int, experts: int, active: int, gate: int) -> None:
    if name == "groups of two" and experts == 4:
        experts = 8
    logits, kind = random(terms, tokens, experts + gate), dict(KINDS[name])
    if "bias" in kind:
        kind["bias_E"] = random(experts, seed=1) * 0.3
    weights, ids, gates = routing.route(logits, experts, active, **kind)
    expected_weights, expected_ids, expected_gates = routing.route_reference(logits, experts, active, **kind)
    assert ids.dtype == torch.int32 and torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-7)
    assert (gates is None) == (expected_gates is None) == (gate == 0)
    if gates is not None:
        torch.testing.assert_close(gates, expected_gates, rtol=1e-5, atol=1e-7)
    padded = routing.route(logits, experts, active, **kind, slots_T=slots_of(tokens))
    for got, whole, beyond in zip(padded, (weights, ids, gates), (0, -1, 0), strict=True):
        if got is not None and whole is not None:
            assert torch.equal(got[:-1], whole[:-1]) and bool((got[-1] == beyond).all())
    alone = routing.route(logits[:, 1:2].contiguous(), experts, active, **kind)
    assert torch.equal(alone[0][0], weights[1]) and torch.equal(alone[1][0], ids[1])


def test_ties_go_to_the_lower_id() -> None:
    coarse = random(1, 8, 16, seed=3).mul(2).round() / 2
    for kind in ({}, {"num_groups": 4, "num_top_groups": 2}, {"scores": "sigmoid", "num_groups": 8, "num_top_groups": 3}):
        _, ids, _ = routing.route(coarse, 16, 5, **kind)  # type: ignore[arg-type]
        assert torch.equal(ids, routing.route_reference(coarse, 16, 5, **kind)[1])  # type: ignore[arg-type]
    flat = torch.zeros(1, 2, 12, device=DEVICE)
    assert routing.route(flat, 12, 4)[1].tolist() == [[0, 1, 2, 3]] * 2
    sure = flat + 200  # every score of a sigmoid is 1
    assert routing.route(sure, 12, 3, scores="sigmoid", num_groups=4, num_top_groups=1)[1].tolist() == [[0, 1, 2]] * 2
    assert routing.route(-sure, 12, 2, scores="sigmoid", renormalise=True)[0].tolist() == [[0.0, 0.0]] * 2


def test_negative_merits_are_in_order() -> None:
    """A bias may push scores below zero, where the bits of floats run backwards."""
    bias = torch.tensor([-3.0, -1.0, -2.0, -1.5], device=DEVICE)
    arguments: dict[str, Any] = {"scores": "sigmoid", "bias": "choice", "bias_E": bias}
    weights, ids, _ = routing.route(torch.zeros(1, 1, 4, device=DEVICE), 4, 4, **arguments)
    assert ids.tolist() == [[1, 3, 2, 0]] and weights.tolist() == [[0.5] * 4]


def test_logits_that_are_no_numbers_choose_experts_that_exist() -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        logits = torch.full((1, 2, 6), value, device=DEVICE)
        logits[0, 1, 2:] = 0
        for scores in ("softmax", "sigmoid"):
            for row in routing.route(logits, 6, 3, scores=scores)[1].tolist():  # type: ignore[arg-type]
                assert len(set(row)) == 3 and set(row) <= set(range(6))


@pytest.mark.parametrize(("tokens", "experts", "active", "mine"), DEALS, ids=str)
def test_permutation(tokens: int, experts: int, active: int, mine: range) -> None:
    chosen = distinct(tokens, experts, active)
    if tokens > 5:
        chosen[5:] = chosen[5:] % max(1, experts // 2)  # not distinct, and many experts with none
        chosen[-3:] = -1  # padding
    load, expected_load = (torch.arange(experts, device=DEVICE) * 2**33 for _ in range(2))
    tokens_R, rows_TA, ends_L = permutation.permute(chosen, mine, load)
    expected_tokens, expected_rows, expected_ends = permutation.permute_reference(chosen, mine, expected_load)
    assert torch.equal(load, expected_load) and torch.equal(rows_TA, expected_rows) and torch.equal(ends_L, expected_ends)
    end = int(ends_L[-1])
    assert torch.equal(tokens_R[:end], expected_tokens[:end])


def test_permutation_of_more_pairs_than_a_block_has() -> None:
    chosen = random(3000, 3).mul(40).int().remainder(3).contiguous()
    loads = [torch.zeros(3, dtype=torch.int64, device=DEVICE) for _ in range(2)]
    for mine in (range(3), range(1, 2)):
        got, expected = permutation.permute(chosen, mine, loads[0]), permutation.permute_reference(chosen, mine, loads[1])
        end = int(got[2][-1])
        assert end > 1000 and torch.equal(got[0][:end], expected[0][:end])
        assert torch.equal(got[1], expected[1]) and torch.equal(got[2], expected[2]) and torch.equal(*loads)


def test_the_reference_is_a_stable_sort() -> None:
    chosen, load = distinct(50, 12, 4), torch.zeros(12, dtype=torch.int64, device=DEVICE)
    tokens_R, rows_TA, ends_L = permutation.permute_reference(chosen, range(12), load)
    order = chosen.flatten().argsort(stable=True)
    assert torch.equal(tokens_R, (order // 4).int()) and torch.equal(rows_TA.flatten()[order].cpu(), torch.arange(200).int())
    assert torch.equal(load, chosen.flatten().bincount(minlength=12)) and torch.equal(load.cumsum(0).int(), ends_L)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("tokens", "active", "hidden"), [(1, 1, 100), (4, 8, 40), (2, 3, 1030)])
def test_combination(tokens: int, active: int, hidden: int, dtype: torch.dtype) -> None:
    out, weights = random(tokens * active + 2, hidden, dtype=dtype), random(tokens, active, seed=1)
    rows = torch.arange(tokens * active, device=DEVICE).flip(0).view(tokens, active).int().contiguous()
    rows[tokens // 2 :, active // 2] = -1
    out[-2:] = torch.nan  # of no pair
    weights[rows < 0] = torch.nan
    shared, gate, tolerance = random(tokens, hidden, dtype=dtype, seed=2), random(tokens, seed=3), FLOATS[dtype]
    some: list[tuple[torch.Tensor | None, torch.Tensor | None]] = [(None, None), (shared, None), (shared, gate)]
    for beside in some:
        actual, expected = (form(out, rows, weights, *beside) for form in (combination.combine, combination.combine_reference))
        assert actual.dtype == dtype and bool(expected.isfinite().all())
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        if dtype != torch.bfloat16 or DEVICE == "cuda":  # the interpreter truncates to bfloat16 where a card rounds
            assert torch.equal(actual, expected)
        shared[-1] = torch.nan  # the last row is padding now
        padded = combination.combine(out, rows, weights, *beside, slots_of(tokens))
        assert torch.equal(padded[:-1], actual[:-1]) and not padded[-1].any()
        assert torch.equal(padded, combination.combine_reference(out, rows, weights, *beside, slots_of(tokens))) or (
            dtype == torch.bfloat16 and DEVICE == "cpu"
        )
        shared[-1] = 1.0


def test_what_does_not_fit_is_refused() -> None:
    x, weight, logits, ids = random(4, 8), random(6, 8), random(1, 4, 6), distinct(4, 6, 2)
    load = torch.zeros(6, dtype=torch.int64, device=DEVICE)
    refused = [
        lambda: router.router_logits(x, weight.half()),
        lambda: router.router_logits(x[:, :7], weight),
        lambda: routing.route(logits, 4, 2),
        lambda: routing.route(logits, 6, 7),
        lambda: routing.route(logits, 6, 2, bias="logits"),
        lambda: routing.route(logits, 6, 3, num_groups=3),
        lambda: routing.route(logits, 6, 2, slots_T=x[:, 0].contiguous()),
        lambda: permutation.permute(ids.long(), range(6), load),
        lambda: permutation.permute(ids, range(7), load),
        lambda: combination.combine(x, ids, random(4, 3)),
        lambda: combination.combine(x, ids, random(4, 2), x.half()),
        lambda: combination.combine(x, ids, random(4, 2), None, random(4)),
    ]
    for call in refused:
        with pytest.raises(AssertionError):
            call()
