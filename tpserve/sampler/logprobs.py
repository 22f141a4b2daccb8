"""Natural log probabilities of the raw logits: before temperature and everything else that shapes the draw. Keeps no state.

Each rank reduces its share of the vocabulary to (sum of exponentials, the chosen token's logit, its best n), after all have
agreed on the row's maximum; one gather of those gives every rank the result. Exponentials are relative to that maximum and
summed in float64, and the result is rounded to float32, so that neither the split nor the batch shows in it.

Legend: S rows, V vocabulary ids of this rank, P ranks, n most likely tokens.
"""

import torch

from tpserve.parallel.group import Group

NO_KEY = -(1 << 63)


def logprobs(
    logits_SV: torch.Tensor, shards: tuple[range, ...], tokens_S: torch.Tensor, num_top: int, tp: Group
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (chosen_S, top_ids_Sn, top_Sn): float32, int64, float32; best first, equal ones by id; n <= vocabulary size.

    `logits_SV`: float32, this rank's share; `shards`: every rank's. `tokens_S`: the drawn tokens, ids of the whole vocabulary.
    """
    shard = shards[tp.rank]
    top_S = tp.all_gather(logits_SV.amax(dim=1)).amax(dim=0)
    mass_S = (logits_SV - top_S[:, None]).exp_().sum(dim=1, dtype=torch.float64)
    inside_S = (tokens_S >= shard.start) & (tokens_S < shard.stop)
    index_S = (tokens_S - shard.start).clamp(0, len(shard) - 1)
    chosen_S = torch.where(inside_S, logits_SV.gather(1, index_S[:, None]).squeeze(1), float("-inf"))
    numbers_S2 = torch.stack((mass_S, chosen_S.double()), dim=1)
    keys_Sn = _best_keys(logits_SV, shard.start, num_top)

    parts_PSN = tp.all_gather(torch.cat((numbers_S2.view(torch.int64), keys_Sn), dim=1))
    mass_PS, chosen_PS = parts_PSN[:, :, :2].contiguous().view(torch.float64).unbind(2)
    lse_S = top_S.double() + mass_PS.sum(dim=0).log()
    keys_SN = parts_PSN[:, :, 2:].transpose(0, 1).flatten(1)
    best_Sn = keys_SN.topk(min(num_top, shards[-1].stop), dim=1).values
    ids_Sn, values_Sn = _unkey(best_Sn)
    return (chosen_PS.amax(dim=0) - lse_S).float(), ids_Sn, (values_Sn.double() - lse_S[:, None]).float()


def _best_keys(logits_SV: torch.Tensor, first: int, num_top: int) -> torch.Tensor:
    """The n largest logits as integers that sort by (logit, lowest id first): [S, num_top] int64, padded with NO_KEY.

    A float32's bits, the magnitude flipped where negative, sort as an integer; the id's complement fills the lower half.
    """
    width = logits_SV.shape[1]
    if not num_top:
        return logits_SV.new_empty((len(logits_SV), 0), dtype=torch.int64)
    ids_V = torch.arange(first, first + width, device=logits_SV.device)
    keys_Sn = _key(logits_SV, ids_V).topk(min(num_top, width), dim=1).values
    return torch.nn.functional.pad(keys_Sn, (0, num_top - keys_Sn.shape[1]), value=NO_KEY)


def _key(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal 0.0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32 | (0xFFFFFFFF - ids)


def _unkey(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    bits = (keys >> 32).int()
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF), (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
