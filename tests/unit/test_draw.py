"""The draw: the right distribution, the same token however rows and vocabulary are laid out, and a scalar reference."""

import math
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch

from tpserve.parallel.group import Group
from tpserve.sampler import draw as module
from tpserve.sampler.draw import DrawParams, draw, gumbel
from tpserve.sampler.logits import UnwrittenLogits, WrittenLogits
from tpserve_kernels.cpu import head, product
from tpserve_kernels.cpu.head import BLOCK
from tpserve_kernels.cpu.library import library

ALONE = Group()


class Shards(Group):
    """A rank of an in-process group: ranks are threads that meet in `all_gather`."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: list[torch.Tensor]) -> None:
        super().__init__()
        self.rank, self.size, self._barrier, self._board = rank, size, barrier, board

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self._board[self.rank] = x
        self._barrier.wait()
        gathered = torch.stack(self._board)
        self._barrier.wait()
        return gathered


def on_ranks(size: int, run: Callable[[Group], torch.Tensor]) -> list[torch.Tensor]:
    barrier, board = threading.Barrier(size, timeout=20), [torch.empty(0)] * size
    results: list[torch.Tensor] = [torch.empty(0)] * size

    def rank(index: int) -> None:
        results[index] = run(Shards(index, size, barrier, board))

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def columns(rows: int, temperature: float | None = None) -> DrawParams:
    """Temperatures (0 among them), seeds over the whole range, positions and choices."""
    generator = torch.Generator().manual_seed(5)
    temperatures = torch.tensor([0.7, 0.0, 1.0, 1.9, 1e-30])[torch.arange(rows) % 5]
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    return DrawParams(
        temperatures if temperature is None else torch.full((rows,), temperature),
        seeds,
        torch.randint(0, 10000, (rows,), generator=generator),
        torch.randint(0, 4, (rows,), generator=generator),
    )


def logits(rows: int, vocab: int) -> torch.Tensor:
    return torch.randn((rows, vocab), generator=torch.Generator().manual_seed(vocab)) * 3


def whole(x: torch.Tensor, params: DrawParams) -> torch.Tensor:
    return draw(WrittenLogits(x), (range(x.shape[1]),), params, ALONE)


def some(rest: DrawParams, rows: slice) -> DrawParams:
    return DrawParams(*(column[rows] for column in rest[:4]))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def philox_word(counter: list[int], key: list[int]) -> int:
    """Philox4x32-10's first word in plain integers."""
    c, k = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0]


def scalar_draw(row: list[float], temperature: float, seed: int, position: int, choice: int) -> int:
    """The contract of docs/design.md in Python numbers."""
    if temperature == 0:
        return row.index(max(row))
    z = [x / temperature for x in row]

    def noise(id: int, level: int) -> float:
        bits = philox_word([id, position, choice, level], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF])
        return -math.log(-math.log(((bits >> 9) + 0.5) * 2.0**-23))

    def lse(block: int) -> float:
        part = z[block * BLOCK : (block + 1) * BLOCK]
        return max(part) + math.log(sum(math.exp(x - max(part)) for x in part))

    block = max(range(-(-len(z) // BLOCK)), key=lambda b: (lse(b) + noise(b, 0), -b))
    ids = range(block * BLOCK, min(block * BLOCK + BLOCK, len(z)))
    return max(ids, key=lambda i: (z[i] + noise(i, 1), -i))


@pytest.mark.parametrize("vocab", [1, 5, 128, 300])
def test_every_row_is_the_scalar_draw(vocab: int) -> None:
    x, rest = logits(60, vocab), columns(60)
    rows = zip(x.tolist(), *(c.tolist() for c in rest[:4]), strict=True)
    assert whole(x, rest).tolist() == [scalar_draw(*row) for row in rows]


def drawn(x_V: torch.Tensor, temperature: float, rows: int, seed: int) -> torch.Tensor:
    """The tokens of many positions with the same logits."""
    zero = torch.zeros(rows, dtype=torch.int64)
    return whole(x_V.expand(rows, -1), DrawParams(torch.full((rows,), temperature), zero + seed, torch.arange(rows), zero))


def deviation(tokens: torch.Tensor, probability_V: torch.Tensor) -> float:
    """Pearson's chi-square of the tokens' counts against exact probabilities, in standard deviations from its mean.

    What is expected fewer than 5 times is counted together; what is impossible and yet there is infinitely far off.
    """
    expected = probability_V * len(tokens)
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    if counts[expected == 0].any():
        return math.inf
    rare = expected < 5
    observed, wanted = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (counts, expected))
    possible = wanted > 0
    statistic, freedom = float(((observed - wanted)[possible] ** 2 / wanted[possible]).sum()), int(possible.sum()) - 1
    assert freedom > 5, "too few ids to tell anything"
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    x = torch.randn(300, generator=torch.Generator().manual_seed(1))
    tokens = drawn(x, temperature, 20_000, seed=1234567890123)
    assert abs(deviation(tokens, torch.softmax(x.double() / temperature, 0))) < 5


@pytest.mark.parametrize("which", ["seed low", "seed high", "position", "choice"])
def test_each_part_of_the_counter_gives_new_draws(which: str) -> None:
    x = torch.zeros((200, 512))
    zero, steps = torch.zeros(200, dtype=torch.int64), torch.arange(200)
    seed = {"seed low": steps, "seed high": steps << 32}.get(which, zero)
    parts = (seed, steps if which == "position" else zero, steps if which == "choice" else zero)
    assert len(set(whole(x, DrawParams(torch.ones(200), *parts)).tolist())) > 120


def test_gumbel_is_finite_at_both_ends_and_levels_differ() -> None:
    ids, zero = torch.arange(500_000)[None], torch.zeros(1, dtype=torch.int64)
    noise = [gumbel(ids, zero, zero, zero, level) for level in (0, 1)]
    assert all(bool(n.isfinite().all()) for n in noise)
    assert abs(float(noise[0].mean()) - 0.5772) < 0.01 and abs(float(noise[0].var()) - math.pi**2 / 6) < 0.02
    assert abs(float(torch.corrcoef(torch.cat(noise))[0, 1])) < 0.01


def test_the_noise_at_both_ends_of_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.tensor([[0, 0x1FF, 0xFFFFFFFF]])
    monkeypatch.setattr(module, "philox4x32", lambda counter, key: (words,))
    zero = torch.zeros(1, dtype=torch.int64)
    lowest, same, highest = module.gumbel(zero[None], zero, zero, zero, level=0)[0].tolist()
    assert lowest == same == pytest.approx(-math.log(24 * math.log(2))) and highest == pytest.approx(24 * math.log(2))


@pytest.mark.parametrize("form", ["reference", "library"])
def test_sums_do_not_know_their_order(form: str) -> None:
    x, temperature = logits(50, 4 * BLOCK), torch.full((50,), 0.7)
    if form == "library" and library() is None:
        pytest.skip("the library of CPU kernels is not there")
    blocks_of = head.blocks_of_logits if form == "library" else head.blocks_of_logits_reference
    sums = blocks_of(x, temperature).sum_SB
    blocks = x.view(50, 4, BLOCK)
    exact = ((blocks - blocks.amax(2, keepdim=True)).double() / temperature[:, None, None].double()).exp().sum(2)
    torch.testing.assert_close(sums, exact, rtol=1e-6, atol=0)
    for seed in range(5):
        order = torch.randperm(BLOCK, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(blocks_of(blocks[:, :, order].reshape(50, -1), temperature).sum_SB, sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unwritten_logits_are_the_written_ones(dtype: torch.dtype, two_threads: None) -> None:
    """Greedy and drawn tokens, values bit for bit, also in shards and with a scale."""
    if library() is None:
        pytest.skip("the library of CPU kernels is not there")
    x, weight = torch.randn(9, 96).to(dtype), torch.randn(1000, 96).to(dtype)
    logits = UnwrittenLogits(x, product.pack(weight), 1000, 0.5)
    written = WrittenLogits(logits.written())
    torch.testing.assert_close(written.values_SV, x.float() @ weight.float().T * 0.5, atol=1e-4, rtol=1e-4)
    for first in (0, 256):
        got, expected = (module._draw_shard(of, columns(9), first) for of in (logits, written))
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert torch.equal(logits.blocks(None).best_id_S, written.blocks(None).best_id_S)


@pytest.mark.parametrize("vocab", [300, 50_257])
def test_a_row_does_not_see_the_others(vocab: int, two_threads: None) -> None:
    """Values and tokens bit for bit, for 1 to 17 rows, for one and two threads."""
    x, rest = logits(17, vocab), columns(17)
    values, tokens = module._draw_shard(WrittenLogits(x), rest, 0)
    for rows in range(1, 18):
        torch.set_num_threads(1 + rows % 2)
        got_values, got_tokens = module._draw_shard(WrittenLogits(x[:rows]), some(rest, slice(rows)), 0)
        assert torch.equal(got_values, values[:rows]) and torch.equal(got_tokens, tokens[:rows])
        last = module._draw_shard(WrittenLogits(x[rows - 1 : rows]), some(rest, slice(rows - 1, rows)), 0)
        assert torch.equal(last[0], values[rows - 1 : rows])


@pytest.mark.parametrize(
    "cuts",
    [(0, 256, 512), (0, 128, 512), (0, 128, 384, 500), (0, 384, 512, 515), (0, 3, 7), (0, 100, 171, 300), (0, 1, 2, 3)],
    ids=str,
)
def test_sharded_is_unsharded(cuts: tuple[int, ...]) -> None:
    """Whole blocks are decided by one gather of (value, id); shards that start inside a block gather logits of unequal width."""
    shards = tuple(range(a, b) for a, b in pairwise(cuts))
    x, rest = logits(40, cuts[-1]), columns(40)
    expected = whole(x, rest)

    def run(tp: Group) -> torch.Tensor:
        shard = shards[tp.rank]
        return draw(WrittenLogits(x[:, shard.start : shard.stop].clone()), shards, rest, tp)

    for tokens in on_ranks(len(shards), run):
        assert torch.equal(tokens, expected)


def test_a_shard_has_the_whole_vocabularys_values() -> None:
    """Not only the winners agree: the values that are compared do, to the bit."""
    x, rest = logits(40, 1024), columns(40)
    values, tokens = module._draw_shard(WrittenLogits(x), rest, 0)
    first, second = (module._draw_shard(WrittenLogits(x[:, s : s + 512]), rest, s) for s in (0, 512))
    assert torch.equal(torch.maximum(first[0], second[0]), values)
    assert torch.equal(torch.where(first[0] >= second[0], first[1], second[1]), tokens)


@pytest.mark.parametrize("all_greedy", [True, False])
def test_temperature_0_is_the_lowest_id_of_the_largest_logit(all_greedy: bool) -> None:
    x = torch.zeros((3, 300))
    x[0, [5, 200]] = 1.0
    x[1, [130, 299]] = 7.0
    rest = columns(3, temperature=0.0)
    shards = (range(128), range(128, 256), range(256, 300))

    def run(tp: Group) -> torch.Tensor:
        shard = shards[tp.rank]
        return draw(WrittenLogits(x[:, shard.start : shard.stop].contiguous()), shards, None if all_greedy else rest, tp)

    assert all(tokens.tolist() == [5, 130, 0] for tokens in on_ranks(3, run))
    assert draw(WrittenLogits(x), (range(300),), None if all_greedy else rest, ALONE).tolist() == [5, 130, 0]


def test_masked_logits_are_never_drawn() -> None:
    x = torch.full((500, 400), float("-inf"))
    x[:, [3, 250]] = 0.0
    tokens = whole(x, columns(500, temperature=1.0))
    assert 200 < int((tokens == 3).sum()) < 300 and set(tokens.tolist()) == {3, 250}


def test_no_params_draw_nothing_random(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gumbel_max", None)
    x = logits(4, 300)
    assert torch.equal(draw(WrittenLogits(x), (range(300),), None, ALONE), x.argmax(1))


def test_positive_temperatures_need_no_greedy_rows() -> None:
    x, params = logits(20, 300), columns(20, temperature=0.9)
    assert torch.equal(whole(x, params), whole(x, params._replace(some_greedy=False)))
