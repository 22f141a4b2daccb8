"""What sequences ask of the sampler's filters: kept a slot on the host, put together for the rows of a step.

A request that asks for nothing has no entry, and neither has what cannot change its draw: the most likely id outlives
min-p, top-k and top-p, so greedy requests do not ask for them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log

import torch

from tpserve.sampler.filters import AllowedIds, BadWords, Filters, LogitBias, MinPFilter, Penalties, TopKFilter, TopPFilter
from tpserve.types.sampling import EngineSamplingParams

ToDevice = Callable[[torch.Tensor], torch.Tensor]
"""Puts a host tensor where the filters run."""


@dataclass(frozen=True)
class SamplingMetadata:
    """One sequence's filters. `ends`: what must not be drawn while fewer than `min_tokens` are generated."""

    params: EngineSamplingParams
    prompt_len: int
    allowed_N: torch.Tensor
    bias_N: torch.Tensor
    ends: tuple[tuple[int, ...], ...]
    min_p: bool
    top_k: bool
    top_p: bool

    @property
    def penalties(self) -> bool:
        p = self.params
        return (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) != (0, 0, 1)

    def words(self, position: int) -> tuple[tuple[int, ...], ...]:
        """What the token at `position` must not complete."""
        early = position - self.prompt_len < self.params.min_tokens
        return self.params.bad_words + self.ends if early else self.params.bad_words

    def anything(self, position: int) -> bool:
        """Whether the draw of the token at `position` needs any filter."""
        always = len(self.allowed_N) or len(self.bias_N) or self.penalties or self.min_p or self.top_k or self.top_p
        return bool(always or self.words(position))


def sampling_metadata(
    params: EngineSamplingParams, prompt_len: int, eos_ids: Sequence[int], vocab_size: int
) -> SamplingMetadata | None:
    """What a sequence asks at some position or other; None for nothing."""
    random = params.temperature >= torch.finfo(torch.float32).tiny  # below, the best id is all that is ever drawn
    ends = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *eos_ids)
    it = SamplingMetadata(
        params,
        prompt_len,
        allowed_N=torch.tensor(params.allowed_token_ids, dtype=torch.int64),
        bias_N=torch.tensor([id for id, _ in params.logit_bias], dtype=torch.int64),
        ends=tuple((id,) for id in ends if id < vocab_size) if params.min_tokens else (),
        min_p=random and params.min_p > 0,
        top_k=random and 0 < params.top_k < vocab_size,
        top_p=random and params.top_p < 1,
    )
    return it if it.anything(prompt_len) else None


def filters(rows: Sequence[SamplingMetadata], positions: Sequence[int], place: ToDevice) -> Filters:
    """The filters of a step's rows, each of which asks for something."""

    def those(wanted: Callable[[SamplingMetadata], bool]) -> tuple[torch.Tensor, list[EngineSamplingParams]] | None:
        found = [i for i, row in enumerate(rows) if wanted(row)]
        return (place(torch.tensor(found)), [rows[i].params for i in found]) if found else None

    def column(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return place(torch.tensor(values, dtype=dtype))

    bans, longest = _bans(rows, positions, place)
    penalties = min_p = top_k = top_p = None
    if (wanted := those(lambda row: row.penalties)) is not None:
        at, params = wanted
        penalties = Penalties(
            at,
            column([p.presence_penalty for p in params], torch.float32),
            column([p.frequency_penalty for p in params], torch.float32),
            column([p.repetition_penalty for p in params], torch.float32),
        )
    if (wanted := those(lambda row: row.min_p)) is not None:
        at, params = wanted
        min_p = MinPFilter(at, column([log(p.min_p) for p in params], torch.float64))
    if (wanted := those(lambda row: row.top_k)) is not None:
        at, params = wanted
        top_k = TopKFilter(at, column([p.top_k for p in params], torch.int64), max(p.top_k for p in params))
    if (wanted := those(lambda row: row.top_p)) is not None:
        at, params = wanted
        bounded = all(row.top_k for row in rows if row.top_p)
        top_p = TopPFilter(
            at, column([p.top_p for p in params], torch.float64), max(p.top_k for p in params) if bounded else None
        )
    return Filters(
        prompt_R=place(torch.tensor([row.prompt_len for row in rows])),
        history=max(positions) if penalties is not None or longest > 1 else 0,
        allowed=_allowed(rows, place),
        bad_words=bans,
        bias=_bias(rows, place),
        penalties=penalties,
        min_p=min_p,
        top_k=top_k,
        top_p=top_p,
    )


def _allowed(rows: Sequence[SamplingMetadata], place: ToDevice) -> AllowedIds | None:
    found = [i for i, row in enumerate(rows) if len(row.allowed_N)]
    if not found:
        return None
    row_N, id_N = _pairs(found, [rows[i].allowed_N for i in found])
    return AllowedIds(place(torch.tensor(found)), place(row_N), place(id_N))


def _bias(rows: Sequence[SamplingMetadata], place: ToDevice) -> LogitBias | None:
    found = [i for i, row in enumerate(rows) if len(row.bias_N)]
    if not found:
        return None
    row_N, id_N = _pairs(found, [rows[i].bias_N for i in found])
    values = [value for i in found for _, value in rows[i].params.logit_bias]
    return LogitBias(place(row_N), place(id_N), place(torch.tensor(values, dtype=torch.float32)))


def _pairs(found: Sequence[int], ids: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.repeat_interleave(torch.tensor(found), torch.tensor([len(part) for part in ids])), torch.cat(list(ids))


def _bans(rows: Sequence[SamplingMetadata], positions: Sequence[int], place: ToDevice) -> tuple[BadWords | None, int]:
    """The rows' words, and the length of the longest."""
    words = [(i, word) for i, (row, position) in enumerate(zip(rows, positions, strict=True)) for word in row.words(position)]
    if not words:
        return None, 0
    longest = max(len(word) for _, word in words)
    prefix_WE = torch.tensor([(-1,) * (longest - len(word)) + word[:-1] for _, word in words], dtype=torch.int32)
    return BadWords(
        row_W=place(torch.tensor([i for i, _ in words])),
        last_W=place(torch.tensor([word[-1] for _, word in words])),
        prefix_WE=place(prefix_WE.view(len(words), longest - 1)),
        length_W=place(torch.tensor([len(word) - 1 for _, word in words])),
    ), longest
