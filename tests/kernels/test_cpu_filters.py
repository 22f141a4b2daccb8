"""Native filters of logits against their form in torch: equal bits; a row alone as in company."""

import pytest
import torch

from tests.kernels.cpu_isa import few_when_emulated, isa, skip_without_library
from tpserve.sampler import filters as reference
from tpserve_kernels.cpu import filters as native

__all__ = ["few_when_emulated", "isa"]
pytestmark = [skip_without_library, pytest.mark.usefixtures("isa")]
VOCABS = (1, 7, 31, 33, 300, 5003)


def logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    """With ties, zeros of both signs and -inf among them, in rows that are apart."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, vocab + 5, generator=generator) * 4).mul(4).round().div(4)
    x[torch.rand(rows, vocab + 5, generator=generator) < 0.1] = float("-inf")
    x[:, 0] = 1.0
    return x[:, :vocab]


@pytest.mark.parametrize("vocab", VOCABS)
def test_bits_of_a_grammar(vocab: int) -> None:
    x, rows = logits(5, vocab), torch.tensor([0, 2, 4])
    bits = torch.randint(-(2**31), 2**31, (3, -(-vocab // 32) + 1), dtype=torch.int64).int()
    bits[1] = -1
    expected, got = x.clone(), x.clone()
    reference.apply_grammar(expected, reference.GrammarMask(rows, bits))
    native.mask_bits(got, rows, bits)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("vocab", VOCABS)
def test_penalties(vocab: int) -> None:
    x, rows = logits(6, vocab), torch.tensor([5, 1, 2])
    tokens = torch.randint(0, vocab, (6, 40), dtype=torch.int32)
    position, prompt = torch.tensor([40, 3, 17, 40, 0, 25]), torch.tensor([10, 3, 0, 1, 0, 24])
    values = torch.tensor([[0.5, 0.0, -1.5], [0.25, 0.0, 2.0], [1.3, 1.0, 0.7]])
    penalties = reference.Penalties(rows, values[0], values[1], values[2])
    expected, got = x.clone(), x.clone()
    reference.apply_penalties(expected, penalties, tokens, position, prompt)
    native.penalize(got, rows, tokens, position[rows], prompt[rows], (values[0], values[1], values[2]))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("vocab", VOCABS)
def test_truncation(vocab: int) -> None:
    """All at once, one after another, in torch; top-p where no sum lies near its bound."""
    rows = 24
    x, row = logits(rows, vocab, seed=vocab), torch.arange(rows)
    temperature = torch.tensor([0.6, 1.0, 1.7])[row % 3]
    log_min_p = torch.tensor([float("-inf"), -3.0, -0.5], dtype=torch.float64)[row % 3]
    top_k = torch.tensor([0, 1, 5, 40])[row % 4].clamp(max=vocab - 1)
    top_p = torch.tensor([1.0, 0.9, 0.31, 1e-9], dtype=torch.float64)[row // 4 % 4]
    expected, got = x.clone(), x.clone()
    reference.apply_truncation(expected, reference.Truncation(log_min_p, top_k, top_p), temperature)
    native.truncate(got, row, temperature, log_min_p, top_k, top_p)
    assert torch.equal(got, expected)
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for r in (0, 7, rows - 1):
            one, of_row = x[r : r + 1].clone(), slice(r, r + 1)
            native.truncate(one, row[:1], *(each[of_row] for each in (temperature, log_min_p, top_k, top_p)))
            assert torch.equal(one[0], got[r])
    torch.set_num_threads(before)


def test_ties_go_to_the_lowest_ids_and_zeros_are_equal() -> None:
    x = torch.tensor([[0.0, -0.0, 0.0, -1.0, -0.0]])
    none, one = torch.tensor([float("-inf")], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    native.truncate(x, torch.tensor([0]), torch.ones(1), none, torch.tensor([3]), one)
    assert x.isfinite().tolist() == [[True, True, True, False, False]]


def test_a_row_without_any_id_stays() -> None:
    x = torch.full((1, 40), float("-inf"))
    low, half = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    native.truncate(x, torch.tensor([0]), torch.ones(1), low, torch.tensor([3]), half)
    assert x.isneginf().all()
