"""Scheduler and model runner in one process: what a request gets does not depend on how it was batched, chunked or preempted."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from msgspec import structs

from tests.parity import runner
from tests.specs import small
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.parallel.mesh import Mesh
from tpserve.parallel.pipeline import Pipeline
from tpserve.scheduling.scheduler import Scheduler
from tpserve.scheduling.scheduler_config import SchedulerConfig
from tpserve.types.layout import ParallelLayout
from tpserve.types.messages import Delta, Done, EngineOutput
from tpserve.types.packed import pack
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams
from tpserve.weights.dummy import dummy
from tpserve.worker.grammars import CompiledGrammars

# An inner size, that of `down`, at which the libraries' paths differ by the number of rows.
SPEC = small(num_layers=3, num_heads=4, head_dim=16, intermediate_size=1408, max_position=1024)
LIMITS = SchedulerConfig(
    max_num_seqs=8,
    max_num_batched_tokens=1024,
    max_model_len=600,
    num_blocks=300,
    block_size=16,
    depth=2,
    sync_sampling=False,
    eos_ids=(),
)


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    made = Decoder(SPEC, layout(), 0, Group(), request.param, torch.device("cpu"), LIMITS.max_model_len)
    dummy(made.parameters(), seed=3)
    made.prepack()
    return made


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def layout() -> ParallelLayout:
    return ParallelLayout(1, 1, (SPEC.num_layers,))


def serve(
    decoder: Decoder,
    requests: list[Request],
    limits: SchedulerConfig,
    threads: int = 1,
    compiled: CompiledGrammars | None = None,
) -> tuple[dict[int, Answer], Scheduler]:
    """Everything at once through a fresh engine."""
    torch.set_num_threads(threads)
    mesh = Mesh(0, ParallelLayout(1, 1, (decoder.spec.num_layers,)), Group(), Group(), Pipeline(), torch.device("cpu"))
    outputs, _, scheduler = runner.serve(decoder, mesh, requests, limits, compiled)
    return collect(requests, outputs), scheduler


def collect(requests: list[Request], outputs: list[EngineOutput]) -> dict[int, Answer]:
    """What each request got; it must have ended well."""
    answers = {r.id: Answer() for r in requests}
    for output in outputs:
        if isinstance(output, Delta):
            answers[output.id].tokens.extend(output.tokens)
            answers[output.id].logprobs.extend(entry.chosen for entry in output.logprobs)
        elif isinstance(output, Done):
            assert output.finish in ("length", "stop"), output
    return answers


def make_requests() -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    requests = []
    for i, (prompt_len, max_tokens) in enumerate([(1, 20), (7, 40), (16, 3), (33, 30), (150, 25), (270, 12), (90, 60)]):
        prompt = torch.randint(0, SPEC.vocab_size, (prompt_len,), generator=generator).tolist()
        params = EngineSamplingParams(temperature=[0.0, 0.8, 1.5][i % 3], max_tokens=max_tokens, logprobs=0)
        requests.append(Request(i, pack(prompt), params, seed=(i * 0x9E3779B97F4A7C15) & (2**64 - 1)))
    return requests


@pytest.fixture(scope="module")
def alone(decoder: Decoder) -> dict[int, Answer]:
    return {r.id: serve(decoder, [r], LIMITS)[0][r.id] for r in make_requests()}


@pytest.mark.parametrize("change", [
    {},
    {"max_num_batched_tokens": 16},
    {"max_num_batched_tokens": 37, "max_num_seqs": 3},
    {"block_size": 32, "num_blocks": 100},
    {"depth": 3, "sync_sampling": True},
    {"depth": 1},
], ids=str)  # fmt: skip
def test_any_schedule_gives_the_same_bits(decoder: Decoder, alone: dict[int, Answer], change: dict[str, int]) -> None:
    batched, _ = serve(decoder, make_requests(), replace(LIMITS, **change), threads=2)
    assert batched == alone


@pytest.mark.parametrize("change", [{}, {"max_num_batched_tokens": 37}, {"depth": 3, "sync_sampling": True}], ids=str)
def test_what_comes_from_the_prefix_cache_is_what_would_have_been_computed(
    decoder: Decoder, alone: dict[int, Answer], change: dict[str, int]
) -> None:
    again = [structs.replace(r, id=r.id + 100) for r in make_requests()]
    answers, scheduler = serve(decoder, make_requests() + again, replace(LIMITS, **change))
    assert answers == alone | {id + 100: answer for id, answer in alone.items()}
    assert scheduler.stats().prefix_cache_hits == sum((len(r.prompt) // 4 - 1) // 16 * 16 for r in again)
    computed, scheduler = serve(decoder, make_requests() + again, replace(LIMITS, **change, prefix_caching=False))
    assert computed == answers and scheduler.stats().prefix_cache_hits == 0


def test_preempted_and_recomputed(decoder: Decoder) -> None:
    growing = [
        Request(i, pack(range(i, i + 20)), EngineSamplingParams(temperature=0.7 * (i % 2), max_tokens=120, logprobs=0), seed=i)
        for i in range(5)
    ]
    undisturbed, _ = serve(decoder, growing, LIMITS)
    batched, scheduler = serve(decoder, growing, replace(LIMITS, num_blocks=24))
    assert scheduler.stats().preemptions > 0, "the pool is small enough to run short"
    assert batched == undisturbed


FILTERS: list[dict[str, Any]] = [
    {"top_k": 5, "repetition_penalty": 1.3},
    {"temperature": 0.0, "frequency_penalty": 0.05, "presence_penalty": 0.1},
    {"top_p": 0.7, "min_tokens": 30, "stop_token_ids": tuple(range(0, 517, 3))},
    {},
    {"min_p": 0.2, "frequency_penalty": 0.5, "bad_words": ((5,), (3, 4))},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "logit_bias": ((7, 1.5), (8, -3.0)), "presence_penalty": -0.5},
    {"allowed_token_ids": tuple(range(40, 90)), "repetition_penalty": 2.0},
]


def filtering(requests: list[Request], most: int) -> list[Request]:
    """The requests with a filter or several each, and one with none between them; at most `most` tokens long."""
    return [
        structs.replace(r, params=structs.replace(r.params, max_tokens=min(r.params.max_tokens, most), **FILTERS[r.id]))
        for r in requests
    ]


def test_filters_see_the_same_in_any_schedule(decoder: Decoder, alone: dict[int, Answer]) -> None:
    requests = filtering(make_requests(), 12)
    single = {r.id: serve(decoder, [r], LIMITS)[0][r.id] for r in requests}
    for change in ({"max_num_batched_tokens": 37, "max_num_seqs": 3}, {"depth": 3, "sync_sampling": True}):
        batched, _ = serve(decoder, requests, replace(LIMITS, **change))
        assert batched == single
    changed = [i for i in single if single[i].tokens != alone[i].tokens[:12]]
    assert set(changed) >= {4, 5, 6} and 3 not in changed, "filters change answers, but no other's"


def test_filters_after_preemption(decoder: Decoder) -> None:
    growing = [Request(i, pack(range(i, i + 20)), EngineSamplingParams(temperature=0.7, max_tokens=60), seed=i) for i in range(7)]
    growing = filtering(growing, 60)
    undisturbed, _ = serve(decoder, growing, LIMITS)
    batched, scheduler = serve(decoder, growing, replace(LIMITS, num_blocks=20))
    assert scheduler.stats().preemptions > 0 and batched == undisturbed
    assert len(undisturbed[2].tokens) > 30, "neither a stop id nor an EOS before"


def test_the_newest_token_counts_with_plans_in_flight(decoder: Decoder) -> None:
    """The host plans a position before it knows the token in front of it; what a filter says of that token holds all the same."""
    wanted = EngineSamplingParams(
        temperature=0.0, max_tokens=8, logit_bias=((5, 100.0), (6, 90.0)), bad_words=((5, 5), (6, 5, 6))
    )
    late = EngineSamplingParams(temperature=0.0, max_tokens=20, logit_bias=((11, 100.0), (12, 50.0)), min_tokens=4)
    requests = [Request(0, pack([5]), wanted, seed=0), Request(1, pack([1, 2]), late, seed=0)]
    for depth in (1, 2):
        answers, _ = serve(decoder, requests, replace(LIMITS, eos_ids=(11,), depth=depth))
        first, second = answers[0].tokens, answers[1].tokens
        assert first[:3] == [5, 6, 5] and first[3] not in (5, 6) and first[4:7] == [5, 6, 5]
        assert second == [12, 12, 12, 12, 11]


def test_two_threads_one_answer(decoder: Decoder, alone: dict[int, Answer]) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert serve(decoder, make_requests(), LIMITS)[0] == alone
    finally:
        torch.set_num_threads(threads)
