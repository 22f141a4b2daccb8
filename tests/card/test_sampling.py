"""What sampling launches on a card: few kernels, one copy of parameters, and no waiting."""

from array import array
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from tests.card.engine import CARD, TINY, CardEngine
from tests.card.simulated import Record, SimulatedCard
from tpserve.parallel.group import Group
from tpserve.parallel.mesh import Mesh
from tpserve.parallel.pipeline import Pipeline
from tpserve.types.layout import ParallelLayout
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


class SecondOfThree(Group):
    """A rank whose peers pass on what it does, and the sizes of what it gathers."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.size, self.gathered = 1, 3, list[int]()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self.gathered.append(x.nbytes)
        return torch.stack((x, x, x))


PER_ID = {"logit_bias": ((3, 1.0),), "frequency_penalty": 0.5, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("asked", "whole"),
    [((PER_ID, PER_ID), 0), ((PER_ID, {"top_p": 0.9}), 1), (({"bad_words": ((3,),)}, {"top_k": 5}), 2), (({}, PER_ID), 0)],
)
def test_ranks_gather_only_the_rows_that_need_it(asked: tuple[dict[str, Any], ...], whole: int) -> None:
    with SimulatedCard(computes=False) as card:
        group = SecondOfThree()
        layout = ParallelLayout(3, 1, (TINY.num_layers,))
        spec = replace(TINY, num_heads=3, num_kv_heads=3, vocab_size=384)
        engine = CardEngine(spec, mesh=Mesh(1, layout, group, Group(), Pipeline(), CARD))
        stage = engine.runner._sampler_stage
        assert stage is not None and [len(shard) for shard in engine.runner._decoder.vocab_shards] == [128] * 3
        requests = [EngineSamplingParams(temperature=0.8, **fields) for fields in asked]
        new = [NewSequence(slot, pack(range(1, 9)), 6, params, slot, 0, (b"", b"")) for slot, params in enumerate(requests)]
        plan = StepPlan.of(0, 0, [Chunk(slot, 7, 1, sample=True) for slot in range(2)], new)
        engine.runner._request_pool.update(plan)
        output = stage.run(torch.zeros(2, TINY.hidden_size, device=CARD), plan, ChunkArrays.of(plan))
        card.finish()
        assert len(array("i", output.result(plan).tokens)) == 2
    rows = [size for size in group.gathered if size > 100]
    assert sum(rows) == whole * 128 * 4, "float32 logits of a part"
    assert len(group.gathered) - len(rows) == (1 if whole < 2 else 0) + (asked[0] == {}), "pairs of (value, id)"


def test_logprobs_are_three_launches() -> None:
    record = sampled(EngineSamplingParams(logprobs=5))
    assert record.launches == [*PLAIN, "_best_keys_kernel", "_masses_kernel", "_from_parts_kernel"]
