"""Logit filters: masks, bias, penalties and truncation before the draw. Pure functions; owns no request and no state.

One function per filter, applied in this order to rows that hold the whole vocabulary:

    masks       `apply_grammar`, then `apply_allowed_ids`, then `apply_bad_words` (each of the last two is skipped for a row that
                would have no id left)
    bias        `apply_bias`
    penalties   `apply_penalties`: repetition (prompt and output), then frequency and presence (output)
    truncation  `apply_min_p`, `apply_top_k`, `apply_top_p`, of the distribution with temperature; `draw` applies the temperature

On a card kernels in Triton do all of it, a launch for each kind, without a sort. On the CPU the library of kernels does the masks
of grammars, penalties and truncation. The functions here are what they must do; an exponential may differ in the last bit.
Filtered ids become -inf. Invariants: a row's bits depend only on the row, its tokens and its request; thresholds are exact
(values are compared, weights are summed as integers); ties go to the lowest id.

Sources: repetition penalty, Keskar et al. 2019 (arXiv:1909.05858); frequency and presence penalties, OpenAI's API reference;
top-k, Fan et al. 2018 (arXiv:1805.04833); top-p, Holtzman et al. 2019 (arXiv:1904.09751); min-p, Nguyen et al. 2024
(arXiv:2407.01082).

Legend: R rows, V vocabulary ids (all of them), L tokens of the longest sequence; A, P, K the rows with a certain filter,
N (row, id) pairs, W banned words, E ids of the longest prefix of a banned word. Unless stated otherwise indices are int64.
"""

from dataclasses import dataclass

import torch

from tpserve_kernels.cpu import filters as native
from tpserve_kernels.cpu.library import is_native
from tpserve_kernels.sampler_types import Sequences

CANDIDATES = 1024
"""Top-p tries this many ids before it sorts the whole vocabulary."""
WEIGHT_ONE = 2.0**40
"""A weight of 1 as an integer: sums over 2**22 ids are exact in 64 bits."""


@dataclass(frozen=True)
class GrammarMask:
    """The rows `rows_G` may draw only the ids whose bits are set: id i is bit i % 32 of word i // 32 of int32 `bits_GW`."""

    rows_G: torch.Tensor
    bits_GW: torch.Tensor

    def since(self, first: int) -> "GrammarMask":
        """With bit 0 for the id `first`, a multiple of 32."""
        assert first % 32 == 0
        return GrammarMask(self.rows_G, self.bits_GW[:, first // 32 :])


@dataclass(frozen=True)
class AllowedIds:
    """The rows `rows_A` may draw only the ids of the (row, id) pairs."""

    rows_A: torch.Tensor
    row_N: torch.Tensor
    id_N: torch.Tensor
    ends_R: torch.Tensor
    """The pairs of row r are [ends_R[r - 1], ends_R[r])."""


@dataclass(frozen=True)
class BadWords:
    """Id `last_W` must not follow the last `length_W` ids of `prefix_WE` (right-aligned). Length 0: the id is always banned."""

    row_W: torch.Tensor
    last_W: torch.Tensor
    prefix_WE: torch.Tensor
    length_W: torch.Tensor
    ends_R: torch.Tensor
    """The words of row r are [ends_R[r - 1], ends_R[r])."""


@dataclass(frozen=True)
class LogitBias:
    """float32 values to add to (row, id) pairs. No pair occurs twice."""

    row_N: torch.Tensor
    id_N: torch.Tensor
    value_N: torch.Tensor


@dataclass(frozen=True)
class Penalties:
    """float32 penalties of the rows `rows_P`. The neutral values are presence 0, frequency 0, repetition 1."""

    rows_P: torch.Tensor
    presence_P: torch.Tensor
    frequency_P: torch.Tensor
    repetition_P: torch.Tensor


@dataclass(frozen=True)
class Truncation:
    """Min-p, top-k and top-p of all rows."""

    log_min_p_R: torch.Tensor
    """float64: log(min_p), where min_p is relative to the probability of the best id; -inf for none"""
    top_k_R: torch.Tensor
    """int64, below the vocabulary size; 0 for none"""
    top_p_R: torch.Tensor
    """float64; 1 for none"""


@dataclass(frozen=True)
class Filters:
    """The filters of R rows; tensors on the device.

    `prompt_R`: int64 prompt lengths. `history`: L, or 0 when no filter reads tokens.
    """

    prompt_R: torch.Tensor
    history: int = 0
    grammar: GrammarMask | None = None
    allowed: AllowedIds | None = None
    bad_words: BadWords | None = None
    bias: LogitBias | None = None
    penalties: Penalties | None = None
    truncation: Truncation | None = None

    @property
    def per_id(self) -> bool:
        """Whether what becomes of a logit depends on its id alone, so that a part of the vocabulary can be filtered."""
        return self.allowed is None and self.bad_words is None and self.truncation is None


def apply(
    logits_RV: torch.Tensor, filters: Filters, temperature_R: torch.Tensor, position_R: torch.Tensor, tokens_XL: torch.Tensor,
    slot_R: torch.Tensor, first: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Apply all filters: the logits to draw from, float32 [R, V]. Overwrites `logits_RV`.

    `first`: the id of column 0, a multiple of 32; the columns are the whole vocabulary unless the filters are `per_id`.

    `temperature_R`: float32, positive for rows with top-p. `position_R`: int64, the number of tokens of each row's sequence.
    `tokens_XL`: the token ids of all slots, int32; `slot_R`: int64, the slot of each row.
    """
    assert filters.per_id or first == 0
    if logits_RV.is_cuda:
        _apply_on_card(logits_RV, filters, temperature_R, position_R, tokens_XL, slot_R, first)
        return logits_RV
    tokens_RL = tokens_XL[slot_R, : filters.history].sub_(first)  # as columns, some of which may be outside
    library = is_native(logits_RV)
    grammar = None if filters.grammar is None else filters.grammar.since(first)
    if grammar is not None and library:
        native.mask_bits(logits_RV, grammar.rows_G, grammar.bits_GW)
    elif grammar is not None:
        apply_grammar(logits_RV, grammar)
    if filters.allowed is not None:
        allowed_RV = apply_allowed_ids(logits_RV.clone(), filters.allowed)
        logits_RV = _unless_nothing_is_left(logits_RV, allowed_RV)
    if filters.bad_words is not None:
        logits_RV = apply_bad_words(logits_RV, filters.bad_words, tokens_RL, position_R, filters.prompt_R)
    if filters.bias is not None:
        apply_bias(logits_RV, filters.bias, first)
    if filters.penalties is not None and library:
        p, rows_P = filters.penalties, filters.penalties.rows_P
        penalties = p.presence_P, p.frequency_P, p.repetition_P
        native.penalize(logits_RV, rows_P, tokens_RL, position_R[rows_P], filters.prompt_R[rows_P], penalties)
    elif filters.penalties is not None:
        apply_penalties(logits_RV, filters.penalties, tokens_RL, position_R, filters.prompt_R)
    if filters.truncation is not None and library:
        t, row_R = filters.truncation, torch.arange(len(logits_RV))
        native.truncate(logits_RV, row_R, temperature_R.contiguous(), t.log_min_p_R, t.top_k_R, t.top_p_R)
    elif filters.truncation is not None:
        apply_truncation(logits_RV, filters.truncation, temperature_R)
    return logits_RV


def _apply_on_card(
    logits_RV: torch.Tensor, filters: Filters, temperature_R: torch.Tensor, position_R: torch.Tensor, tokens_XL: torch.Tensor,
    slot_R: torch.Tensor, first: int,
) -> None:  # fmt: skip
    """`apply` in Triton, in place, a launch for each kind of filter. Nothing waits for the device."""
    from tpserve_kernels import masks
    from tpserve_kernels.truncate import truncate

    sequences = Sequences(tokens_XL, slot_R, position_R, filters.prompt_R)
    if filters.grammar is not None:
        grammar = filters.grammar.since(first)
        masks.mask_bits(logits_RV, grammar.rows_G, grammar.bits_GW)
    if (allowed := filters.allowed) is not None:
        masks.allow(logits_RV, allowed.id_N, allowed.ends_R)
    if (words := filters.bad_words) is not None:
        masks.ban(logits_RV, words.last_W, words.prefix_WE, words.length_W, words.ends_R, sequences)
    if (bias := filters.bias) is not None:
        masks.add_bias(logits_RV, bias.row_N, bias.id_N, bias.value_N, first)
    if (p := filters.penalties) is not None:
        masks.penalize(logits_RV, p.rows_P, p.presence_P, p.frequency_P, p.repetition_P, sequences, first)
    if (t := filters.truncation) is not None:
        truncate(logits_RV, temperature_R, t.log_min_p_R, t.top_k_R, t.top_p_R)


def apply_grammar(logits_RV: torch.Tensor, params: GrammarMask) -> None:
    """Set the ids that no grammar allows to -inf, in place."""
    bit_B = torch.arange(32, dtype=torch.int32, device=logits_RV.device)
    allowed_GV = (params.bits_GW[:, :, None] >> bit_B & 1).flatten(1)[:, : logits_RV.shape[1]].bool()
    logits_RV[params.rows_G] = logits_RV[params.rows_G].masked_fill(~allowed_GV, float("-inf"))


def apply_allowed_ids(logits_RV: torch.Tensor, params: AllowedIds) -> torch.Tensor:
    """Set all other ids of the rows to -inf, in place."""
    allowed_N = logits_RV[params.row_N, params.id_N]
    logits_RV[params.rows_A] = float("-inf")
    logits_RV[params.row_N, params.id_N] = allowed_N
    return logits_RV


def apply_bad_words(
    logits_RV: torch.Tensor, params: BadWords, tokens_RL: torch.Tensor, position_R: torch.Tensor, prompt_R: torch.Tensor
) -> torch.Tensor:
    """The logits [R, V], with -inf for each id that would complete a banned word. Only output tokens count as its beginning.

    A row whose ids would all be banned stays as it is.
    """
    match_W = position_R[params.row_W] - params.length_W >= prompt_R[params.row_W]
    for back in range(1, params.prefix_WE.shape[1] + 1):
        at_W = (position_R[params.row_W] - back).clamp(min=0)
        same_W = tokens_RL[params.row_W, at_W] == params.prefix_WE[:, -back]
        match_W = match_W & (same_W | (params.length_W < back))
    ceiling_W = torch.where(match_W, float("-inf"), float("inf")).to(logits_RV)
    flat_W = params.row_W * logits_RV.shape[1] + params.last_W  # a minimum, since words may share the last id
    banned_RV = logits_RV.flatten().scatter_reduce(0, flat_W, ceiling_W, "amin").view_as(logits_RV)
    return _unless_nothing_is_left(logits_RV, banned_RV)


def _unless_nothing_is_left(before_RV: torch.Tensor, after_RV: torch.Tensor) -> torch.Tensor:
    nothing_R1 = after_RV.amax(dim=1, keepdim=True) == float("-inf")
    return torch.where(nothing_R1, before_RV, after_RV)


def apply_bias(logits_RV: torch.Tensor, params: LogitBias, first: int = 0) -> None:
    """Add the biases, in place. `first`: the id of column 0."""
    column_N = params.id_N - first
    inside_N = (column_N >= 0) & (column_N < logits_RV.shape[1])
    logits_RV[params.row_N[inside_N], column_N[inside_N]] += params.value_N[inside_N]


def apply_penalties(
    logits_RV: torch.Tensor, params: Penalties, tokens_RL: torch.Tensor, position_R: torch.Tensor, prompt_R: torch.Tensor
) -> None:
    """Lower the logits of ids that the sequence has already, in place.

    Counts come from the tokens on the device: with plans in flight the host does not know the newest token yet. `tokens_RL`: as
    columns; those outside the logits count nothing.
    """
    rows = params.rows_P
    tokens_PL = tokens_RL[rows].long()
    inside_PL = (tokens_PL >= 0) & (tokens_PL < logits_RV.shape[1])
    tokens_PL = torch.where(inside_PL, tokens_PL, 0)
    at_L = torch.arange(tokens_PL.shape[1], device=tokens_PL.device)
    known_PL = (at_L < position_R[rows, None]) & inside_PL
    output_PL = known_PL & (at_L >= prompt_R[rows, None])
    x_PV = logits_RV[rows]
    seen_PV = torch.zeros_like(x_PV, dtype=torch.int32).scatter_add_(1, tokens_PL, known_PL.int()) > 0
    count_PV = torch.zeros_like(x_PV, dtype=torch.int32).scatter_add_(1, tokens_PL, output_PL.int())
    repetition_P1 = params.repetition_P[:, None]
    less_PV = torch.where(x_PV > 0, x_PV / repetition_P1, x_PV * repetition_P1)
    x_PV = torch.where(seen_PV, less_PV, x_PV)
    logits_RV[rows] = x_PV - params.frequency_P[:, None] * count_PV - params.presence_P[:, None] * (count_PV > 0)


def apply_truncation(logits_RV: torch.Tensor, params: Truncation, temperature_R: torch.Tensor) -> None:
    """Min-p, then top-k, then top-p, in place."""
    apply_min_p(logits_RV, params.log_min_p_R, temperature_R)
    apply_top_k(logits_RV, params.top_k_R)
    apply_top_p(logits_RV, params.top_p_R, params.top_k_R, temperature_R)


def apply_min_p(logits_RV: torch.Tensor, log_min_p_R: torch.Tensor, temperature_R: torch.Tensor) -> None:
    """Keep the ids whose probability is at least min_p times that of the most likely id, in place."""
    rows = (log_min_p_R > float("-inf")).nonzero().flatten()
    x_KV = logits_RV[rows]
    least_K = x_KV.amax(dim=1).double() + temperature_R[rows].double() * log_min_p_R[rows]
    logits_RV[rows] = x_KV.masked_fill(x_KV < least_K[:, None], float("-inf"))


def apply_top_k(logits_RV: torch.Tensor, top_k_R: torch.Tensor) -> None:
    """Keep the k largest logits, in place."""
    rows = top_k_R.nonzero().flatten()
    if len(rows):
        x_KV, k_K = logits_RV[rows], top_k_R[rows]
        best_KC = x_KV.topk(int(k_K.max()), dim=1).values
        logits_RV[rows] = _keep_largest(x_KV, best_KC, k_K)


def apply_top_p(logits_RV: torch.Tensor, top_p_R: torch.Tensor, top_k_R: torch.Tensor, temperature_R: torch.Tensor) -> None:
    """Keep the smallest set of most likely ids whose total probability is at least p, in place.

    `top_k_R`: how many ids top-k has left, 0 for all.
    """
    rows = (top_p_R < 1).nonzero().flatten()
    if not len(rows):
        return
    x_KV, temperature_K1 = logits_RV[rows], temperature_R[rows, None]
    top_K1, num_ids = x_KV.amax(dim=1, keepdim=True), x_KV.shape[1]
    bounded = bool(top_k_R[rows].all())
    size = min(int(top_k_R[rows].max()) if bounded else CANDIDATES, num_ids)
    best_KC = x_KV.topk(size, dim=1).values
    sum_KC = _weights(best_KC, top_K1, temperature_K1).cumsum(dim=1)
    # Ids that top-k has removed weigh nothing, so the sum of the best is the sum of all.
    total_K = sum_KC[:, -1] if bounded else _weights(x_KV, top_K1, temperature_K1).sum(dim=1)
    target_K1 = (total_K.double() * top_p_R[rows]).ceil().long().clamp(min=1).minimum(total_K)[:, None]
    if not bounded and size < num_ids and bool((sum_KC[:, -1:] < target_K1).any()):
        best_KC = x_KV.sort(dim=1, descending=True).values
        sum_KC = _weights(best_KC, top_K1, temperature_K1).cumsum(dim=1)
    logits_RV[rows] = _keep_largest(x_KV, best_KC, 1 + (sum_KC < target_K1).sum(dim=1))


def _weights(x_KN: torch.Tensor, top_K1: torch.Tensor, temperature_K1: torch.Tensor) -> torch.Tensor:
    """Unnormalised probabilities as integers, 2**40 for the best id, so that sums are exact in any order: int64."""
    return ((x_KN - top_K1).div_(temperature_K1).exp_().double() * WEIGHT_ONE).round_().long()


def _keep_largest(x_KV: torch.Tensor, best_KC: torch.Tensor, count_K: torch.Tensor) -> torch.Tensor:
    """The `count_K` largest logits of each row, ties by lowest id; the others become -inf. `best_KC`: the largest, sorted."""
    last_K1 = best_KC.gather(1, count_K[:, None] - 1)
    more_KV, same_KV = x_KV > last_K1, x_KV == last_K1
    left_K1 = count_K[:, None] - more_KV.sum(dim=1, keepdim=True)
    return x_KV.masked_fill(~(more_KV | (same_KV & (same_KV.cumsum(dim=1) <= left_K1))), float("-inf"))
