"""Prompt log probabilities of one rank: the bits of a drawn token's, however a prompt is cut; just what a plan's chunks ask."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from runner import Scorer, Scores, mixed, scores, whole
from test_worker import SPEC, layout

from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.parallel.mesh import Mesh
from tpserve.parallel.pipeline import Pipeline
from tpserve.types.packed import pack, unpack
from tpserve.types.plan import Chunk, NewSequence, PromptLogprobs, StepPlan, StepResult
from tpserve.types.sampling import EngineSamplingParams
from tpserve.weights.dummy import dummy
from tpserve.worker import logits_chunking
from tpserve.worker.memory import allocate
from tpserve.worker.model_runner import ModelRunner
from tpserve.worker.request_pool import RequestPool

LENGTHS = (1, 2, 30, 45, 131)
MAX_LEN = 160
MESH = Mesh(0, layout(), Group(), Group(), Pipeline(), torch.device("cpu"))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return make_decoder(request.param)


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows at the head at once, or one with filters."""
    monkeypatch.setattr(logits_chunking, "HEAD_BYTES", 3 * SPEC.vocab_size * logits_chunking.PLAIN_BYTES)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_decoder(dtype: torch.dtype) -> Decoder:
    made = Decoder(SPEC, layout(), 0, Group(), dtype, torch.device("cpu"), MAX_LEN)
    dummy(made.parameters(), seed=3)
    made.prepack()
    return made


def make_executor(decoder: Decoder) -> ModelRunner:
    request_pool = RequestPool(8, MAX_LEN, 16, (None,), MESH.device, eos_ids=(), vocab_size=SPEC.vocab_size)
    return ModelRunner(MESH, decoder, request_pool, allocate(decoder, MESH, 80, 16))


def admit(slot: int, tokens: Sequence[int], prompt_len: int, params: EngineSamplingParams) -> NewSequence:
    return NewSequence(slot, pack(tokens), prompt_len, params, slot + 1, 0, (pack(range(slot * 10, slot * 10 + 10)),))


def same(a: Sequence[Scores], b: Sequence[Scores]) -> bool:
    return all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(SPEC.vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


def test_cuts_company_and_threads_change_no_bit(decoder: Decoder, request: pytest.FixtureRequest) -> None:
    def run(steps: list[list[tuple[int, int, int]]]) -> list[Scores]:
        return Scorer(decoder, MESH, len(LENGTHS), MAX_LEN).run(prompts(), steps, [0, 3, 5, 1, 20])

    torch.set_num_threads(1)
    alone = run(whole(LENGTHS))
    assert [len(chosen) for chosen, _, _ in alone] == [0, 1, 29, 44, 130]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for sizes in ((7, 30, 1), (131,)):
            assert same(run(mixed(LENGTHS, LENGTHS, sizes)), alone)
    request.getfixturevalue("few_rows")
    assert same(run(mixed(LENGTHS, LENGTHS, (17, 100))), alone)


def test_a_scored_token_has_the_bits_of_a_drawn_one(decoder: Decoder) -> None:
    prompt, params = prompts()[2], EngineSamplingParams(temperature=0.8, logprobs=4)
    model_runner = make_executor(decoder)
    results: list[StepResult] = []
    for step in range(15):
        start, count = (0, len(prompt)) if step == 0 else (len(prompt) + step - 1, 1)
        new = [admit(3, prompt, len(prompt), params)] if step == 0 else []
        results.append(model_runner.launch(StepPlan.of(0, step, [Chunk(3, start, count, sample=True)], new)).wait())
    output = [unpack(result.tokens)[0] for result in results]
    drawn = [result.logprobs[0][1] for result in results]

    sequence = prompt + output
    chosen, ids, top = Scorer(decoder, MESH, 1, MAX_LEN).run([sequence], whole([len(sequence)]), [4])[0]
    first = len(prompt) - 1
    assert chosen[first:].tolist() == [entry.chosen for entry in drawn]
    assert ids[first:].tolist() == [list(entry.top_ids) for entry in drawn]
    assert top[first:].tolist() == [list(entry.top) for entry in drawn]


def test_a_plans_chunks_get_what_they_ask_for() -> None:
    tokens = list(range(40, 60))
    new = [admit(slot, tokens, 20, EngineSamplingParams(prompt_logprobs=n)) for slot, n in ((0, 2), (1, 0), (2, 600))]
    new += [admit(3, tokens, 5, EngineSamplingParams(prompt_logprobs=1)), admit(4, tokens, 20, EngineSamplingParams(logprobs=0))]
    new += [admit(5, tokens, 20, EngineSamplingParams(prompt_logprobs=3, logprobs=3))]
    chunks = [
        Chunk(0, 0, 7, sample=False, score=True),
        Chunk(4, 0, 20, sample=True),
        Chunk(3, 0, 20, sample=True, score=True),  # with fifteen tokens of output
        Chunk(1, 0, 20, sample=True, score=True),
        Chunk(2, 0, 3, sample=False, score=True),
        Chunk(5, 0, 7, sample=True, score=True),  # its last row is drawn from and scored
    ]
    model_runner = make_executor(make_decoder(torch.float32))
    result = model_runner.launch(StepPlan.of(0, 0, chunks, new)).wait()
    entries = dict(result.prompt_logprobs)
    assert [(chunk, len(entry.chosen) // 4, entry.num_top) for chunk, entry in entries.items()] == [
        (0, 7, 2), (2, 4, 1), (3, 19, 0), (4, 3, 517), (5, 7, 3),
    ]  # fmt: skip
    assert [len(entry.top_ids) // 4 for entry in entries.values()] == [14, 4, 0, 3 * 517, 21]
    assert [token >= 0 for token in unpack(result.tokens)] == [False, True, True, True, False, True]
    assert dict(result.logprobs).keys() == {1, 5}
    assert entries[0].chosen == chosen_of(entries[3])[:28] == chosen_of(entries[5])
    drawn = dict(result.logprobs)[5]
    assert tuple(unpack(entries[5].top_ids)[-3:]) == drawn.top_ids, "both are of the raw logits of one row"

    rest = [Chunk(3, 20, 1, sample=True, score=True), Chunk(0, 7, 13, sample=True, score=True)]
    later = dict(model_runner.launch(StepPlan.of(0, 1, rest)).wait().prompt_logprobs)
    assert later.keys() == {1}, "nothing of the prompt is left in the other"
    assert entries[0].chosen + later[1].chosen == chosen_of(entries[3])
    assert model_runner.launch(StepPlan.of(0, 2, [Chunk(0, 20, 1, sample=True)])).wait().prompt_logprobs == ()


def chosen_of(entry: PromptLogprobs) -> bytes:
    assert torch.isfinite(scores([entry], entry.num_top)[0]).all()
    return entry.chosen


def test_rows_drawn_in_several_batches(request: pytest.FixtureRequest) -> None:
    """Plain rows and rows with filters, in no order, with and without log probabilities."""
    both = EngineSamplingParams(repetition_penalty=1.5, logprobs=2)
    filtered = [EngineSamplingParams(top_k=5), both, EngineSamplingParams(top_p=0.5), EngineSamplingParams(min_p=0.2)]
    plain = [
        EngineSamplingParams(),
        EngineSamplingParams(temperature=0.0),
        EngineSamplingParams(logprobs=2),
        EngineSamplingParams(),
    ]
    asked = [params for pair in zip(plain, filtered, strict=True) for params in pair]
    new = [admit(i, prompts()[2], 30, params) for i, params in enumerate(asked)]
    plan = StepPlan.of(0, 0, [Chunk(i, 0, 30, sample=True) for i in range(8)], new)
    decoder = make_decoder(torch.float32)
    together = make_executor(decoder).launch(plan).wait()
    request.getfixturevalue("few_rows")
    most = logits_chunking.LogitsChunking.of(decoder.vocab_shards, MAX_LEN + 1)
    assert (most.plain, most.filtered) == (3, 1)
    apart = make_executor(decoder).launch(plan).wait()
    assert apart.tokens == together.tokens and dict(apart.logprobs) == dict(together.logprobs)
    entries = dict(together.logprobs)
    assert entries.keys() == {3, 4} and all(token >= 0 for token in unpack(together.tokens))
    assert entries[3].top == entries[4].top, "of the raw logits, which are the same, whatever the filter"
