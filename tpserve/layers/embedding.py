"""Token embedding, its vocabulary split over ranks (Megatron-LM, Shoeybi et al. 2019, arXiv:1909.08053)."""

import torch

from tpserve.parallel.group import Group
from tpserve.quant.packed import Table


def embed(tokens_T: torch.Tensor, weight_VH: Table, vocab: range, tp: Group) -> torch.Tensor:
    """The embeddings of T tokens, [T, H] in the dtype of `weight`, equal on all ranks of `tp`.

    `tokens_T`: int64 ids of the whole vocabulary. `weight_VH`: the rows `vocab` of the table. A rank gives zeros for the tokens
    of other ranks, and an all-reduce adds up.
    """
    if tp.size == 1:
        return _rows(weight_VH, tokens_T)
    remote_T = (tokens_T < vocab.start) | (tokens_T >= vocab.stop)
    hidden_TH = _rows(weight_VH, (tokens_T - vocab.start).masked_fill_(remote_T, 0))
    return tp.all_reduce(hidden_TH.masked_fill_(remote_T.unsqueeze(1), 0))


def _rows(weight_VH: Table, ids_T: torch.Tensor) -> torch.Tensor:
    return weight_VH[ids_T] if isinstance(weight_VH, torch.Tensor) else weight_VH.rows(ids_T)
