"""Sampling parameters beyond a temperature: one host entry per slot, combined into `Filters` for the rows of a step.

A request without such parameters has no entry. Parameters that cannot change the token are ignored: the most likely id passes
min-p, top-k and top-p, so greedy requests need none of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log

import torch

from tpserve.sampler.filters import (
    AllowedIds,
    BadWords,
    Filters,
    GrammarMask,
    LogitBias,
    MinPFilter,
    Penalties,
    TopKFilter,
    TopPFilter,
)
from tpserve.types.sampling import EngineSamplingParams
from tpserve.worker.grammars import SlotGrammar

ToDevice = Callable[[torch.Tensor], torch.Tensor]
"""Copies a host tensor to the device of the filters."""


@dataclass(frozen=True)
class SamplingMetadata:
    """One sequence's filters. `allowed_N`, `bias_N`: token ids [N] int64 on the host. `ends`: banned before `min_tokens`."""

    params: EngineSamplingParams
    prompt_len: int
    allowed_N: torch.Tensor
    bias_N: torch.Tensor
    ends: tuple[tuple[int, ...], ...]
    min_p: bool
    top_k: bool
    top_p: bool
    constrained: bool
    """Whether a grammar says which ids may come next."""

    @property
    def penalties(self) -> bool:
        """Whether any penalty is set."""
        p = self.params
        return (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) != (0, 0, 1)

    def banned_words(self, position: int) -> tuple[tuple[int, ...], ...]:
        """The token sequences that the token at `position` must not complete."""
        early = position - self.prompt_len < self.params.min_tokens
        return self.params.bad_words + self.ends if early else self.params.bad_words

    def needs_filters(self, position: int) -> bool:
        """Whether the draw of the token at `position` needs any filter."""
        pairs = len(self.allowed_N) or len(self.bias_N)
        always = self.constrained or pairs or self.penalties or self.min_p or self.top_k or self.top_p
        return bool(always or self.banned_words(position))


def sampling_metadata(
    params: EngineSamplingParams, prompt_len: int, eos_ids: Sequence[int], vocab_size: int, *, constrained: bool = False
) -> SamplingMetadata | None:
    """The filters of a sequence; None when no position needs any."""
    random = params.temperature >= torch.finfo(torch.float32).tiny  # below, the draw is always greedy
    ends = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *eos_ids)
    metadata = SamplingMetadata(
        params,
        prompt_len,
        allowed_N=torch.tensor(params.allowed_token_ids, dtype=torch.int64),
        bias_N=torch.tensor([id for id, _ in params.logit_bias], dtype=torch.int64),
        ends=tuple((id,) for id in ends if id < vocab_size) if params.min_tokens else (),
        min_p=random and params.min_p > 0,
        top_k=random and 0 < params.top_k < vocab_size,
        top_p=random and params.top_p < 1,
        constrained=constrained,
    )
    return metadata if metadata.needs_filters(prompt_len) else None


def filters(
    rows: Sequence[SamplingMetadata], positions: Sequence[int], move: ToDevice, grammars: Sequence[SlotGrammar | None] = ()
) -> Filters:
    """The filters for R rows that each need one; `positions` are of the tokens to draw, `grammars` of the rows' sequences.

    Tensor suffixes: R rows, N (row, token id) pairs, W words, E tokens of a word before its last.
    """

    def select(has: Callable[[SamplingMetadata], bool]) -> tuple[torch.Tensor, list[EngineSamplingParams]] | None:
        found = [i for i, row in enumerate(rows) if has(row)]
        return (move(torch.tensor(found)), [rows[i].params for i in found]) if found else None

    def column(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return move(torch.tensor(values, dtype=dtype))

    bans, longest = _bans(rows, positions, move)
    penalties = min_p = top_k = top_p = None
    if (selected := select(lambda row: row.penalties)) is not None:
        row_index, params = selected
        penalties = Penalties(
            row_index,
            column([p.presence_penalty for p in params], torch.float32),
            column([p.frequency_penalty for p in params], torch.float32),
            column([p.repetition_penalty for p in params], torch.float32),
        )
    if (selected := select(lambda row: row.min_p)) is not None:
        row_index, params = selected
        min_p = MinPFilter(row_index, column([log(p.min_p) for p in params], torch.float64))
    if (selected := select(lambda row: row.top_k)) is not None:
        row_index, params = selected
        top_k = TopKFilter(row_index, column([p.top_k for p in params], torch.int64), max(p.top_k for p in params))
    if (selected := select(lambda row: row.top_p)) is not None:
        row_index, params = selected
        bounded = all(row.top_k for row in rows if row.top_p)
        top_p = TopPFilter(
            row_index, column([p.top_p for p in params], torch.float64), max(p.top_k for p in params) if bounded else None
        )
    return Filters(
        prompt_R=move(torch.tensor([row.prompt_len for row in rows])),
        history=max(positions) if penalties is not None or longest > 1 else 0,
        grammar=_grammar_mask(rows, positions, grammars, move),
        allowed=_allowed(rows, move),
        bad_words=bans,
        bias=_bias(rows, move),
        penalties=penalties,
        min_p=min_p,
        top_k=top_k,
        top_p=top_p,
    )


def _grammar_mask(
    rows: Sequence[SamplingMetadata], positions: Sequence[int], grammars: Sequence[SlotGrammar | None], move: ToDevice
) -> GrammarMask | None:
    found = [(i, grammar) for i, grammar in enumerate(grammars) if grammar is not None]
    if not found:
        return None
    bits_GW = torch.empty(len(found), found[0][1].num_words, dtype=torch.int32)
    for bits_W, (i, grammar) in zip(bits_GW, found, strict=True):
        grammar.write_mask(bits_W, positions[i] - rows[i].prompt_len)
    return GrammarMask(move(torch.tensor([i for i, _ in found])), move(bits_GW))


def _allowed(rows: Sequence[SamplingMetadata], move: ToDevice) -> AllowedIds | None:
    found = [i for i, row in enumerate(rows) if len(row.allowed_N)]
    if not found:
        return None
    row_N, id_N = _pairs(found, [rows[i].allowed_N for i in found])
    return AllowedIds(move(torch.tensor(found)), move(row_N), move(id_N))


def _bias(rows: Sequence[SamplingMetadata], move: ToDevice) -> LogitBias | None:
    found = [i for i, row in enumerate(rows) if len(row.bias_N)]
    if not found:
        return None
    row_N, id_N = _pairs(found, [rows[i].bias_N for i in found])
    values = [value for i in found for _, value in rows[i].params.logit_bias]
    return LogitBias(move(row_N), move(id_N), move(torch.tensor(values, dtype=torch.float32)))


def _pairs(found: Sequence[int], ids: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.repeat_interleave(torch.tensor(found), torch.tensor([len(part) for part in ids])), torch.cat(list(ids))


def _bans(rows: Sequence[SamplingMetadata], positions: Sequence[int], move: ToDevice) -> tuple[BadWords | None, int]:
    """The rows' banned words and the length of the longest; (None, 0) without any."""
    words = [
        (i, word) for i, (row, position) in enumerate(zip(rows, positions, strict=True)) for word in row.banned_words(position)
    ]
    if not words:
        return None, 0
    longest = max(len(word) for _, word in words)
    prefix_WE = torch.tensor([(-1,) * (longest - len(word)) + word[:-1] for _, word in words], dtype=torch.int32)
    return BadWords(
        row_W=move(torch.tensor([i for i, _ in words])),
        last_W=move(torch.tensor([word[-1] for _, word in words])),
        prefix_WE=move(prefix_WE.view(len(words), longest - 1)),
        length_W=move(torch.tensor([len(word) - 1 for _, word in words])),
    ), longest
