"""A model whose KV cache is of int8: near the same model, and a row's bits are those of the row alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.parity.runner import Runner
from tests.specs import LATENTS, small
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.parallel.pipeline import Pipeline
from tpserve.types.layout import ParallelLayout
from tpserve.types.model_spec import CacheGroup
from tpserve.weights.dummy import dummy
from tpserve_kernels.cpu.library import library

LENGTHS = (150, 7, 40)
DENSE_LATENTS = {name: value for name, value in LATENTS.items() if name != "experts"}
"""Where two experts are about equally probable, the last bit of anything decides between them."""


def runner(extra: dict[str, Any], dtype: torch.dtype, kv_int8: bool) -> Runner:
    spec = small(**extra)
    decoder = Decoder(spec, ParallelLayout(1, 1, (4,)), 0, Group(), dtype, torch.device("cpu"), 200, kv_int8)
    dummy(decoder.parameters())
    decoder.prepack()
    return Runner(decoder, Group(), Pipeline(), 4)


@pytest.mark.skipif(library() is None, reason="no library of CPU kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extra", [{}, {"cache": (CacheGroup((0, 2)), CacheGroup((1, 3), window=30))}, DENSE_LATENTS])
def test_a_cache_of_int8(extra: dict[str, Any], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(517, (length,), generator=generator).tolist() for length in LENGTHS]
    whole = [[(i, 0, length)] for i, length in enumerate(LENGTHS)]
    chunked = [[(0, 0, 70)], [(0, 70, 79), (1, 0, 7)], [(2, 0, 40), (0, 149, 1)]]
    run = runner(extra, dtype, True)
    in_int8, apart = run.run(sequences, chunked), run.run(sequences, whole)
    usual = runner(extra, dtype, False).run(sequences, whole)
    for one, other in zip(in_int8, apart, strict=True):
        assert torch.equal(one, other)
    got, expected = (torch.cat(rows).float().log_softmax(1) for rows in (in_int8, usual))
    assert not torch.equal(got, expected)
    assert F.kl_div(got, expected, log_target=True, reduction="batchmean") < 5e-4
