"""Natural log probabilities (nats) of the raw logits, before temperature, filters and penalties. Keeps no state.

The ranks first agree on the maximum of each row. Then each rank reduces its vocabulary shard to (sum of exponentials, logit of
the chosen token, best n tokens), and one all-gather of those gives every rank the result. Exponentials are relative to the
maximum and summed as integers, which is exact in any order, so the result does not depend on shards, batch or threads. On a card
three launches of `tpserve_kernels.logprobs` do the same; their exponentials may differ from torch's in the last bit.

Legend: S rows, V vocabulary ids of this rank in B blocks of E, P ranks, n most likely tokens.
"""

import torch

from tpserve.parallel.group import Group
from tpserve.sampler.logits import CardLogits, Logits

BLOCK = 128
"""Vocabulary ids per block of the search for the n best."""
NO_KEY = -(1 << 63)
"""A key below every real one, for padding."""
MASS_ONE = 2.0**40
"""An exponential of 1 as an integer: sums over 2**22 ids fit in 64 bits."""


def logprobs(
    logits: Logits, shards: tuple[range, ...], tokens_S: torch.Tensor, num_top: int, tp: Group
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (chosen_S, top_ids_Sn, top_Sn): float32, int64, float32; best first, ties by id; n = min(num_top, vocabulary).

    `logits`: of this rank's shard; `shards`: the ids of every rank. `tokens_S`: int64, the drawn tokens.
    """
    if isinstance(logits, CardLogits):
        return _on_card(logits, shards, tokens_S, num_top, tp)
    logits_SV, shard = logits.written(), shards[tp.rank]
    top_S = tp.all_gather(logits_SV.amax(dim=1)).amax(dim=0)
    mass_S = (logits_SV - top_S[:, None]).exp_().double().mul_(MASS_ONE).round_().long().sum(dim=1)
    inside_S = (tokens_S >= shard.start) & (tokens_S < shard.stop)
    index_S = (tokens_S - shard.start).clamp(0, len(shard) - 1)
    chosen_S = torch.where(inside_S, logits_SV.gather(1, index_S[:, None]).squeeze(1), float("-inf"))
    numbers_S2 = torch.stack((mass_S, chosen_S.double().view(torch.int64)), dim=1)
    keys_Sn = _best_keys(logits_SV, shard.start, num_top)

    parts_PSN = tp.all_gather(torch.cat((numbers_S2, keys_Sn), dim=1))
    chosen_PS = parts_PSN[:, :, 1].contiguous().view(torch.float64)
    lse_S = top_S.double() + (parts_PSN[:, :, 0].sum(dim=0).double() / MASS_ONE).log()
    keys_SN = parts_PSN[:, :, 2:].transpose(0, 1).flatten(1)
    best_Sn = keys_SN.topk(min(num_top, shards[-1].stop), dim=1).values
    ids_Sn, values_Sn = _unkey(best_Sn)
    return (chosen_PS.amax(dim=0) - lse_S).float(), ids_Sn, (values_Sn.double() - lse_S[:, None]).float()


def _on_card(
    logits: CardLogits, shards: tuple[range, ...], tokens_S: torch.Tensor, num_top: int, tp: Group
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from tpserve_kernels import logprobs as kernels

    first, num_parts = shards[tp.rank].start, -(-max(len(shard) for shard in shards) // kernels.PART)
    keys_PSCn = tp.all_gather(kernels.best_keys(logits.raw, first, num_parts, num_top))
    masses_PSC2 = tp.all_gather(kernels.masses(logits.raw, first, tokens_S, keys_PSCn))
    return kernels.from_parts(keys_PSCn, masses_PSC2, min(num_top, shards[-1].stop))


def _best_keys(logits_SV: torch.Tensor, first: int, num_top: int) -> torch.Tensor:
    """The n largest logits as integers that sort by (logit, lowest id first): [S, num_top] int64, padded with NO_KEY.

    They are in the n blocks with the largest maxima (of equal maxima, the first blocks), so only these are searched.
    """
    num_rows, width = logits_SV.shape
    if not num_top:
        return logits_SV.new_empty((num_rows, 0), dtype=torch.int64)
    padded_SV = torch.nn.functional.pad(logits_SV, (0, -width % BLOCK), value=float("-inf")) if width % BLOCK else logits_SV
    blocks_SBE = padded_SV.view(num_rows, -1, BLOCK)
    ids_V = torch.arange(first, first + padded_SV.shape[1], device=logits_SV.device)
    block_keys_SB = _key(blocks_SBE.amax(dim=2), ids_V[: blocks_SBE.shape[1]] - first)
    block_Sn, _ = _unkey(block_keys_SB.topk(min(num_top, blocks_SBE.shape[1]), dim=1).values)
    near_SnE = blocks_SBE.gather(1, block_Sn[:, :, None].expand(-1, -1, BLOCK))
    keys_Sn = _key(near_SnE, ids_V.view(-1, BLOCK)[block_Sn]).flatten(1).topk(min(num_top, width), dim=1).values
    return torch.nn.functional.pad(keys_Sn, (0, num_top - keys_Sn.shape[1]), value=NO_KEY)


def _key(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64 keys that sort by (logit, lowest id first).

    The upper half is the float32's bits, the magnitude flipped for negatives, so that they sort as an integer. The lower half is
    the complement of the id.
    """
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal 0.0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32 | (0xFFFFFFFF - ids)


def _unkey(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The (id, logit) of each key: the inverse of `_key`."""
    bits = (keys >> 32).int()
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF), (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
