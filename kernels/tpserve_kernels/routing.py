"""MoE routing: the experts of each token and their weights, from the router's logits, in one launch.

Softmax with top-k as in Mixtral, https://arxiv.org/abs/2401.04088; sigmoid scores, a bias for the choice alone and groups as in
DeepSeek-V3, https://arxiv.org/abs/2412.19437.

Legend: T rows, E experts in G groups, A experts per token, C terms of each logit (`router.router_logits`). One program owns one
row.
"""

from typing import Literal

import torch
import triton
import triton.language as tl


def route(
    terms_CTN: torch.Tensor,
    num_experts: int,
    num_active: int,
    *,
    scores: Literal["softmax", "sigmoid"] = "softmax",
    bias: Literal["logits", "choice"] | None = None,
    bias_E: torch.Tensor | None = None,
    num_groups: int = 1,
    num_top_groups: int = 1,
    group_best: int = 1,
    renormalise: bool = False,
    scale: float = 1.0,
    slots_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Weights and ids of each token's experts, best first, and the shared expert's gate: float32 [T, A], int32 [T, A], [T].

    The logits are the sum of the terms, in order. The best A of the scores (with `bias_E` on the logits, or for the choice
    alone) are chosen, ties going to the lower id; only within the `num_top_groups` groups whose `group_best` best scores add up
    to most, ties going to the lower group. The weights are the chosen scores, divided by their sum where `renormalise` says so,
    times `scale`. Scores and weights equal the reference's up to the rounding of float32; the choice is the reference's for
    equal scores, so it may differ only where two scores differ by that rounding.

    terms_CTN: float32 [C, T, N], contiguous; N is E, or E + 1 with the gate's logit, whose sigmoid is returned (None without).
    bias_E: float32 [E], None exactly if `bias` is. slots_T: integers [T], contiguous; where they are negative the row is padding
    and has ids -1, weights 0 and gate 0; None: no padding. A is at most the number of experts in `num_top_groups` groups.
    Errors: AssertionError when shapes, dtypes or layouts differ from this.
    """
    num_terms, rows, columns = terms_CTN.shape
    assert columns - num_experts in (0, 1) and terms_CTN.dtype == torch.float32 and terms_CTN.is_contiguous()
    assert (bias is None) == (bias_E is None) and num_experts % num_groups == 0
    assert bias_E is None or (bias_E.shape == (num_experts,) and bias_E.dtype == torch.float32 and bias_E.is_contiguous())
    assert slots_T is None or (slots_T.shape == (rows,) and slots_T.is_contiguous() and not slots_T.is_floating_point())
    size = num_experts // num_groups
    assert 1 <= num_top_groups <= num_groups and 1 <= group_best <= size and 1 <= num_active <= size * num_top_groups
    weights_TA = torch.empty(rows, num_active, dtype=torch.float32, device=terms_CTN.device)
    experts_TA = torch.empty(rows, num_active, dtype=torch.int32, device=terms_CTN.device)
    gate_T = torch.empty(rows, dtype=torch.float32, device=terms_CTN.device) if columns > num_experts else None
    groups = 1 if num_top_groups == num_groups else num_groups
    _route_kernel[(rows,)](
        terms_CTN, terms_CTN if bias_E is None else bias_E, experts_TA if slots_T is None else slots_T,
        weights_TA, experts_TA, weights_TA if gate_T is None else gate_T, scale,
        TERMS=num_terms, EXPERTS=num_experts, COLUMNS=columns, ACTIVE=num_active, SLOTS=triton.next_power_of_2(num_active),
        SIGMOID=scores == "sigmoid", BIAS=bias or "none", PADDED=slots_T is not None, RENORMALISE=renormalise,
        GROUPS=groups, TOP_GROUPS=num_top_groups, GROUP_BEST=group_best,
        GROUPS_BLOCK=triton.next_power_of_2(groups), SIZE_BLOCK=triton.next_power_of_2(num_experts // groups),
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return weights_TA, experts_TA, gate_T


def route_reference(
    terms_CTN: torch.Tensor,
    num_experts: int,
    num_active: int,
    *,
    scores: Literal["softmax", "sigmoid"] = "softmax",
    bias: Literal["logits", "choice"] | None = None,
    bias_E: torch.Tensor | None = None,
    num_groups: int = 1,
    num_top_groups: int = 1,
    group_best: int = 1,
    renormalise: bool = False,
    scale: float = 1.0,
    slots_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`route` in plain torch, on any device."""
    logits_TN = terms_CTN[0]
    for term_TN in terms_CTN[1:]:
        logits_TN = logits_TN + term_TN
    logits_TE, gate_Tg = logits_TN.tensor_split((num_experts,), dim=1)
    if bias == "logits" and bias_E is not None:
        logits_TE = logits_TE + bias_E
    scores_TE = torch.softmax(logits_TE, dim=1) if scores == "softmax" else torch.sigmoid(logits_TE)
    merits_TE = scores_TE + bias_E if bias == "choice" and bias_E is not None else scores_TE
    if num_top_groups < num_groups:
        merits_TGS = merits_TE.view(len(merits_TE), num_groups, -1)
        worth_TG = merits_TGS.topk(group_best, dim=2).values.sum(2)
        left_out_TG = torch.ones_like(worth_TG, dtype=torch.bool).scatter_(1, _best(worth_TG, num_top_groups), False)
        merits_TE = merits_TGS.masked_fill(left_out_TG.unsqueeze(2), -torch.inf).flatten(1)
    experts_TA = _best(merits_TE, num_active)
    weights_TA = scores_TE.gather(1, experts_TA)
    if renormalise:
        weights_TA = weights_TA / (weights_TA.sum(1, keepdim=True) + 1e-20)
    padding_T1 = torch.zeros_like(weights_TA[:, :1], dtype=torch.bool) if slots_T is None else slots_T[:, None] < 0
    weights_TA = (weights_TA * scale).masked_fill(padding_T1, 0)
    gate_T = torch.sigmoid(gate_Tg).masked_fill(padding_T1, 0)[:, 0] if gate_Tg.shape[1] else None
    return weights_TA, experts_TA.int().masked_fill(padding_T1, -1), gate_T


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The ids of the `count` largest of each row, in order, of equal ones the lower id first."""
    return torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :count]


@triton.jit
def _key(value, id):
    """An integer that orders pairs: by value (float32), of equal values the lower id is the larger. No value is -0."""
    bits = value.to(tl.int32, bitcast=True)
    return (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) << 32) | (0x7FFFFFFF - id).to(tl.int64)


@triton.jit
def _value(key):
    """The value of a key."""
    bits = (key >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def _route_kernel(
    terms_ptr, bias_ptr, slots_ptr, weights_ptr, experts_ptr, gate_ptr, scale,
    TERMS: tl.constexpr, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, ACTIVE: tl.constexpr, SLOTS: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, PADDED: tl.constexpr, RENORMALISE: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_BEST: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr, SIZE_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row. Experts are in rows by group; without groups there is one row."""
    LOWEST: tl.constexpr = -(2**63)  # below every key
    row = tl.program_id(0).to(tl.int64)
    term_stride = tl.num_programs(0).to(tl.int64) * COLUMNS
    group, member = tl.arange(0, GROUPS_BLOCK), tl.arange(0, SIZE_BLOCK)
    SIZE: tl.constexpr = EXPERTS // GROUPS
    expert = group[:, None] * SIZE + member[None, :]
    known = (group < GROUPS)[:, None] & (member < SIZE)[None, :]
    terms_row_ptr = terms_ptr + row * COLUMNS
    logits = tl.load(terms_row_ptr + expert, mask=known, other=0.0)
    for term in tl.static_range(1, TERMS):
        logits += tl.load(terms_row_ptr + term * term_stride + expert, mask=known, other=0.0)

    bias = tl.load(bias_ptr + expert, mask=known, other=0.0) if BIAS != "none" else 0.0
    if BIAS == "logits":
        logits += bias
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        logits = tl.where(known, logits, -float("inf"))
        scores = tl.exp(logits - tl.max(logits))
        scores = scores / tl.sum(scores)
    merits = scores + bias if BIAS == "choice" else scores
    keys = tl.where(known, _key(merits, expert), LOWEST)
    if TOP_GROUPS < GROUPS:
        within = _top_groups(keys, group, GROUPS, TOP_GROUPS, GROUP_BEST, GROUPS_BLOCK, LOWEST)
        keys = tl.where(within[:, None], keys, LOWEST)

    slot = tl.arange(0, SLOTS)
    chosen, weights = tl.full((SLOTS,), 0, tl.int64), tl.full((SLOTS,), 0.0, tl.float32)
    for a in tl.static_range(ACTIVE):
        best = tl.max(keys)
        chosen = tl.where(slot == a, best, chosen)
        if BIAS == "choice":
            weights = tl.where(slot == a, tl.sum(tl.where(keys == best, scores, 0.0)), weights)
        keys = tl.where(keys == best, LOWEST, keys)
    experts = 0x7FFFFFFF - chosen.to(tl.int32)
    if BIAS != "choice":  # merits are scores
        weights = _value(chosen)
    if RENORMALISE:
        weights = weights / (tl.sum(weights) + 1e-20)  # scores of a sigmoid may all be 0
    real = tl.load(slots_ptr + row) >= 0 if PADDED else True
    tl.store(weights_ptr + row * ACTIVE + slot, tl.where(real, weights * scale, 0.0), mask=slot < ACTIVE)
    tl.store(experts_ptr + row * ACTIVE + slot, tl.where(real, experts, -1), mask=slot < ACTIVE)
    if COLUMNS > EXPERTS:
        gate = tl.load(terms_row_ptr + EXPERTS)
        for term in tl.static_range(1, TERMS):
            gate += tl.load(terms_row_ptr + term * term_stride + EXPERTS)
        tl.store(gate_ptr + row, tl.where(real, 1.0 / (1.0 + tl.exp(-gate)), 0.0))


@triton.jit
def _top_groups(
    keys, group, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_BEST: tl.constexpr, GROUPS_BLOCK: tl.constexpr,
    LOWEST: tl.constexpr,
):  # fmt: skip
    """Whether each group is one of those whose best experts have most merit together."""
    worth = tl.full((GROUPS_BLOCK,), 0.0, tl.float32)
    for _ in tl.static_range(GROUP_BEST):
        best = tl.max(keys, axis=1)
        worth += _value(best)
        keys = tl.where(keys == best[:, None], LOWEST, keys)
    group_keys = tl.where(group < GROUPS, _key(worth, group), LOWEST)
    chosen = group < 0
    for _ in tl.static_range(TOP_GROUPS):
        first = group_keys == tl.max(group_keys)
        chosen |= first
        group_keys = tl.where(first, LOWEST, group_keys)
    return chosen
