"""At the widths of real models, where the libraries' paths part by the number of rows: a request alone and in a crowd."""

from dataclasses import replace

import pytest
import torch

from tests.parity.test_worker import LIMITS, Answer, serve
from tests.specs import small
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.types.layout import ParallelLayout
from tpserve.types.packed import pack
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams
from tpserve.weights.dummy import dummy

DTYPES = (torch.float32, torch.bfloat16)


def alone_and_in_company(dtype: torch.dtype, num_layers: int, inner: int, crowd: int, tried: int, length: int) -> None:
    """`tried` of a crowd of requests, each by itself, and all of them together: equal tokens and log probabilities."""
    spec = small(num_layers=num_layers, hidden_size=2048, intermediate_size=inner, num_heads=4, num_kv_heads=2, head_dim=64)
    decoder = Decoder(spec, ParallelLayout(1, 1, (num_layers,)), 0, Group(), dtype, torch.device("cpu"), LIMITS.max_model_len)
    dummy(decoder.parameters(), seed=5)
    decoder.prepack()
    params = EngineSamplingParams(temperature=1.0, max_tokens=length, logprobs=0)
    requests = [Request(i, pack([(7 * i + 11 * k) % 517 for k in range(3 + i % 5)]), params, seed=i) for i in range(crowd)]
    limits = replace(LIMITS, max_num_seqs=64, num_blocks=600, max_num_batched_tokens=512)
    together, _ = serve(decoder, requests, limits)
    alone: dict[int, Answer] = {}
    for request in requests[:: crowd // tried]:
        alone |= serve(decoder, [request], limits)[0]
    assert {id: together[id] for id in alone} == alone
    assert len(alone) >= tried and len({tuple(answer.tokens) for answer in together.values()}) > crowd // 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_in_a_crowd(dtype: torch.dtype) -> None:
    alone_and_in_company(dtype, num_layers=1, inner=64, crowd=40, tried=2, length=3)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_of_a_crowd(dtype: torch.dtype) -> None:
    alone_and_in_company(dtype, num_layers=2, inner=5632, crowd=48, tried=48, length=8)
