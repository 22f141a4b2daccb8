"""The sampler on a card: the tokens and the filtered logits of the CPU, and no wait for the device."""

from array import array

import pytest
import torch

from tests.unit.test_draw import columns, logits, whole
from tests.unit.test_filters import filtered, make_rows
from tpserve.sampler.draw import DrawParams
from tpserve.worker.host_arrays import copy_arrays

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_gpu_draws_the_same_and_never_waits() -> None:
    x, rest = logits(60, 1000), columns(60)
    temperature_S, seed_S, position_S, choice_S = (column.cuda() for column in (rest.temperature_S, *rest.counters))
    on_card, rest_on_card = x.cuda(), DrawParams(temperature_S, seed_S, position_S, choice_S)
    whole(on_card, rest_on_card)
    torch.cuda.set_sync_debug_mode("error")
    tokens = whole(on_card, rest_on_card)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(tokens.cpu(), whole(x, rest))


def test_a_gpu_filters_the_same_and_never_waits() -> None:
    rows = make_rows()
    expected, got = filtered(rows), filtered(rows, "cuda").cpu()
    assert torch.equal(got.isinf(), expected.isinf())
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-5)


def test_arrays_reach_a_gpu_in_one_copy_and_nothing_waits() -> None:
    arrays: list[array[int] | array[float]] = [array("i", [1, 2, 3]), array("q", [1 << 40]), array("f", []), array("f", [0.5])]
    torch.cuda.set_sync_debug_mode("error")
    tensors = copy_arrays(arrays, torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("default")
    assert [each.tolist() for each in tensors] == [[1, 2, 3], [1 << 40], [], [0.5]]
