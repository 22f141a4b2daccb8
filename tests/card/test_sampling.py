"""What sampling launches on a card: few kernels, one copy of parameters, and no waiting."""

from array import array

import pytest
import torch

from tests.card.engine import CARD, TINY, CardEngine
from tests.card.simulated import Record, SimulatedCard
from tpserve.types.packed import pack
from tpserve.types.plan import Chunk, NewSequence, StepPlan
from tpserve.types.sampling import EngineSamplingParams
from tpserve.worker.input_batch import ChunkArrays

PLAIN = ["_norm_kernel", "mm", "_blocks_kernel", "_draw_kernel"]
FILTERS = {
    "top_k, top_p and min_p": ({"top_k": 5, "top_p": 0.9, "min_p": 0.01}, ["_truncate_kernel"]),
    "penalties": ({"frequency_penalty": 0.5, "repetition_penalty": 1.1}, ["_penalize_kernel"]),
    "masks": (
        {"logit_bias": ((3, 1.0),), "bad_words": ((1, 2), (4,)), "allowed_token_ids": (1, 2, 3)},
        ["_allow_kernel", "_ban_kernel", "_bias_kernel"],
    ),
}


def sampled(params: EngineSamplingParams) -> Record:
    """What the sampler does for three sequences of this kind."""
    with SimulatedCard() as card:
        engine = CardEngine(TINY)
        stage = engine.runner._sampler_stage
        assert stage is not None
        new = [NewSequence(slot, pack(range(1, 9)), 6, params, slot, 0, (b"", b"")) for slot in range(3)]
        plan = StepPlan.of(0, 0, [Chunk(slot, 7, 1, sample=True) for slot in range(3)], new)
        engine.runner._request_pool.update(plan)
        hidden_TH = torch.zeros(3, TINY.hidden_size, device=CARD)
        with card.recording() as record:
            output = stage.run(hidden_TH, plan, ChunkArrays.of(plan))
        card.finish()
        tokens = array("i", output.result(plan).tokens)
    assert len(tokens) == 3 and all(0 <= token < TINY.vocab_size for token in tokens)
    assert not record.waits
    return record


def test_a_plain_batch() -> None:
    record = sampled(EngineSamplingParams(temperature=0.8))
    assert record.launches == PLAIN and record.to_device == ["pinned"] and record.to_host == ["pinned"]


@pytest.mark.parametrize("name", FILTERS)
def test_filters_are_a_launch_each(name: str) -> None:
    fields, launches = FILTERS[name]
    record = sampled(EngineSamplingParams(temperature=0.8, **fields))  # type: ignore[arg-type]
    assert record.launches == [*PLAIN[:2], "_write_kernel", *launches, *PLAIN[2:]]
    assert record.to_device == ["pinned"] * 2, "one for the rows, one for all filters"


def test_logprobs_are_three_launches() -> None:
    record = sampled(EngineSamplingParams(logprobs=5))
    assert record.launches == [*PLAIN, "_best_keys_kernel", "_masses_kernel", "_from_parts_kernel"]
