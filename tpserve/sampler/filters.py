"""What a request may ask of its logits before the draw. Pure functions; owns no request and no state.

One small function a filter, applied in this order to rows that hold the whole vocabulary:

    masks     `allow`, then `ban`; where bans would leave nothing, they are lifted
    bias      `add_bias`
    penalties `penalise`: repetition (prompt and output), then frequency and presence (output)
    draw      temperature is the draw's; `keep_min_p`, `keep_top_k`, `keep_top_p` see it

Ids that are filtered out become -inf. Invariants: a row's bits depend on nothing but the row, its tokens and its request;
thresholds are exact (values are compared, weights are summed as integers), ties go to the lowest id.

Legend: R rows, V vocabulary ids (all of them), L tokens of the longest sequence; A, P, K rows of those that ask for one
filter, N (row, id) pairs, W banned words, E ids of the longest word's beginning.
"""

from dataclasses import dataclass

import torch

CANDIDATES = 1024
"""Ids that top-p looks at on the CPU before it sorts the vocabulary."""
WEIGHT_ONE = 2.0**40
"""A weight of 1 as an integer: sums over 2**22 ids are exact in 64 bits."""


@dataclass(frozen=True)
class AllowedIds:
    """Rows that may draw only the ids of the pairs."""

    rows_A: torch.Tensor
    row_N: torch.Tensor
    id_N: torch.Tensor


@dataclass(frozen=True)
class BadWords:
    """Words: `last_W` must not follow the `length_W` last ids of `prefix_WE` (right-aligned); length 0 is never."""

    row_W: torch.Tensor
    last_W: torch.Tensor
    prefix_WE: torch.Tensor
    length_W: torch.Tensor


@dataclass(frozen=True)
class LogitBias:
    """float32 values to add; no pair stands twice."""

    row_N: torch.Tensor
    id_N: torch.Tensor
    value_N: torch.Tensor


@dataclass(frozen=True)
class Penalties:
    """float32; a row that asks for one of them has neutral values for the others."""

    rows_P: torch.Tensor
    presence_P: torch.Tensor
    frequency_P: torch.Tensor
    repetition_P: torch.Tensor


@dataclass(frozen=True)
class MinPFilter:
    rows_K: torch.Tensor
    log_K: torch.Tensor
    """float64: the logarithm of the smallest share of the best id's probability"""


@dataclass(frozen=True)
class TopKFilter:
    """`most`: the largest of `k_K`, on the host; all are below the size of the vocabulary."""

    rows_K: torch.Tensor
    k_K: torch.Tensor
    most: int


@dataclass(frozen=True)
class TopPFilter:
    """`p_K` float64. `most`: how many ids can be left in any of the rows, on the host; None when top-k does not bound it."""

    rows_K: torch.Tensor
    p_K: torch.Tensor
    most: int | None


@dataclass(frozen=True)
class Filters:
    """What R rows ask; tensors on the device. `prompt_R`: lengths of prompts; `history`: L, 0 when no filter reads tokens."""

    prompt_R: torch.Tensor
    history: int = 0
    allowed: AllowedIds | None = None
    bad_words: BadWords | None = None
    bias: LogitBias | None = None
    penalties: Penalties | None = None
    min_p: MinPFilter | None = None
    top_k: TopKFilter | None = None
    top_p: TopPFilter | None = None


def apply(
    logits_RV: torch.Tensor, filters: Filters, temperature_R: torch.Tensor, position_R: torch.Tensor, tokens_RL: torch.Tensor
) -> torch.Tensor:
    """The logits to draw from, float32; changes `logits_RV`.

    `position_R`: how many tokens each row's sequence has; `tokens_RL`: its tokens, anything after them.
    """
    if filters.allowed is not None:
        allow(logits_RV, filters.allowed)
    if filters.bad_words is not None:
        logits_RV = ban(logits_RV, filters.bad_words, tokens_RL, position_R, filters.prompt_R)
    if filters.bias is not None:
        add_bias(logits_RV, filters.bias)
    if filters.penalties is not None:
        penalise(logits_RV, filters.penalties, tokens_RL, position_R, filters.prompt_R)
    if filters.min_p is not None:
        keep_min_p(logits_RV, filters.min_p, temperature_R)
    if filters.top_k is not None:
        keep_top_k(logits_RV, filters.top_k)
    if filters.top_p is not None:
        keep_top_p(logits_RV, filters.top_p, temperature_R)
    return logits_RV


def allow(logits_RV: torch.Tensor, asked: AllowedIds) -> None:
    """Nothing but the ids of the pairs."""
    kept_N = logits_RV[asked.row_N, asked.id_N]
    logits_RV[asked.rows_A] = float("-inf")
    logits_RV[asked.row_N, asked.id_N] = kept_N


def ban(
    logits_RV: torch.Tensor, asked: BadWords, tokens_RL: torch.Tensor, position_R: torch.Tensor, prompt_R: torch.Tensor
) -> torch.Tensor:
    """No id that completes a word whose beginning is the end of the output."""
    match_W = position_R[asked.row_W] - asked.length_W >= prompt_R[asked.row_W]
    for back in range(1, asked.prefix_WE.shape[1] + 1):
        at_W = (position_R[asked.row_W] - back).clamp(min=0)
        same_W = tokens_RL[asked.row_W, at_W] == asked.prefix_WE[:, -back]
        match_W = match_W & (same_W | (asked.length_W < back))
    ceiling_W = torch.where(match_W, float("-inf"), float("inf")).to(logits_RV)
    flat_W = asked.row_W * logits_RV.shape[1] + asked.last_W  # a minimum, for words may end alike
    banned_RV = logits_RV.flatten().scatter_reduce(0, flat_W, ceiling_W, "amin").view_as(logits_RV)
    nothing_R1 = banned_RV.amax(dim=1, keepdim=True) == float("-inf")
    return torch.where(nothing_R1, logits_RV, banned_RV)


def add_bias(logits_RV: torch.Tensor, asked: LogitBias) -> None:
    logits_RV[asked.row_N, asked.id_N] += asked.value_N


def penalise(
    logits_RV: torch.Tensor, asked: Penalties, tokens_RL: torch.Tensor, position_R: torch.Tensor, prompt_R: torch.Tensor
) -> None:
    """Less for what the text has already. Counts come from the tokens on the device: the host may not know the newest yet."""
    rows = asked.rows_P
    tokens_PL = tokens_RL[rows].long()
    at_L = torch.arange(tokens_PL.shape[1], device=tokens_PL.device)
    known_PL = at_L < position_R[rows, None]
    output_PL = known_PL & (at_L >= prompt_R[rows, None])
    x_PV = logits_RV[rows]
    seen_PV = torch.zeros_like(x_PV, dtype=torch.int32).scatter_add_(1, tokens_PL, known_PL.int()) > 0
    count_PV = torch.zeros_like(x_PV, dtype=torch.int32).scatter_add_(1, tokens_PL, output_PL.int())
    repetition_P1 = asked.repetition_P[:, None]
    less_PV = torch.where(x_PV > 0, x_PV / repetition_P1, x_PV * repetition_P1)
    x_PV = torch.where(seen_PV, less_PV, x_PV)
    logits_RV[rows] = x_PV - asked.frequency_P[:, None] * count_PV - asked.presence_P[:, None] * (count_PV > 0)


def keep_min_p(logits_RV: torch.Tensor, asked: MinPFilter, temperature_R: torch.Tensor) -> None:
    """Only ids at least so likely as a share of the most likely one."""
    x_KV = logits_RV[asked.rows_K]
    least_K = x_KV.amax(dim=1).double() + temperature_R[asked.rows_K].double() * asked.log_K
    logits_RV[asked.rows_K] = x_KV.masked_fill(x_KV < least_K[:, None], float("-inf"))


def keep_top_k(logits_RV: torch.Tensor, asked: TopKFilter) -> None:
    """The k largest."""
    x_KV = logits_RV[asked.rows_K]
    best_KC = x_KV.topk(asked.most, dim=1).values
    logits_RV[asked.rows_K] = _first(x_KV, best_KC, asked.k_K)


def keep_top_p(logits_RV: torch.Tensor, asked: TopPFilter, temperature_R: torch.Tensor) -> None:
    """The fewest, most likely first, that have the probability p together."""
    x_KV = logits_RV[asked.rows_K]
    top_K1 = x_KV.amax(dim=1, keepdim=True)
    temperature_K1 = temperature_R[asked.rows_K, None]
    num_ids = x_KV.shape[1]
    # On a card nobody may wait for the check whether so few were enough; there a sort is cheap.
    guess = num_ids if x_KV.is_cuda else CANDIDATES
    size = min(guess if asked.most is None else asked.most, num_ids)
    best_KC = x_KV.topk(size, dim=1).values
    sum_KC = _weights(best_KC, top_K1, temperature_K1).cumsum(dim=1)
    # What top-k has taken out weighs nothing, so the sum of the best is the sum of all.
    total_K = sum_KC[:, -1] if asked.most is not None else _weights(x_KV, top_K1, temperature_K1).sum(dim=1)
    target_K1 = (total_K.double() * asked.p_K).ceil().long().clamp(min=1).minimum(total_K)[:, None]
    if asked.most is None and size < num_ids and bool((sum_KC[:, -1:] < target_K1).any()):
        best_KC = x_KV.sort(dim=1, descending=True).values
        sum_KC = _weights(best_KC, top_K1, temperature_K1).cumsum(dim=1)
    logits_RV[asked.rows_K] = _first(x_KV, best_KC, 1 + (sum_KC < target_K1).sum(dim=1))


def _weights(x_KN: torch.Tensor, top_K1: torch.Tensor, temperature_K1: torch.Tensor) -> torch.Tensor:
    """Unnormalised probabilities as integers, 2**40 for the best one: their sums do not know their order."""
    return ((x_KN - top_K1).div_(temperature_K1).exp_().double() * WEIGHT_ONE).round_().long()


def _first(x_KV: torch.Tensor, best_KC: torch.Tensor, count_K: torch.Tensor) -> torch.Tensor:
    """The `count_K` largest, of equal ones those with the lowest ids; the others are -inf. `best_KC`: the largest, in order."""
    last_K1 = best_KC.gather(1, count_K[:, None] - 1)
    more_KV, same_KV = x_KV > last_K1, x_KV == last_K1
    left_K1 = count_K[:, None] - more_KV.sum(dim=1, keepdim=True)
    return x_KV.masked_fill(~(more_KV | (same_KV & (same_KV.cumsum(dim=1) <= left_K1))), float("-inf"))
