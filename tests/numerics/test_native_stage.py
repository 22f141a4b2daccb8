"""The layers as one list of operations and one operation after the other: the same bits, also on ranks and in int8."""

import mmap
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.parity.runner import Runner, mixed
from tests.specs import small
from tpserve.config.flags import Quantization
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.parallel.pipeline import Pipeline
from tpserve.parallel.shm import SLOT_BYTES, ShmAllReduce
from tpserve.types.layout import ParallelLayout
from tpserve.types.model_spec import ModelSpec
from tpserve.weights.dummy import dummy
from tpserve_kernels.cpu.library import library

LENGTHS = (3, 21)
SEQUENCES = [[(7 * i + 3 * k) % 517 for k in range(length)] for i, length in enumerate(LENGTHS)]
STEPS = mixed(LENGTHS, LENGTHS, (2, 9))
LIST = "one list of operations"
BIASED = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "norm": "layer", "activation": "gelu", "gated": False}
ODD = {"norm_place": "around", "qk_norm": "head", "norm_offset": 1.0, "activation": "gelu_tanh"}

pytestmark = pytest.mark.skipif(library() is None, reason="needs the library of CPU kernels")


def decoder(spec: ModelSpec, tp: Group, dtype: torch.dtype, quantization: Quantization | None, kv_int8: bool = False) -> Decoder:
    made = Decoder(spec, ParallelLayout(tp.size, 1, (2,)), 0, tp, dtype, torch.device("cpu"), 64, kv_int8)
    dummy(made.parameters())
    made.prepack(quantization)
    return made


def both_forms(made: Decoder, tp: Group) -> list[list[torch.Tensor]]:
    runner = Runner(made, tp, Pipeline(None, None), 2)
    in_one_list = runner.run(SEQUENCES, STEPS)
    made.runs_as_list = False
    return [in_one_list, runner.run(SEQUENCES, STEPS)]


@pytest.mark.parametrize(
    ("fields", "quantization", "kv_int8"),
    [
        ({}, None, False),
        (BIASED, None, True),
        (ODD, None, True),
        ({}, "int8", True),
        (BIASED, "int8", False),
        (ODD, "int8", True),
    ],
    ids=["plain", "biased-kv", "odd-kv", "plain-int8-kv", "biased-int8", "odd-int8-kv"],
)
def test_both_forms_have_the_same_bits(fields: dict[str, Any], quantization: Quantization | None, kv_int8: bool) -> None:
    spec = small(num_layers=2, **fields)
    for dtype in (torch.float32, torch.bfloat16):
        made = decoder(spec, Group(), dtype, quantization, kv_int8)
        assert made.form == LIST
        for actual, expected in zip(*both_forms(made, Group()), strict=True):
            assert torch.isfinite(actual).all() and torch.equal(actual, expected)


class ThreadGroup(Group):
    """Threads of this process are the ranks."""

    def __init__(self, memory: mmap.mmap, size: int, rank: int) -> None:
        super().__init__(shm=ShmAllReduce(memory, range(size), rank, [-1] * size, spins=False))
        self.size, self.rank = size, rank

    def all_gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        return [[int(value) for value in each] for each in self.all_gather(torch.tensor(values))]


def on_ranks(size: int, spec: ModelSpec, dtype: torch.dtype, quantization: Quantization | None) -> list[list[torch.Tensor]]:
    """Both forms' logits on rank 0."""
    memory = mmap.mmap(-1, mmap.PAGESIZE + 2 * size * SLOT_BYTES)
    results: dict[int, list[list[torch.Tensor]]] = {}

    def rank_main(rank: int) -> None:
        torch.set_num_threads(1 + rank % 2)
        tp = ThreadGroup(memory, size, rank)
        made = decoder(spec, tp, dtype, quantization)
        assert made.form == LIST
        results[rank] = both_forms(made, tp)

    ranks = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert len(results) == size
    return results[0]


@pytest.mark.parametrize(
    ("size", "fields", "quantization"),
    [(2, ODD, None), (2, BIASED, "int8"), (3, ODD, "int8")],  # a bias after a sum of floats over ranks has no operation
    ids=["2-odd", "2-biased-int8", "3-odd-int8"],
)
def test_ranks_of_a_host(size: int, fields: dict[str, Any], quantization: Quantization | None) -> None:
    """In int8 they have the bits of one rank."""
    spec = small(num_layers=2, **fields)
    for dtype in (torch.float32, torch.bfloat16):
        alone = both_forms(decoder(spec, Group(), dtype, quantization), Group())[0]
        in_one_list, one_by_one = on_ranks(size, spec, dtype, quantization)
        for actual, other, expected in zip(in_one_list, one_by_one, alone, strict=True):
            assert torch.isfinite(actual).all() and torch.equal(actual, other)
            assert not quantization or torch.equal(actual, expected)
