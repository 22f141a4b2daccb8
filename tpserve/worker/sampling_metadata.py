"""Sampling parameters beyond a temperature: one host entry per slot, combined into `Filters` for the rows of a step.

A request without such parameters has no entry. Parameters that cannot change the token are ignored: the most likely id passes
min-p, top-k and top-p, so greedy requests need none of them.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf, log

import torch

from tpserve.sampler.filters import AllowedIds, BadWords, Filters, GrammarMask, LogitBias, Penalties, Truncation
from tpserve.types.sampling import EngineSamplingParams
from tpserve.worker.grammars import SlotGrammar
from tpserve.worker.host_arrays import copy_arrays, to_device

Arrays = Sequence["array[int] | array[float]"]
"""The fields of one of the filters on the host; empty when no row has it."""


@dataclass(frozen=True)
class SamplingMetadata:
    """One sequence's filters. `allowed`, `biased`: token ids on the host. `ends`: banned before `min_tokens`."""

    params: EngineSamplingParams
    prompt_len: int
    allowed: "array[int]"
    biased: "array[int]"
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

    def needs_whole_rows(self, position: int) -> bool:
        """Whether a filter of the token at `position` looks at more than one id (`Filters.per_id`)."""
        return bool(self.allowed or self.min_p or self.top_k or self.top_p or self.banned_words(position))

    def needs_filters(self, position: int) -> bool:
        """Whether the draw of the token at `position` needs any filter."""
        return bool(self.constrained or self.biased or self.penalties or self.needs_whole_rows(position))


def sampling_metadata(
    params: EngineSamplingParams, prompt_len: int, eos_ids: Sequence[int], vocab_size: int, *, constrained: bool = False
) -> SamplingMetadata | None:
    """The filters of a sequence; None when no position needs any."""
    random = params.temperature >= torch.finfo(torch.float32).tiny  # below, the draw is always greedy
    ends = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *eos_ids)
    metadata = SamplingMetadata(
        params,
        prompt_len,
        allowed=array("q", params.allowed_token_ids),
        biased=array("q", [id for id, _ in params.logit_bias]),
        ends=tuple((id,) for id in ends if id < vocab_size) if params.min_tokens else (),
        min_p=random and params.min_p > 0,
        top_k=random and 0 < params.top_k < vocab_size,
        top_p=random and params.top_p < 1,
        constrained=constrained,
    )
    return metadata if metadata.needs_filters(prompt_len) else None


def filters(
    rows: Sequence[SamplingMetadata], positions: Sequence[int], device: torch.device, grammars: Sequence[SlotGrammar | None] = ()
) -> Filters:
    """The filters for R rows that each need one; `positions` are of the tokens to draw, `grammars` of the rows' sequences.

    Everything but the masks of grammars goes to the device in one copy.

    Tensor suffixes: R rows, N (row, token id) pairs, W words, E tokens of a word before its last.
    """
    words = [row.banned_words(position) for row, position in zip(rows, positions, strict=True)]
    longest = max((len(word) for of_row in words for word in of_row), default=0)
    parts = {
        "prompt": [array("q", [row.prompt_len for row in rows])],
        "allowed": _allowed(rows),
        "words": _words(words, longest),
        "bias": _bias(rows),
        "penalties": _penalties(rows),
        "truncation": _truncation(rows),
    }
    moved = iter(copy_arrays([each for arrays in parts.values() for each in arrays], device))
    of = {name: [next(moved) for _ in arrays] for name, arrays in parts.items()}
    bad_words = None
    if of["words"]:
        row_W, last_W, prefix_WE, length_W, ends_R = of["words"]
        bad_words = BadWords(row_W, last_W, prefix_WE.view(len(row_W), longest - 1), length_W, ends_R)
    return Filters(
        prompt_R=of["prompt"][0],
        history=max(positions) if of["penalties"] or longest > 1 else 0,
        grammar=_grammar_mask(rows, positions, grammars, device),
        allowed=AllowedIds(*of["allowed"]) if of["allowed"] else None,
        bad_words=bad_words,
        bias=LogitBias(*of["bias"]) if of["bias"] else None,
        penalties=Penalties(*of["penalties"]) if of["penalties"] else None,
        truncation=Truncation(*of["truncation"]) if of["truncation"] else None,
    )


def _grammar_mask(
    rows: Sequence[SamplingMetadata], positions: Sequence[int], grammars: Sequence[SlotGrammar | None], device: torch.device
) -> GrammarMask | None:
    found = [(i, grammar) for i, grammar in enumerate(grammars) if grammar is not None]
    if not found:
        return None
    bits_GW = torch.empty(len(found), found[0][1].num_words, dtype=torch.int32)
    for bits_W, (i, grammar) in zip(bits_GW, found, strict=True):
        grammar.write_mask(bits_W, positions[i] - rows[i].prompt_len)
    return GrammarMask(to_device(torch.tensor([i for i, _ in found]), device), to_device(bits_GW, device))


def _allowed(rows: Sequence[SamplingMetadata]) -> Arrays:
    """The fields of `AllowedIds`, or nothing when no row has any."""
    found = [i for i, row in enumerate(rows) if row.allowed]
    return [array("q", found), *_pairs([row.allowed for row in rows])] if found else []


def _bias(rows: Sequence[SamplingMetadata]) -> Arrays:
    """The fields of `LogitBias`, or nothing."""
    row, id, _ = _pairs([of_row.biased for of_row in rows])
    return [row, id, array("f", [value for of_row in rows for _, value in of_row.params.logit_bias])] if row else []


def _pairs(ids: "Sequence[array[int]]") -> "list[array[int]]":
    """(row, id) of each pair, and where each row's pairs end."""
    row, id = array("q"), array("q")
    for i, of_row in enumerate(ids):
        row.extend(array("q", [i]) * len(of_row))
        id.extend(of_row)
    return [row, id, array("q", accumulate(map(len, ids)))]


def _words(words: Sequence[Sequence[Sequence[int]]], longest: int) -> Arrays:
    """The fields of `BadWords`, or nothing."""
    row, last, prefix, length = array("q"), array("q"), array("i"), array("q")
    for i, of_row in enumerate(words):
        row.extend([i] * len(of_row))
        for word in of_row:
            last.append(word[-1])
            prefix.extend([-1] * (longest - len(word)))
            prefix.extend(word[:-1])
            length.append(len(word) - 1)
    return [row, last, prefix, length, array("q", accumulate(map(len, words)))] if row else []


def _penalties(rows: Sequence[SamplingMetadata]) -> Arrays:
    """The fields of `Penalties`, or nothing."""
    found = [i for i, row in enumerate(rows) if row.penalties]
    params = [rows[i].params for i in found]
    columns = [
        array("f", [p.presence_penalty for p in params]),
        array("f", [p.frequency_penalty for p in params]),
        array("f", [p.repetition_penalty for p in params]),
    ]
    return [array("q", found), *columns] if found else []


def _truncation(rows: Sequence[SamplingMetadata]) -> Arrays:
    """The fields of `Truncation`, or nothing."""
    if not any(row.min_p or row.top_k or row.top_p for row in rows):
        return []
    return [
        array("d", [log(row.params.min_p) if row.min_p else -inf for row in rows]),
        array("q", [row.params.top_k if row.top_k else 0 for row in rows]),
        array("d", [row.params.top_p if row.top_p else 1 for row in rows]),
    ]
