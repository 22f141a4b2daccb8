"""The sampler's kernels against their references and against the sampler's functions in torch: equal bits, whatever the batch."""

from itertools import pairwise

import pytest
import torch

from tests.kernels.device import DEVICE
from tpserve.parallel.group import Group
from tpserve.sampler import filters
from tpserve.sampler.draw import DrawParams, draw_rows, gumbel
from tpserve.sampler.logits import CardLogits, WrittenLogits
from tpserve.sampler.logprobs import logprobs
from tpserve_kernels import draw as drawing
from tpserve_kernels import logprobs as scoring
from tpserve_kernels import masks
from tpserve_kernels.arithmetic import exp32_reference, finish_reference, log64_reference
from tpserve_kernels.logits import write_logits
from tpserve_kernels.sampler_types import DrawTarget, Noise, RawLogits, Sequences
from tpserve_kernels.truncate import truncate, truncate_reference

OUT = float("-inf")


def random(rows: int, vocab: int, *, ties: bool = False, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows that are apart in memory, with some of -inf among them, in the first row nothing else."""
    generator = torch.Generator().manual_seed(vocab)
    x = torch.randn(rows, vocab + 3, generator=generator) * 4
    if ties:
        x = x.mul(4).round().div(4)
    x[torch.rand(rows, vocab + 3, generator=generator) < 0.1] = OUT
    x[1:, 0] = -0.0
    x[0] = OUT
    return x.to(DEVICE, dtype)[:, :vocab]


def noise(rows: int, temperatures: tuple[float, ...] = (0.7, 0.0, 1.0, 1.9, 1e-30)) -> Noise:
    generator = torch.Generator().manual_seed(5)
    return Noise(
        torch.tensor(temperatures)[torch.arange(rows) % len(temperatures)].to(DEVICE),
        torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator).to(DEVICE),
        torch.randint(0, 50, (rows,), generator=generator).to(DEVICE),
        torch.randint(0, 4, (rows,), generator=generator).to(DEVICE),
    )


def drawn(logits: RawLogits, of: Noise) -> torch.Tensor:
    out_S = torch.empty(len(logits.values_SV), dtype=torch.int64, device=DEVICE)
    drawing.draw(logits, of, DrawTarget(out_S))
    return out_S


def test_exponentials_and_logarithms_are_those_of_torch_but_for_the_last_bits() -> None:
    x = torch.linspace(-90, 90, 20_001)
    torch.testing.assert_close(exp32_reference(x), x.exp(), rtol=3e-7, atol=1e-37)
    y = torch.linspace(1e-8, 200, 20_001, dtype=torch.float64)
    torch.testing.assert_close(log64_reference(y), y.log(), rtol=3e-16, atol=1e-17)
    ends = torch.tensor([OUT, -OUT, float("nan"), 0.0])
    assert torch.equal(exp32_reference(ends).nan_to_num(7.0), ends.exp().nan_to_num(7.0))
    torch.testing.assert_close(finish_reference(x, 0.5, 30.0), 30 * (x * 0.5 / 30).tanh(), rtol=0, atol=1e-5)
    of, ids = noise(9), torch.arange(200, device=DEVICE)[None]
    torch.testing.assert_close(drawing.gumbel_reference(ids, of, 1), gumbel(ids, *of[1:], 1), rtol=3e-15, atol=1e-15)


@pytest.mark.parametrize(
    ("rows", "vocab", "dtype", "cap"),
    [
        (6, 300, torch.float32, None),
        (3, 1, torch.float32, None),
        (4, 4500, torch.bfloat16, 30.0),
        (3, 130_001, torch.float16, None),
    ],
)
def test_a_draw_is_its_reference(rows: int, vocab: int, dtype: torch.dtype, cap: float | None) -> None:
    """Tokens and values bit for bit; padding rows are left alone; a row alone draws as in company."""
    logits, of = RawLogits(random(rows, vocab, ties=True, dtype=dtype), 0.7, cap), noise(rows)
    value_S, token_S = drawing.best_reference(logits, of, 0)
    slot_S = (torch.arange(rows) + 1).to(DEVICE)
    slot_S[1] = -1
    out_S, tokens_XL = (torch.full(shape, -7, dtype=torch.int32, device=DEVICE) for shape in ((rows,), (rows + 2, 50)))
    drawing.draw(logits, of, DrawTarget(out_S, slot_S, tokens_XL))
    token_S[1] = -7
    assert torch.equal(out_S.long(), token_S)
    expected_XL = torch.full_like(tokens_XL, -7)
    expected_XL[slot_S, of.position_S] = token_S.int()
    expected_XL[-1] = -7  # where a negative slot would be written
    assert torch.equal(tokens_XL, expected_XL)
    best_S2 = drawing.best(logits, of, 0, slot_S)
    real_S = slot_S >= 0
    assert torch.equal(best_S2[real_S, 0], value_S[real_S]) and torch.equal(best_S2[real_S, 1].long(), token_S[real_S])
    alone = RawLogits(logits.values_SV[2:3], 0.7, cap)
    assert torch.equal(drawn(alone, Noise(*(x[2:3] for x in of))), token_S[2:3])


def test_greedy_rows_are_the_lowest_id_of_the_largest() -> None:
    x = random(4, 1000, ties=True)
    assert torch.equal(drawn(RawLogits(x), noise(4, (0.0,))), x.argmax(dim=1))


@pytest.mark.parametrize("cuts", [(0, 128, 300), (0, 384, 512, 513)], ids=str)
def test_shards_of_whole_blocks_draw_what_the_whole_draws(cuts: tuple[int, ...]) -> None:
    x, of = random(5, cuts[-1]), noise(5)
    parts = [drawing.best(RawLogits(x[:, first:end]), of, first) for first, end in pairwise(cuts)]
    slot_S = torch.tensor([2, -1, 0, 1, 3], device=DEVICE)
    out_S, tokens_XL = torch.full((5,), -7, device=DEVICE), torch.zeros(4, 50, dtype=torch.int32, device=DEVICE)
    drawing.pick(torch.stack(parts), of.position_S, DrawTarget(out_S, slot_S, tokens_XL))
    expected_S = drawing.best_reference(RawLogits(x), of, 0)[1]
    expected_S[1] = -7
    real_S = slot_S >= 0
    assert torch.equal(out_S, expected_S)
    assert torch.equal(tokens_XL[slot_S[real_S], of.position_S[real_S]].long(), expected_S[real_S])


@pytest.mark.parametrize(("vocab", "ties"), [(1, False), (300, True), (5003, False)])
def test_truncation(vocab: int, ties: bool) -> None:
    """All three at once are the reference, and the functions of the sampler one after another; a row alone is the same."""
    rows = 9
    x, row = random(rows, vocab, ties=ties), torch.arange(rows)
    of_rows = (
        torch.tensor([0.6, 1.0, 1.7])[row % 3].to(DEVICE),
        torch.tensor([-3.0, OUT, -0.5, OUT], dtype=torch.float64)[row % 4].to(DEVICE),
        torch.tensor([0, 1, 40, 5, 0])[row % 5].clamp(max=vocab - 1).to(DEVICE),
        torch.tensor([0.9, 1.0, 0.31, 0.6, 1e-9, 0.999, 1.0], dtype=torch.float64)[row % 7].to(DEVICE),
    )
    expected, by_filters, got = x.clone(), x.clone(), x.clone()
    truncate_reference(expected, *of_rows)
    filters.apply_truncation(by_filters[1:], filters.Truncation(*(each[1:] for each in of_rows[1:])), of_rows[0][1:])
    truncate(got, *of_rows)
    assert torch.equal(got, expected) and torch.equal(got[1:], by_filters[1:])
    alone = x[5:6].clone()
    truncate(alone, *(each[5:6] for each in of_rows))
    assert torch.equal(alone[0], got[5])


def test_thresholds_of_numbers_of_all_sizes() -> None:
    """Extremes, denormal numbers and gaps neither stop the search nor mislead it."""
    x = torch.tensor([[3e38, 1e30, 5.0, 1e-40, 0.0, -0.0, -1e-42, -2.0, -3e38, OUT]], device=DEVICE)
    none = torch.tensor([OUT], dtype=torch.float64, device=DEVICE)
    for k in range(1, 10, 2):
        got = x.clone()
        truncate(got, torch.ones(1, device=DEVICE), none, torch.tensor([k], device=DEVICE), -none)
        assert got.isfinite().nonzero()[:, 1].tolist() == list(range(k))


@pytest.fixture
def sequences() -> Sequences:
    generator = torch.Generator().manual_seed(1)
    tokens_XL = torch.randint(0, 40, (6, 70), generator=generator, dtype=torch.int32)
    return Sequences(*(x.to(DEVICE) for x in (
        tokens_XL, torch.tensor([5, 0, 3, 2, 1]), torch.tensor([70, 3, 17, 40, 6]), torch.tensor([10, 3, 0, 39, 2])
    )))  # fmt: skip


def assert_equal_to_reference(name: str, x: torch.Tensor, *arguments: object) -> torch.Tensor:
    expected, got = x.clone(), x.clone()
    getattr(masks, name + "_reference")(expected, *arguments)
    getattr(masks, name)(got, *arguments)
    assert torch.equal(got, expected)
    return got


@pytest.mark.parametrize("vocab", [41, 5003])
def test_masks_bias_and_penalties(vocab: int, sequences: Sequences) -> None:
    x = random(5, vocab)
    rows = torch.tensor([4, 0, 2], device=DEVICE)
    bits = torch.randint(-(2**31), 2**31, (3, -(-vocab // 32) + 1), dtype=torch.int64).int().to(DEVICE)
    assert_equal_to_reference("mask_bits", x, rows, bits)
    values = torch.tensor([[0.5, 0.0, -1.5], [0.25, 0.0, 2.0], [1.3, 1.0, 0.7]], device=DEVICE)
    penalized = assert_equal_to_reference("penalize", x, rows, *values, sequences)
    in_torch = x.clone()
    tokens_RL = sequences.tokens_XL[sequences.slot_R]
    filters.apply_penalties(in_torch, filters.Penalties(rows, *values), tokens_RL, sequences.position_R, sequences.prompt_R)
    assert torch.equal(penalized, in_torch)
    row_N = torch.tensor([1, 1, 3], device=DEVICE)
    biased = assert_equal_to_reference(
        "add_bias", x, row_N, torch.tensor([0, 40, 40], device=DEVICE), torch.tensor([1.0, -2.0, 9.0], device=DEVICE)
    )
    assert biased[1, 0] == 1.0
    first = 32 if vocab < 100 else 4096
    part = x[:, first:].contiguous()
    masked = assert_equal_to_reference("mask_bits", part, rows, bits[:, first // 32 :])
    assert torch.equal(masked, assert_equal_to_reference("mask_bits", x, rows, bits)[:, first:])
    assert torch.equal(assert_equal_to_reference("penalize", part, rows, *values, sequences, first), penalized[:, first:])
    pairs = row_N, torch.tensor([0, 40, 40], device=DEVICE) + (first - 32), torch.tensor([1.0, -2.0, 9.0], device=DEVICE)
    biased = assert_equal_to_reference("add_bias", x, *pairs)
    assert torch.equal(assert_equal_to_reference("add_bias", part, *pairs, first), biased[:, first:])


def test_allowed_ids_and_banned_words_leave_something(sequences: Sequences) -> None:
    """Rows without any, with some that are left, and with none that would be."""
    x = random(5, 300)
    x[1, [3, 4]], x[2, [7, 8]], x[4, 30:] = OUT, 1.0, OUT
    ids, ends = torch.tensor([5, 3, 4, 7, 8, 7]), torch.tensor([1, 3, 6, 6, 6])
    got = assert_equal_to_reference("allow", x, ids.to(DEVICE), ends.to(DEVICE))
    assert torch.equal(got[1], x[1]) and got[2].isfinite().nonzero().flatten().tolist() == [7, 8]

    own = sequences.tokens_XL[sequences.slot_R[4]].tolist()
    words = [((), 9), ((), 9), (tuple(own[4:6]), 11), (tuple(own[3:6]), 12), (tuple(own[1:6]), 13), ((own[5],), 14)]
    words = [((own[5] + 1,), 3), *words, *(((), last) for last in range(1, 300))]  # of row 0, row 4, and all ids of the last
    longest = max(len(prefix) for prefix, _ in words)
    columns = (
        torch.tensor([last for _, last in words]),
        torch.tensor([(-1,) * (longest - len(prefix)) + prefix for prefix, _ in words], dtype=torch.int32),
        torch.tensor([len(prefix) for prefix, _ in words]),
    )
    order = Sequences(sequences.tokens_XL, *(of[[0, 4, 1, 2, 3]] for of in sequences[1:]))
    y = x[[0, 4, 1, 2, 3]].contiguous()
    y[2, 0] = OUT
    words_on = [column.to(DEVICE) for column in columns]
    got = assert_equal_to_reference(
        "ban", y, *words_on, torch.tensor([1, 7, len(words), len(words), len(words)]).to(DEVICE), order
    )
    assert torch.equal(got[2], y[2]) and got[1, [9, 11, 12, 14]].isinf().all()


@pytest.mark.parametrize(
    ("vocab", "num_top", "cuts"), [(300, 5, (0, 300)), (9001, 20, (0, 128, 9001)), (3, 20, (0, 1, 3)), (300, 0, (0, 300))]
)
def test_logprobs(vocab: int, num_top: int, cuts: tuple[int, ...]) -> None:
    """Of shards and of the whole: bits of the reference, and numbers of the sampler's function in torch."""
    x = random(4, vocab, ties=True)[1:]
    token_S = torch.tensor([0, vocab - 1, vocab // 2], device=DEVICE)
    x[1, vocab - 1] = x[2, vocab // 2] = 1.0
    most = min(num_top, vocab)
    num_parts = max(-(-(end - first) // scoring.PART) for first, end in pairwise(cuts))
    shards = [(RawLogits(x[:, first:end], 0.5, 30.0), first) for first, end in pairwise(cuts)]
    keys_PSCn = torch.stack([scoring.best_keys(of, first, num_parts, num_top) for of, first in shards])
    masses_PSC2 = torch.stack([scoring.masses(of, first, token_S, keys_PSCn) for of, first in shards])
    got = scoring.from_parts(keys_PSCn, masses_PSC2, most)
    whole = RawLogits(x, 0.5, 30.0)
    for one, other in zip(got, scoring.logprobs_reference(whole, token_S, num_top), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    in_torch = logprobs(WrittenLogits(finish_reference(*whole)), (range(vocab),), token_S, num_top, Group())
    assert torch.equal(got[1], in_torch[1])
    torch.testing.assert_close((got[0], got[2]), (in_torch[0], in_torch[2]), rtol=3e-6, atol=1e-6)
    assert torch.equal(write_logits(whole), finish_reference(*whole))


class InTurn(Group):
    """A rank whose peers run before and after it: `gathered[call]` has what each has passed to a call of `all_gather`."""

    def __init__(self, rank: int, size: int, gathered: list[list[torch.Tensor]]) -> None:
        super().__init__()
        self.rank, self.size, self._gathered, self._call = rank, size, gathered, 0

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        ranks, self._call = self._gathered[self._call], self._call + 1
        ranks[self.rank] = x
        return torch.stack([part if part.shape == x.shape else torch.zeros_like(x) for part in ranks])


def test_a_rank_whose_ids_are_all_masked_draws_none() -> None:
    """Greedily or not, on the first rank or another one."""
    x, of, cuts = random(5, 300)[1:], noise(4), (0, 128, 300)
    x[:2, :128] = x[2:, 128:] = float("-inf")
    shards = tuple(range(a, b) for a, b in pairwise(cuts))
    gathered = [[torch.empty(0)] * len(shards)]
    for _ in range(2):
        for rank, shard in enumerate(shards):
            tp, out_S = InTurn(rank, len(shards), gathered), torch.empty(4, dtype=torch.int64, device=DEVICE)
            raw = RawLogits(x[:, shard.start : shard.stop].contiguous())
            draw_rows(CardLogits(raw), shards, DrawParams(*of), tp, DrawTarget(out_S))
    assert torch.equal(out_S, drawn(RawLogits(x), of))
    assert (out_S[:2] >= 128).all() and (out_S[2:] < 128).all()


@pytest.mark.parametrize("cuts", [(0, 128, 300), (0, 3, 100)], ids=["blocks", "inside a block"])
def test_ranks_draw_and_score_what_one_rank_does(cuts: tuple[int, ...]) -> None:
    x, of = random(4, cuts[-1]), noise(4)
    x[:, 5] = 2.0
    shards = tuple(range(a, b) for a, b in pairwise(cuts))
    token_S, params = torch.full((4,), 5, device=DEVICE), DrawParams(*of)
    expected = drawn(RawLogits(x, 0.5, 30.0), of)
    whole = logprobs(CardLogits(RawLogits(x, 0.5, 30.0)), (range(cuts[-1]),), token_S, 2, Group())
    gathered = [[torch.empty(0)] * len(shards) for _ in range(3)]
    for _ in range(3):  # by then each knows what all have said
        for rank, shard in enumerate(shards):
            tp, out_S = InTurn(rank, len(shards), gathered), torch.empty(4, dtype=torch.int64, device=DEVICE)
            logits = CardLogits(RawLogits(x[:, shard.start : shard.stop], 0.5, 30.0))
            draw_rows(logits, shards, params, tp, DrawTarget(out_S))
            scores = logprobs(logits, shards, token_S, 2, tp)
    assert torch.equal(out_S, expected)
    assert all(torch.equal(one, other) for one, other in zip(scores, whole, strict=True))
