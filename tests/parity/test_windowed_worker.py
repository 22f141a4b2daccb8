"""Windows through scheduler and model runner: the same bits alone, in company, in chunks, from the prefix cache, after
preemption."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from msgspec import structs

from tests.parity.test_worker import LIMITS, SPEC, Answer, layout, make_requests, serve
from tpserve.models.decoder import Decoder
from tpserve.models.transformer import cache_groups
from tpserve.parallel.group import Group
from tpserve.types.packed import pack, unpack
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams
from tpserve.types.window import first_block
from tpserve.weights.dummy import dummy

WINDOWS = {"all": [24, 24, 24], "some": [24, None, 5]}


@pytest.fixture(scope="module", params=WINDOWS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return made(WINDOWS[request.param])


def made(windows: list[int | None]) -> Decoder:
    """The same weights whatever the windows."""
    spec = structs.replace(SPEC, cache=cache_groups(windows))
    decoder = Decoder(spec, layout(), 0, Group(), torch.float32, torch.device("cpu"), LIMITS.max_model_len)
    dummy(decoder.parameters(), seed=3)
    decoder.prepack()
    return decoder


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def sized(decoder: Decoder, **changes: Any) -> Any:
    return replace(LIMITS, windows=decoder.spec.windows, num_blocks=300 * len(decoder.spec.windows), **changes)


@pytest.fixture(scope="module")
def alone(decoder: Decoder) -> dict[int, Answer]:
    return {r.id: serve(decoder, [r], sized(decoder))[0][r.id] for r in make_requests()}


def test_a_window_changes_what_is_longer_and_nothing_else(decoder: Decoder, alone: dict[int, Answer]) -> None:
    full, _ = serve(made([None] * 3), make_requests(), LIMITS)
    narrowest = min(window for window in decoder.spec.windows if window is not None)
    within = {r.id for r in make_requests() if len(r.prompt) // 4 + r.params.max_tokens <= narrowest + 1}
    assert {id for id in alone if alone[id] == full[id]} == within


@pytest.mark.parametrize("change", [
    {},
    {"max_num_batched_tokens": 16},
    {"max_num_batched_tokens": 37, "max_num_seqs": 3},
    {"block_size": 8},
    {"depth": 3, "sync_sampling": True, "block_size": 7},
], ids=str)  # fmt: skip
def test_any_schedule_gives_the_same_bits(decoder: Decoder, alone: dict[int, Answer], change: dict[str, Any]) -> None:
    """Twice: the second time what a window still sees comes from the prefix cache."""
    again = [structs.replace(r, id=r.id + 100) for r in make_requests()]
    limits = sized(decoder, **change)
    answers, scheduler = serve(decoder, make_requests() + again, limits)
    assert answers == alone | {id + 100: answer for id, answer in alone.items()}
    whole = [(len(unpack(r.prompt)) - 1) // limits.block_size * limits.block_size for r in again]
    assert scheduler.stats().prefix_cache_hits == sum(whole)
    assert any(first_block(count, 24, limits.block_size) for count in whole), "positions that no window sees are not looked up"


def test_preempted_and_recomputed(decoder: Decoder) -> None:
    growing = [
        Request(i, pack(range(i, i + 20)), EngineSamplingParams(temperature=0.7 * (i % 2), max_tokens=60, logprobs=0), seed=i)
        for i in range(5)
    ]
    undisturbed, _ = serve(decoder, growing, sized(decoder))
    few = replace(sized(decoder, block_size=8), num_blocks=15 if len(decoder.spec.windows) == 1 else 32)
    batched, scheduler = serve(decoder, growing, few)
    assert scheduler.stats().preemptions > 0, "the pool is small enough to run short"
    assert batched == undisturbed


def test_a_prompt_longer_than_all_blocks() -> None:
    """With windows only, a long sequence needs no more than they hold."""
    decoder = made([24] * 3)
    requests = [r for r in make_requests() if len(unpack(r.prompt)) > 100]
    answers, scheduler = serve(decoder, requests, replace(sized(decoder), num_blocks=5))
    assert answers == {r.id: serve(decoder, [r], sized(decoder))[0][r.id] for r in requests}
    assert scheduler.config.num_blocks * 16 < 100
