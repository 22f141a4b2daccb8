"""Decode graphs: replay equals eager bit for bit, and a steady decode step is one copy, one launch and no waiting."""

import random
from collections.abc import Callable

import pytest

from tests.card.engine import CardEngine, history
from tests.card.simulated import SimulatedCard
from tpserve.types.packed import pack
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams
from tpserve.worker.decode_graphs import buckets_up_to


@pytest.mark.parametrize("seed", [1])
def test_replay_equals_eager(seed: int) -> None:
    def run(work: Callable[[], None]) -> Callable[[], None]:
        """A graph that is none: the host launches the padded step every time, on fresh memory."""
        work()
        return work

    with SimulatedCard():
        expected = history(CardEngine(capture=run), seed, 3)
    with SimulatedCard() as card:
        assert history(CardEngine(capture=card.capture), seed, 3) == expected
        assert card.record.replays > 5


def test_a_steady_decode_step() -> None:
    with SimulatedCard(computes=False) as card:
        engine = CardEngine(capture=card.capture, num_blocks=64)
        for number in range(3):
            params = EngineSamplingParams(max_tokens=40, temperature=0.8)
            engine.scheduler.add(Request(number, pack(range(1, 10 + number)), params, seed=number), 0.0)
        for _ in range(6):
            engine.step()
        with card.recording() as record:
            plans = engine.fill()
        assert len(plans) == record.replays == 1 and not record.launches and not record.allocations and not record.waits
        assert record.to_device == ["pinned"] and record.to_host == ["pinned"]


def test_buckets() -> None:
    rng = random.Random(0)
    for most in (1, 2, 3, 7, 8, 9, 100, 256, 300, 512, 513, 4096):
        buckets = buckets_up_to(most)
        assert buckets == sorted(set(buckets)) and buckets[-1] == min(most, 512)
        for _ in range(20):
            rows = rng.randint(1, buckets[-1])
            bucket = next(size for size in buckets if size >= rows)
            assert bucket <= max(8, rows * 3 // 2 + 1)
