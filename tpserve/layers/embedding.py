"""Token embedding, its vocabulary split over ranks. T rows, V vocabulary entries of this rank, H channels."""

import torch

from tpserve.parallel.group import Group


def embed(tokens_T: torch.Tensor, weight_VH: torch.Tensor, vocab: range, tp: Group) -> torch.Tensor:
    """Rows of the tokens: [T, H]. Each rank looks up its own entries and gives zeros for the others'."""
    if tp.size == 1:
        return weight_VH[tokens_T]
    foreign_T = (tokens_T < vocab.start) | (tokens_T >= vocab.stop)
    hidden_TH = weight_VH[(tokens_T - vocab.start).masked_fill_(foreign_T, 0)]
    return tp.all_reduce(hidden_TH.masked_fill_(foreign_T.unsqueeze(1), 0))
