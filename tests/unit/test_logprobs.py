"""Log probabilities of the raw logits against float64, under any split."""

from itertools import pairwise

import pytest
import torch

from tpserve.parallel.group import Group
from tpserve.sampler.logits import WrittenLogits
from tpserve.sampler.logprobs import logprobs


class Rank(Group):
    """A rank that knows beforehand what the others will gather: `history[call]` has the ranks' tensors."""

    def __init__(self, rank: int, size: int, history: list[list[torch.Tensor]]) -> None:
        super().__init__()
        self.rank, self.size, self._history, self._call = rank, size, history, 0

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        ranks, self._call = self._history[self._call], self._call + 1
        ranks[self.rank] = x
        return torch.stack([part if part.shape == x.shape else torch.zeros_like(x) for part in ranks])


def sharded(
    x: torch.Tensor, cuts: tuple[int, ...], tokens: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The ranks one after another, as many rounds as there are gathers: in the last round each knows what all others said."""
    shards = tuple(range(a, b) for a, b in pairwise(cuts))
    history = [[torch.empty(0)] * len(shards) for _ in range(2)]
    for _ in range(3):
        for rank, shard in enumerate(shards):
            tp = Rank(rank, len(shards), history)
            result = logprobs(WrittenLogits(x[:, shard.start : shard.stop]), shards, tokens, num_top, tp)
    return result


def rows(count: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocab)
    return torch.randn((count, vocab), generator=generator) * 5, torch.randint(0, vocab, (count,), generator=generator)


@pytest.mark.parametrize("cuts", [(0, 300), (0, 128, 300), (0, 2, 5, 300), (0, 128, 256, 384)], ids=str)
@pytest.mark.parametrize("num_top", [0, 1, 5])
def test_against_float64(cuts: tuple[int, ...], num_top: int) -> None:
    x, tokens = rows(9, cuts[-1])
    chosen, ids, top = sharded(x, cuts, tokens, num_top)
    expected = torch.log_softmax(x.double(), dim=1)
    torch.testing.assert_close(chosen, expected.gather(1, tokens[:, None]).squeeze(1).float(), rtol=1e-6, atol=1e-6)
    best = expected.sort(dim=1, descending=True, stable=True)
    assert torch.equal(ids, best.indices[:, :num_top])
    torch.testing.assert_close(top, best.values[:, :num_top].float(), rtol=1e-6, atol=1e-6)
    assert (chosen.dtype, ids.dtype, top.dtype) == (torch.float32, torch.int64, torch.float32)


def test_equal_logits_come_by_id() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0, -2.0, 3.0, -0.0, 0.0, -1.0]])
    for cuts in ((0, 8), (0, 3, 8), (0, 1, 2, 8)):
        _, ids, _ = sharded(x, cuts, torch.tensor([0]), 8)
        assert ids.tolist() == [[1, 2, 4, 0, 5, 6, 7, 3]]


@pytest.mark.parametrize("num_top", [1, 7, 20])
def test_equal_logits_in_many_blocks_come_by_id(num_top: int) -> None:
    x, tokens = rows(30, 5000)
    x = (x / 4).round() - torch.arange(30)[:, None]
    expected = x.sort(dim=1, descending=True, stable=True).indices[:, :num_top]
    for cuts in ((0, 5000), (0, 1280, 5000), (0, 100, 171, 5000)):
        assert torch.equal(sharded(x, cuts, tokens, num_top)[1], expected)


def test_more_than_the_vocabulary_are_all() -> None:
    x, tokens = rows(2, 3)
    _, ids, top = sharded(x, (0, 1, 3), tokens, 20)
    assert ids.shape == top.shape == (2, 3) and ids.sort(dim=1).values.tolist() == [[0, 1, 2]] * 2


def test_the_split_and_the_batch_do_not_show() -> None:
    x, tokens = rows(17, 5000)
    whole = sharded(x, (0, 5000), tokens, 3)
    for cuts in ((0, 1280, 5000), (0, 128, 2560, 5000)):
        assert all(torch.equal(a, b) for a, b in zip(sharded(x, cuts, tokens, 3), whole, strict=True))
    for n in range(1, 17):
        part = sharded(x[:n], (0, 5000), tokens[:n], 3)
        assert all(torch.equal(a, b[:n]) for a, b in zip(part, whole, strict=True))


def test_huge_logits_do_not_overflow() -> None:
    x = torch.tensor([[3e38, -3e38, 0.0], [1000.0, 1000.0, 1000.0]])
    chosen, _, _ = sharded(x, (0, 1, 3), torch.tensor([0, 2]), 0)
    torch.testing.assert_close(chosen, torch.tensor([0.0, -1.0986123]))
