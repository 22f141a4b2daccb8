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

Legend: S sampled rows, B blocks, E the 128 ids of a block.
"""

import torch

from tpserve.parallel.group import Group
from tpserve.sampler.logits import Logits, WrittenLogits
from tpserve.sampler.philox import WORD, philox4x32
from tpserve_kernels.cpu import gumbel as native
from tpserve_kernels.cpu.head import BLOCK
from tpserve_kernels.cpu.library import library


def draw(
    logits: Logits,
    shards: tuple[range, ...],
    temperature_S: torch.Tensor,
    seed_S: torch.Tensor,
    position_S: torch.Tensor,
    choice_S: torch.Tensor,
    tp: Group,
    *,
    all_greedy: bool,
) -> torch.Tensor:
    """Draw one token per row: [S] int64, equal on all ranks of `tp`.

    `logits`: of this rank's shard of the vocabulary; `shards`: the ids of every rank, ascending, without gaps.
    `temperature_S`: float32, 0 is greedy. `seed_S`: int64, the bits of an unsigned 64-bit seed. `position_S`: int64, the
    position of the drawn token. `choice_S`: int64, the index among the request's n choices.
    `all_greedy`: the caller knows that every temperature is 0; then no random number is computed.
    """
    first = shards[tp.rank].start
    if all_greedy:
        best = logits.blocks(None)
        return _winner(best.best_S.double(), best.best_id_S + first, tp)
    aligned = all(shard.start % BLOCK == 0 for shard in shards)
    if not aligned:
        logits, first = WrittenLogits(gather_logits(logits.written(), shards, tp)), 0
    value_S, token_S = _draw_rows(logits, temperature_S, seed_S, position_S, choice_S, first=first)
    return _winner(value_S, token_S, tp) if aligned else token_S


def gumbel(
    id_SN: torch.Tensor, seed_S: torch.Tensor, position_S: torch.Tensor, choice_S: torch.Tensor, level: int
) -> torch.Tensor:
    """Standard Gumbel noise, float64 [S, N], one per id (int64): -log(-log u), u the middle of one of 2**23 equal steps.

    The CPU library's form may differ from torch's in the last bit; the ranks of a stage have the same form.
    """
    if not id_SN.is_cuda and library() is not None:
        return native.gumbel(id_SN, seed_S, position_S, choice_S, level)
    return gumbel_reference(id_SN, seed_S, position_S, choice_S, level)


def gumbel_reference(
    id_SN: torch.Tensor, seed_S: torch.Tensor, position_S: torch.Tensor, choice_S: torch.Tensor, level: int
) -> torch.Tensor:
    """`gumbel` in torch."""
    counter = (id_SN, position_S[:, None], choice_S[:, None], torch.full_like(choice_S, level)[:, None])
    bits_SN = philox4x32(counter, (seed_S[:, None] & WORD, (seed_S[:, None] >> 32) & WORD))[0]
    u_SN = ((bits_SN >> 9).double() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u_SN))


def _draw_rows(
    logits: Logits,
    temperature_S: torch.Tensor,
    seed_S: torch.Tensor,
    position_S: torch.Tensor,
    choice_S: torch.Tensor,
    *,
    first: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best (value, token) of each row in this shard. Values are comparable between shards of one row only."""
    greedy_S = temperature_S == 0
    scale64_S1 = torch.where(greedy_S, 1.0, temperature_S).double()[:, None]
    blocks, device = logits.blocks(temperature_S), temperature_S.device
    lse_SB = blocks.top_SB.double() / scale64_S1 + blocks.sum_SB.log()
    block_B = torch.arange(lse_SB.shape[1], device=device) + first // BLOCK
    value_SB = lse_SB + gumbel(block_B[None], seed_S, position_S, choice_S, level=0)
    value_S, block_S = value_SB.max(dim=1)

    id_SE = block_S[:, None] * BLOCK + torch.arange(first, first + BLOCK, device=device)
    inside_SE = logits.block(block_S).double() / scale64_S1 + gumbel(id_SE, seed_S, position_S, choice_S, level=1)
    token_S = id_SE.gather(1, inside_SE.argmax(dim=1, keepdim=True)).squeeze(1)

    return (
        torch.where(greedy_S, blocks.best_S.double(), value_S),
        torch.where(greedy_S, blocks.best_id_S + first, token_S),
    )


def _winner(value_S: torch.Tensor, token_S: torch.Tensor, tp: Group) -> torch.Tensor:
    """The token of the highest value over the shards of each row. The first shard, with the lowest ids, wins ties.

    Ids travel as float64, which holds them exactly.
    """
    if tp.size == 1:
        return token_S
    value_PS, token_PS = tp.all_gather(torch.stack((value_S, token_S.double()))).unbind(1)
    return token_PS.gather(0, value_PS.argmax(dim=0)[None]).squeeze(0).long()


def gather_logits(logits_SV: torch.Tensor, shards: tuple[range, ...], tp: Group) -> torch.Tensor:
    """The logits of the whole vocabulary, [S, all ids], a copy. Shards are padded to the largest for the all-gather."""
    if tp.size == 1:
        return logits_SV.clone()
    widest = max(len(shard) for shard in shards)
    parts_PSV = tp.all_gather(torch.nn.functional.pad(logits_SV, (0, widest - logits_SV.shape[1])))
    return torch.cat([part[:, : len(shard)] for part, shard in zip(parts_PSV, shards, strict=True)], dim=1)
