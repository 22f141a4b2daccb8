"""The layers as one list of operations and one operation after the other: the same bits."""

from typing import Any

import pytest
import torch

from tests.parity.runner import Runner, mixed
from tests.specs import small
from tpserve.config.schema import Quantization
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.parallel.pipeline import Pipeline
from tpserve.types.layout import ParallelLayout
from tpserve.weights.dummy import dummy
from tpserve_kernels.cpu.library import library

LENGTHS = (3, 21)
LIST = "one list of operations"
BIASED = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "norm": "layer", "activation": "gelu", "gated": False}
ODD = {"norm_place": "around", "qk_norm": "head", "norm_offset": 1.0, "activation": "gelu_tanh"}


@pytest.mark.skipif(library() is None, reason="needs the library of CPU kernels")
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("fields", [{}, BIASED, ODD], ids=["plain", "biased", "odd"])
def test_both_forms_have_the_same_bits(fields: dict[str, Any], quantization: Quantization | None) -> None:
    spec = small(num_layers=2, **fields)
    sequences = [[(7 * i + 3 * k) % 517 for k in range(length)] for i, length in enumerate(LENGTHS)]
    for dtype in (torch.float32, torch.bfloat16):
        decoder = Decoder(spec, ParallelLayout(1, 1, (2,)), 0, Group(), dtype, torch.device("cpu"), 64)
        dummy(decoder.parameters())
        decoder.prepack(quantization)
        assert decoder.form == LIST
        runner = Runner(decoder, Group(), Pipeline(None, None), 2)
        steps = mixed(LENGTHS, LENGTHS, (2, 9))
        in_one_list = runner.run(sequences, steps)
        decoder.runs_as_list = False
        for actual, expected in zip(in_one_list, runner.run(sequences, steps), strict=True):
            assert torch.isfinite(actual).all() and torch.equal(actual, expected)
