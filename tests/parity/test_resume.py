"""A request that comes back with its output goes on as if nothing had been; its last tokens are drawn again and found equal."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from llguidance import LLMatcher
from msgspec import structs

from tests.parity import runner
from tests.parity.test_grammars import compiled
from tests.parity.test_grammars import requests as grammar_requests
from tests.parity.test_worker import FILTERS, LIMITS, SPEC, Answer, collect, layout, make_requests
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.parallel.mesh import Mesh
from tpserve.parallel.pipeline import Pipeline
from tpserve.types.packed import pack
from tpserve.types.plan import MAX_REDRAWN
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams
from tpserve.weights.dummy import dummy
from tpserve.worker import logits_chunking

MESH = Mesh(0, layout(), Group(), Group(), Pipeline(), torch.device("cpu"))
LIMITED = replace(LIMITS, eos_ids=(11, 12))
SCHEDULES: list[dict[str, Any]] = [
    {},
    {"max_num_batched_tokens": 11, "max_num_seqs": 3},
    {"depth": 3, "sync_sampling": True},
    {"prefix_caching": False, "depth": 1},
]
MORE_FILTERS: list[dict[str, Any]] = [
    {"temperature": 0.8, "min_tokens": 30, "stop_token_ids": tuple(range(0, 517, 3))},
    {"temperature": 1.0, "bad_words": ((5,), (3, 3), (4, 4, 4)), "logit_bias": ((3, 20.0), (4, 20.0), (5, 25.0))},
    {"temperature": 0.7, "top_p": 0.8, "logprobs": 3},
]
"""The first needs filters up to its 30th token only; the second meets its bad words."""


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    made = Decoder(SPEC, layout(), 0, Group(), request.param, torch.device("cpu"), LIMITS.max_model_len)
    dummy(made.parameters(), seed=3)
    made.prepack()
    return made


def all_features() -> list[Request]:
    """Plain, filtered, greedy and drawn; 40 tokens each, or up to an EOS."""
    plain = make_requests()
    filtered = [structs.replace(r, id=r.id + 10, params=structs.replace(r.params, **FILTERS[r.id])) for r in plain]
    more = [
        Request(20 + i, pack(range(i, 30 + i)), EngineSamplingParams(max_tokens=40, **fields), seed=i, choice=i)
        for i, fields in enumerate(MORE_FILTERS)
    ]
    return [structs.replace(r, params=structs.replace(r.params, max_tokens=40)) for r in plain + filtered + more]


def interrupted(requests: list[Request], answers: dict[int, Answer]) -> list[Request]:
    """The requests with what they had got when something happened: one token, all but one, or some between."""
    cuts = [36, 16, 25, 17, 39, 7, 1]
    outputs = [answers[r.id].tokens[: min(cuts[i % 7], len(answers[r.id].tokens) - 1)] for i, r in enumerate(requests)]
    return [structs.replace(r, output=pack(output)) for r, output in zip(requests, outputs, strict=True)]


def assert_goes_on(decoder: Decoder, requests: list[Request], alone: dict[int, Answer], **change: Any) -> None:
    """Resumed in the middle, every request gets the rest of its answer; what is drawn again is equal, and all of it is drawn."""
    resumed = interrupted(requests, alone)
    outputs, plans, scheduler = runner.serve(decoder, MESH, resumed, replace(LIMITED, **change), compiled())
    rest = collect(requests, outputs)
    for request in resumed:
        length, whole = len(request.output) // 4, alone[request.id]
        assert rest[request.id] == Answer(whole.tokens[length:], whole.logprobs[length:])
    redrawn = sum(sum(plan.redraw) for plan in plans)
    assert redrawn == sum(min(MAX_REDRAWN, len(r.output) // 4) for r in resumed)
    assert (scheduler.stats().resumed, scheduler.stats().resume_mismatches) == (len(resumed), 0), scheduler.take_mismatches()


@pytest.fixture(scope="module")
def alone(decoder: Decoder) -> dict[int, Answer]:
    torch.set_num_threads(1)
    answers = collect(all_features(), runner.serve(decoder, MESH, all_features(), LIMITED).outputs)
    assert sum(len(answer.tokens) == 40 for answer in answers.values()) > 10
    assert set(answers[21].tokens) == {3, 4}
    return answers


@pytest.mark.parametrize("change", SCHEDULES, ids=str)
def test_an_answer_goes_on_and_its_last_tokens_are_equal(
    decoder: Decoder, alone: dict[int, Answer], change: dict[str, Any]
) -> None:
    assert_goes_on(decoder, all_features(), alone, **change)


def test_few_rows_at_the_head_at_once(decoder: Decoder, alone: dict[int, Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits_chunking, "HEAD_BYTES", 5 * SPEC.vocab_size * logits_chunking.FILTERED_BYTES)
    assert_goes_on(decoder, all_features(), alone)


def test_what_others_have_cached_is_not_skipped(decoder: Decoder, alone: dict[int, Answer]) -> None:
    """The same requests from their beginning run beside, and the blocks that they fill end up in both."""
    fresh = [structs.replace(r, id=r.id + 100) for r in all_features()]
    resumed = interrupted(all_features(), alone)
    outputs, plans, scheduler = runner.serve(decoder, MESH, [*fresh, *resumed], LIMITED)
    answers = collect([*fresh, *resumed], outputs)
    assert all(answers[r.id].tokens == alone[r.id - 100].tokens for r in fresh)
    assert sum(sum(plan.redraw) for plan in plans) == sum(min(MAX_REDRAWN, len(r.output) // 4) for r in resumed)
    assert scheduler.stats().prefix_cache_hits > 0 and scheduler.stats().resume_mismatches == 0


@pytest.mark.parametrize("change", SCHEDULES[:2], ids=str)
def test_a_wrong_token_is_counted_and_stays(decoder: Decoder, alone: dict[int, Answer], change: dict[str, Any]) -> None:
    requests = interrupted(all_features(), alone)
    corrupt = [r for r in requests if len(r.output) // 4 >= 5 and r.params.temperature == 0.0]
    assert len(corrupt) > 2
    ids = {r.id for r in corrupt}
    for r in corrupt:
        at = len(r.output) - 4 * 3
        wrong = (int.from_bytes(r.output[at : at + 4], "little") + 1) % SPEC.vocab_size
        bad = structs.replace(r, output=r.output[:at] + pack([wrong]) + r.output[at + 4 :])
        requests[requests.index(r)] = bad
    outputs, plans, scheduler = runner.serve(decoder, MESH, requests, replace(LIMITED, **change))
    told = scheduler.take_mismatches()
    assert {id for id, _, _ in told} == ids and len(told) == len(ids)
    assert all(count == min(MAX_REDRAWN, len(r.output) // 4) for id, _, count in told for r in requests if r.id == id)
    assert scheduler.stats().resume_mismatches == sum(different for _, different, _ in told)
    sent = {a.tokens for plan in plans for a in plan.new_sequences}
    assert {r.prompt + r.output for r in requests} <= sent, "the known tokens stay"
    collect(requests, outputs)


def test_what_is_preempted_is_not_drawn_again(decoder: Decoder) -> None:
    growing = [Request(i, pack(range(i, i + 20)), EngineSamplingParams(temperature=0.7, max_tokens=60), seed=i) for i in range(7)]
    _, plans, scheduler = runner.serve(decoder, MESH, growing, replace(LIMITS, num_blocks=20))
    assert scheduler.stats().preemptions > 0 and not any(plan.redraw for plan in plans)


def test_a_grammar_goes_on(decoder: Decoder) -> None:
    """Its masks hold for what is drawn again."""
    long = EngineSamplingParams(temperature=0.9, max_tokens=60, grammar=LLMatcher.grammar_from_regex("[ab]{40}!"))
    requests = [*grammar_requests(), *(Request(i, pack(range(i, i + 20)), long, seed=i) for i in range(20, 24))]
    whole = collect(requests, runner.serve(decoder, MESH, requests, LIMITED, compiled()).outputs)
    assert all(len(whole[i].tokens) >= 40 for i in range(20, 24))
    for change in SCHEDULES[:3]:
        assert_goes_on(decoder, requests, whole, **change)
