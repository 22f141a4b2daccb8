"""The filters against a plain float64 reference, alone and together; the same bits in any company; the draw that follows."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, pairwise

import pytest
import torch
from msgspec.structs import replace

from tests.unit.test_draw import deviation, drawn, on_ranks
from tpserve.parallel.group import Group
from tpserve.sampler import filters as module
from tpserve.sampler.draw import DrawParams, draw, gather_logits
from tpserve.sampler.filters import AllowedIds, BadWords, Filters, GrammarMask, apply
from tpserve.sampler.logits import WrittenLogits
from tpserve.types.sampling import EngineSamplingParams
from tpserve.worker.sampling_metadata import filters, sampling_metadata

VOCAB = 300
EOS = (7, 8)
OUT = float("-inf")


@dataclass
class Row:
    """A sequence that asks `params`, about to draw its next token."""

    params: EngineSamplingParams
    prompt: list[int]
    output: list[int]
    logits: torch.Tensor


def reference(row: Row) -> list[float]:
    """The logits to draw from in Python numbers, from the words of the API."""
    p, x = row.params, [float(v) for v in row.logits]
    if p.allowed_token_ids:
        x = [v if i in p.allowed_token_ids else OUT for i, v in enumerate(x)]
    ends = (*p.stop_token_ids, *(() if p.ignore_eos else EOS)) if len(row.output) < p.min_tokens else ()
    words = [*p.bad_words, *((i,) for i in ends)]
    banned = {word[-1] for word in words if row.output[len(row.output) - len(word) + 1 :] == list(word[:-1])}
    if any(v > OUT for i, v in enumerate(x) if i not in banned):
        x = [OUT if i in banned else v for i, v in enumerate(x)]
    for i, value in p.logit_bias:
        x[i] += value
    for i in {*row.prompt, *row.output}:
        x[i] = x[i] / p.repetition_penalty if x[i] > 0 else x[i] * p.repetition_penalty
    for i in set(row.output):
        x[i] -= p.frequency_penalty * row.output.count(i) + p.presence_penalty
    if p.temperature == 0:
        return x
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    weights = [math.exp((x[i] - x[order[0]]) / p.temperature) for i in order]
    count = sum(weight >= p.min_p for weight in weights)
    count = min(count, p.top_k or count)
    total, so_far = sum(weights[:count]), 0.0
    if p.top_p < 1:
        for taken in range(1, count + 1):
            so_far += weights[taken - 1]
            if so_far >= p.top_p * total:
                count = taken
                break
    kept = set(order[:count])
    return [v if i in kept else OUT for i, v in enumerate(x)]


def columns(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Temperatures, positions, and tokens with something else's behind them."""
    known = [row.prompt + row.output for row in rows]
    tokens = torch.full((len(rows), max(map(len, known)) + 3), 5, dtype=torch.int32)
    for line, ids in zip(tokens, known, strict=True):
        line[: len(ids)] = torch.tensor(ids)
    return torch.tensor([row.params.temperature for row in rows]), torch.tensor([len(ids) for ids in known]), tokens


def filtered(rows: Sequence[Row], device: str = "cpu") -> torch.Tensor:
    """Through the code of the server, all rows at once."""
    temperature, position, tokens = columns(rows)
    wanted = []
    for row in rows:
        one = sampling_metadata(row.params, len(row.prompt), EOS, VOCAB)
        assert one is not None
        wanted.append(one)
    made = filters(wanted, position.tolist(), torch.device(device))
    logits, temperature, position, tokens = (
        x.to(device) for x in (torch.stack([row.logits for row in rows]), temperature, position, tokens)
    )
    slots = torch.arange(len(rows), device=device)
    with no_waiting(device):
        return apply(logits, made, temperature, position, tokens, slots)


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """On a card nothing may wait for the device."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


SINGLE = {
    "top_k": {"top_k": 7},
    "top_k 1": {"top_k": 1},
    "top_p": {"top_p": 0.8},
    "top_p small": {"top_p": 1e-6},
    "min_p": {"min_p": 0.05},
    "min_p 1": {"min_p": 1.0},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.7},
    "repetition": {"repetition_penalty": 1.7},
    "bias": {"logit_bias": ((3, 50.0), (0, -100.0))},
    "allowed": {"allowed_token_ids": (299, 4, 128)},
    "bad words": {"bad_words": ((9,), (1, 2, 3), (2, 3), (3, 2, 11), (1, 2, 3, 40))},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": (20,)},
    "min_tokens reached": {"min_tokens": 6, "top_k": 299},
    "ignored eos": {"min_tokens": 9, "stop_token_ids": (20,), "ignore_eos": True},
    "nothing left": {"allowed_token_ids": (7, 30), "min_tokens": 100, "bad_words": ((30,),)},
}
MIXED = {
    "all": {
        "top_k": 40, "top_p": 0.9, "min_p": 0.001, "presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.2,
        "logit_bias": ((5, 4.0), (9, 30.0)), "allowed_token_ids": (*range(0, 300, 2), 9, 7), "bad_words": ((3, 10), (9,)),
        "min_tokens": 20, "temperature": 1.4,
    },
    "top_k then top_p": {"top_k": 3, "top_p": 0.75},
    "min_p then top_p": {"min_p": 0.1, "top_p": 0.6, "temperature": 0.5},
    "penalties, then top_k": {"presence_penalty": 2.0, "repetition_penalty": 0.5, "top_k": 2},
    "greedy": {"temperature": 0.0, "top_k": 3, "top_p": 0.3, "min_p": 0.5, "frequency_penalty": 1.0, "logit_bias": ((8, 2.0),)},
}  # fmt: skip


def make_rows(ties: bool = False) -> list[Row]:
    """Every case once; logits of different shapes, or of few values."""
    generator = torch.Generator().manual_seed(11)
    rows = []
    for number, fields in enumerate([*SINGLE.values(), *MIXED.values()]):
        x = torch.randn(VOCAB, generator=generator) * (1 + number % 3)
        prompt = torch.randint(0, VOCAB, (1 + 5 * number,), generator=generator).tolist()
        params = EngineSamplingParams(**{"temperature": 0.9, **fields})  # type: ignore[arg-type]
        rows.append(Row(params, prompt, [4, 3, 1, 3, 2, 3], (x * 2).round() / 2 if ties else x))
    return rows


@pytest.mark.parametrize("ties", [False, True])
def test_each_filter_and_all_together_are_the_reference(ties: bool) -> None:
    rows = make_rows(ties)
    for name, row, got in zip([*SINGLE, *MIXED], rows, filtered(rows), strict=True):
        expected = torch.tensor(reference(row), dtype=torch.float64)
        assert torch.equal(got.isinf(), expected.isinf()), name
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-5, msg=name)


def test_a_row_does_not_see_the_others() -> None:
    rows = make_rows()
    together = filtered(rows)
    for number, row in enumerate(rows):
        assert torch.equal(filtered([row])[0], together[number])
        assert torch.equal(filtered(rows[number:])[0], together[number])


def test_exactly_k_and_the_lowest_ids_of_equal_ones() -> None:
    flat = torch.zeros(VOCAB)
    kept = [filtered([Row(params, [1], [], flat)])[0].isfinite().nonzero().flatten().tolist() for params in (
        EngineSamplingParams(top_k=5), EngineSamplingParams(top_p=0.1), EngineSamplingParams(top_k=200, top_p=0.1),
        EngineSamplingParams(min_p=1.0)
    )]  # fmt: skip
    assert kept == [list(range(5)), list(range(30)), list(range(20)), list(range(VOCAB))]


def test_top_p_beyond_the_candidates_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row(EngineSamplingParams(top_p=p), [1], [], make_rows()[0].logits / 10) for p in (0.01, 0.5, 0.99)]
    expected = filtered(rows)
    monkeypatch.setattr(module, "CANDIDATES", 4)
    assert torch.equal(filtered(rows), expected) and torch.equal(filtered(rows[:1])[0], expected[0])


def test_neutral_values_ask_for_nothing() -> None:
    neutral = EngineSamplingParams(
        top_k=VOCAB, top_p=1.0, min_p=0.0, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0, min_tokens=0
    )
    greedy = EngineSamplingParams(temperature=0.0, top_k=3, top_p=0.5, min_p=0.5)
    assert sampling_metadata(neutral, 4, EOS, VOCAB) is None and sampling_metadata(greedy, 4, EOS, VOCAB) is None
    until = sampling_metadata(EngineSamplingParams(min_tokens=3), 4, EOS, VOCAB)
    assert until is not None and [until.needs_filters(position) for position in range(4, 9)] == [True] * 3 + [False] * 2
    assert sampling_metadata(EngineSamplingParams(min_tokens=3, ignore_eos=True), 4, EOS, VOCAB) is None


def test_penalties_bring_nothing_back() -> None:
    params = EngineSamplingParams(allowed_token_ids=(1, 2), repetition_penalty=2.0, frequency_penalty=-2.0)
    row = Row(params, [5], [5, 6], torch.zeros(VOCAB))
    assert filtered([row])[0].isfinite().nonzero().flatten().tolist() == [1, 2]


EACH = {
    "temperature": {"temperature": 1.7},
    "top_k": {"top_k": 60},
    "top_p": {"top_p": 0.85},
    "min_p": {"min_p": 0.02},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "repetition": {"repetition_penalty": 1.7},
    "bias": {"logit_bias": ((3, 2.0), (50, -3.0), (51, 5.0))},
    "allowed": {"allowed_token_ids": (*range(0, 300, 3), 2, 4)},
    "bad words": {"bad_words": ((9,), (2, 3), (3, 51), (2, 3, 4))},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": (20, 51)},
}
TOGETHER = {
    "all": {name: value for fields in EACH.values() for name, value in fields.items()},
    "what changes logits": {**EACH["bias"], **EACH["presence"], **EACH["frequency"], **EACH["repetition"]},
    "masks": {**EACH["allowed"], **EACH["bad words"], **EACH["min_tokens"], "temperature": 0.6},
    "what keeps the likely": {"top_k": 60, "top_p": 0.9, "min_p": 0.02, "temperature": 0.8},
    "penalties, then top_p": {"presence_penalty": 1.0, "repetition_penalty": 1.3, "top_p": 0.7},
    "bias, then min_p": {**EACH["bias"], "min_p": 0.05, "temperature": 1.4},
}


def one_row(fields: dict[str, object]) -> Row:
    """Repeats in the output, ids that penalties, bans and biases share."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(12))
    logits[[1, 2, 3, 4, 9, 20, 50, 51]] += 2.5
    return Row(EngineSamplingParams(**fields), [1, 4, 50], [4, 3, 1, 3, 2, 3], logits)  # type: ignore[arg-type]


def test_every_pair_is_the_reference() -> None:
    filters = [fields for name, fields in EACH.items() if name != "temperature"]
    pairs = [{"temperature": t, **a, **b} for t in (0.4, 1.6) for a, b in combinations(filters, 2)]
    rows = [one_row(fields) for fields in pairs]
    for row, got in zip(rows, filtered(rows), strict=True):
        expected = torch.tensor(reference(row), dtype=torch.float64)
        assert torch.equal(got.isinf(), expected.isinf()), row.params
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("fields", [pytest.param(fields, id=name) for name, fields in (EACH | TOGETHER).items()])
def test_frequencies_are_those_of_the_reference(fields: dict[str, object]) -> None:
    """Chi-square of 8,000 draws, each filter alone and some together; without them it would tell."""
    row = one_row(fields)
    logits = row.logits if fields == EACH["temperature"] else filtered([row])[0]
    tokens = drawn(logits, row.params.temperature, 8_000, seed=99)
    expected = torch.softmax(torch.tensor(reference(row), dtype=torch.float64) / row.params.temperature, 0)
    assert abs(deviation(tokens, expected)) < 5
    plain = drawn(row.logits, 1.0, 8_000, seed=99)
    assert deviation(plain, expected) > 10


@pytest.mark.parametrize("cuts", [(0, 128, 300), (0, 100, 171, 300), (0, 1, 2, 300)], ids=str)
def test_sharded_is_unsharded(cuts: tuple[int, ...]) -> None:
    """Shards may be uneven and begin inside a block: the logits are gathered before anything is filtered."""
    shards = tuple(range(a, b) for a, b in pairwise(cuts))
    rows = make_rows()
    logits, whole = torch.stack([row.logits for row in rows]), filtered(rows)

    def run(tp: Group) -> torch.Tensor:
        shard = shards[tp.rank]
        gathered = gather_logits(logits[:, shard.start : shard.stop].clone(), shards, tp)
        return filtered([replace_logits(row, line) for row, line in zip(rows, gathered, strict=True)])

    for result in on_ranks(len(shards), run):
        assert torch.equal(result, whole)


@pytest.mark.parametrize("native", [True, False])
def test_what_looks_at_one_id_at_a_time_needs_no_whole_rows(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the vocabulary, filtered apart, are parts of the filtered rows; the draw is the same, also where one has no id."""
    if not native:
        monkeypatch.setattr(module, "is_native", lambda _: False)
    rows = [one_row({"temperature": 0.7, **EACH[name]}) for name in ("presence", "frequency", "repetition", "bias")]
    rows.append(one_row({"temperature": 0.0, **TOGETHER["what changes logits"]}))
    wanted = [sampling_metadata(row.params, len(row.prompt), EOS, VOCAB) for row in rows]
    temperature, position, tokens = columns(rows)
    made = filters([one for one in wanted if one is not None], position.tolist(), torch.device("cpu"))
    bits = torch.full((2, 10), -1, dtype=torch.int32)
    bits[0, :4] = bits[1, 4:] = 0
    made = dataclasses.replace(made, grammar=GrammarMask(torch.tensor([0, 4]), bits))
    assert made.per_id and not any(one is None or one.needs_whole_rows(99) for one in wanted)
    logits, slots, shards = torch.stack([row.logits for row in rows]), torch.arange(len(rows)), (range(128), range(128, 300))
    whole = apply(logits.clone(), made, temperature, position, tokens, slots)
    zero = torch.zeros(len(rows), dtype=torch.int64)
    params = DrawParams(temperature, zero + 3, position, zero)

    def run(tp: Group) -> tuple[torch.Tensor, torch.Tensor]:
        shard = shards[tp.rank]
        part = apply(logits[:, shard.start : shard.stop].clone(), made, temperature, position, tokens, slots, shard.start)
        return part, draw(WrittenLogits(part), shards, params, tp)

    (first, drawn_S), (second, other_S) = on_ranks(2, run)
    assert torch.equal(torch.cat((first, second), dim=1), whole)
    assert torch.equal(drawn_S, other_S) and torch.equal(drawn_S, draw(WrittenLogits(whole), (range(VOCAB),), params, Group()))
    assert drawn_S[0] >= 128 > drawn_S[4]
    for name in ("top_k", "top_p", "min_p", "allowed", "bad words", "min_tokens"):
        one = sampling_metadata(EngineSamplingParams(**{"temperature": 0.9, **EACH[name]}), 3, EOS, VOCAB)  # type: ignore[arg-type]
        assert one is not None and one.needs_whole_rows(5), name


def replace_logits(row: Row, logits: torch.Tensor) -> Row:
    return Row(replace(row.params), row.prompt, row.output, logits)


def test_a_grammar_is_a_hard_mask_and_others_yield_where_they_leave_nothing() -> None:
    logits = torch.randn(3, 70)
    bits = torch.tensor([[0b1010, 0, 0], [0, 0, 1 << 5]], dtype=torch.int32)  # ids 1 and 3; id 69
    mask = GrammarMask(torch.tensor([0, 2]), bits)
    allowed = AllowedIds(torch.tensor([0, 2]), torch.tensor([0, 0, 2]), torch.tensor([3, 9, 8]), torch.tensor([2, 2, 3]))
    bans = BadWords(
        torch.tensor([0]), torch.tensor([3]), torch.zeros(1, 0, dtype=torch.int32), torch.tensor([0]), torch.tensor([1, 1, 1])
    )
    got = apply(
        logits.clone(), Filters(torch.ones(3, dtype=torch.int64), grammar=mask, allowed=allowed, bad_words=bans),
        torch.ones(3), torch.ones(3, dtype=torch.int64), torch.zeros(3, 0, dtype=torch.int32), torch.arange(3),
    )  # fmt: skip
    left = [row.isfinite().nonzero().flatten().tolist() for row in got]
    assert left == [[3], list(range(70)), [69]]
    assert torch.equal(got[1], logits[1]) and got[0, 3] == logits[0, 3]
