"""Sampling: logits become tokens. Owns the mapping (logits, temperature, seed, position, choice) -> token; keeps no state.

A two-level Gumbel-max draw (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030) over blocks of 128 vocabulary ids. With
independent standard Gumbel noise G, argmax of z + G is a sample of softmax(z), and so is

    block = argmax over blocks of LSE(z in the block) + G(block, level 0)
    token = argmax inside that block of z + G(token, level 1)                 z = logits / temperature

which needs one random number per block and 128 more, instead of one per token. G comes from Philox with key = seed and
counter = (block or token id, position, choice, level). Ties go to the lowest id. Temperature 0 is the argmax of the logits.

Exactness. A row's token depends on that row alone: maxima are exact, sums are exact in any order (`Blocks.sum_SB`), everything
else is elementwise. So a vocabulary shard of whole blocks finds the same best block and token as the whole vocabulary would,
and the best of the gathered (value, id) pairs is the unsharded draw, bit for bit. With shards that start inside a block (tiny
vocabularies) each rank gathers the logits and draws from all of them.

On a card two launches of `tpserve_kernels.draw` do all of it, and a third one picks among the shards. There, exponentials and
logarithms consist of additions and multiplications whose bits no device changes. Those of the CPU may differ in the last bit;
the noise of the library of CPU kernels does not.

Legend: S sampled rows, B blocks, E the 128 ids of a block, X slots, L positions of a slot.
"""

from typing import NamedTuple

import torch

from tpserve.parallel.group import Group
from tpserve.sampler.logits import CardLogits, HostLogits, Logits, WrittenLogits
from tpserve_kernels.cpu import gumbel as native
from tpserve_kernels.cpu.head import BLOCK
from tpserve_kernels.cpu.library import library
from tpserve_kernels.philox import WORD, philox4x32
from tpserve_kernels.sampler_types import DrawTarget, Noise, RawLogits


class DrawParams(NamedTuple):
    """What a draw depends on beside the logits."""

    temperature_S: torch.Tensor
    """float32, 0 is greedy"""
    seed_S: torch.Tensor
    """int64, the bits of an unsigned 64-bit seed"""
    position_S: torch.Tensor
    """int64: the position of the drawn token"""
    choice_S: torch.Tensor
    """int64: the index among the request's n choices"""
    some_greedy: bool = True
    """False: the caller knows that every temperature is positive."""

    @property
    def counters(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What makes the random numbers of a row its own."""
        return self.seed_S, self.position_S, self.choice_S


def draw_rows(
    logits: Logits, shards: tuple[range, ...], params: DrawParams, tp: Group, target: DrawTarget, *, all_greedy: bool = False
) -> None:
    """Draw one token per row into `target`, equal on all ranks of `tp`.

    `logits`: of this rank's shard of the vocabulary; `shards`: the ids of every rank, ascending, without gaps. `params`: columns
    without gaps. On a card no launch depends on the values of a tensor, so that a graph may capture all of it. There a row whose
    slot is negative is padding: nothing is written for it. `all_greedy`: the caller knows that every temperature is 0; then the
    CPU computes no random number.
    """
    if isinstance(logits, CardLogits):
        _draw_on_card(logits, shards, params, tp, target)
        return
    token_S = draw(logits, shards, None if all_greedy else params, tp)
    target.out_S.copy_(token_S)
    if target.tokens_XL is not None:
        target.tokens_XL[target.slot_S, params.position_S] = token_S.int()


def _draw_on_card(logits: CardLogits, shards: tuple[range, ...], params: DrawParams, tp: Group, target: DrawTarget) -> None:
    from tpserve_kernels import draw as kernels

    noise = Noise(params.temperature_S, *params.counters)
    if tp.size == 1:
        kernels.draw(logits.raw, noise, target)
    elif all(shard.start % BLOCK == 0 for shard in shards):
        best_PS2 = tp.all_gather(kernels.best(logits.raw, noise, shards[tp.rank].start, target.slot_S))
        kernels.pick(best_PS2, noise.position_S, target)
    else:
        values_SV, scale, cap = logits.raw
        kernels.draw(RawLogits(gather_logits(values_SV, shards, tp), scale, cap), noise, target)


def draw(logits: HostLogits, shards: tuple[range, ...], params: DrawParams | None, tp: Group) -> torch.Tensor:
    """`draw_rows` on the CPU: [S] int64. `params`: None when every temperature is 0."""
    first = shards[tp.rank].start
    if params is None:
        best = logits.blocks(None)
        return _winner(best.best_S, best.best_id_S + first, tp)
    aligned = all(shard.start % BLOCK == 0 for shard in shards)
    if not aligned:
        logits, first = WrittenLogits(gather_logits(logits.written(), shards, tp)), 0
    value_S, token_S = _draw_shard(logits, params, first)
    return _winner(value_S, token_S, tp) if aligned else token_S


def gumbel_max(
    x_SN: torch.Tensor, sum_SN: torch.Tensor | None, params: DrawParams, first: int, first_S: torch.Tensor | None, level: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest x / temperature + log(sum) + G(id, level) of each row, float64 [S], and its lowest index n, int64 [S].

    `x_SN`: float32; `sum_SN`: float64, None for no logarithm; the id of number n is first + first_S + n. Temperature 0 counts
    as 1. The CPU library's noise may differ from torch's in the last bit; the ranks of a stage have the same form.
    """
    if library() is None:
        return gumbel_max_reference(x_SN, sum_SN, params, first, first_S, level)
    return native.gumbel_max(x_SN, sum_SN, params.temperature_S, params.counters, first, first_S, level)


def gumbel_max_reference(
    x_SN: torch.Tensor, sum_SN: torch.Tensor | None, params: DrawParams, first: int, first_S: torch.Tensor | None, level: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gumbel_max` in torch."""
    temperature_S = params.temperature_S
    value_SN = x_SN.double() / torch.where(temperature_S == 0, 1.0, temperature_S).double()[:, None]
    if sum_SN is not None:
        value_SN += sum_SN.log()
    id_SN = torch.arange(first, first + x_SN.shape[1], device=x_SN.device)[None]
    if first_S is not None:
        id_SN = id_SN + first_S[:, None]
    best = (value_SN + gumbel(id_SN, *params.counters, level)).max(dim=1)
    return best.values, best.indices


def gumbel(
    id_SN: torch.Tensor, seed_S: torch.Tensor, position_S: torch.Tensor, choice_S: torch.Tensor, level: int
) -> torch.Tensor:
    """Standard Gumbel noise, float64 [S, N], one per id (int64): -log(-log u), u the middle of one of 2**23 equal steps."""
    counter = (id_SN, position_S[:, None], choice_S[:, None], torch.full_like(choice_S, level)[:, None])
    bits_SN = philox4x32(counter, (seed_S[:, None] & WORD, (seed_S[:, None] >> 32) & WORD))[0]
    u_SN = ((bits_SN >> 9).double() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u_SN))


def _draw_shard(logits: HostLogits, params: DrawParams, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best (value, token) of each row in this shard. Values are comparable between shards of one row only."""
    blocks = logits.blocks(params.temperature_S)
    value_S, block_S = gumbel_max(blocks.top_SB, blocks.sum_SB, params, first // BLOCK, None, level=0)
    first_S = block_S * BLOCK
    token_S = gumbel_max(logits.block(block_S), None, params, first, first_S, level=1)[1] + first_S
    if params.some_greedy:
        greedy_S = params.temperature_S == 0
        value_S = torch.where(greedy_S, blocks.best_S.double(), value_S)
        token_S = torch.where(greedy_S, blocks.best_id_S, token_S)
    return value_S, token_S + first


def _winner(value_S: torch.Tensor, token_S: torch.Tensor, tp: Group) -> torch.Tensor:
    """The token of the highest value over the shards of each row. The first shard, with the lowest ids, wins ties.

    Ids travel as float64, which holds them exactly.
    """
    if tp.size == 1:
        return token_S
    value_PS, token_PS = tp.all_gather(torch.stack((value_S.double(), token_S.double()))).unbind(1)
    return token_PS.gather(0, value_PS.argmax(dim=0)[None]).squeeze(0).long()


def gather_logits(logits_SV: torch.Tensor, shards: tuple[range, ...], tp: Group) -> torch.Tensor:
    """The logits of the whole vocabulary, [S, all ids], a copy. Shards are padded to the largest for the all-gather."""
    if tp.size == 1:
        return logits_SV.clone()
    missing = max(len(shard) for shard in shards) - logits_SV.shape[1]
    parts_PSV = tp.all_gather(torch.nn.functional.pad(logits_SV, (0, missing)) if missing else logits_SV)
    return torch.cat([part[:, : len(shard)] for part, shard in zip(parts_PSV, shards, strict=True)], dim=1)
