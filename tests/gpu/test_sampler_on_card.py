"""The sampler on a card: the tokens and the filtered logits of the CPU, and no wait for the device."""

from array import array

import pytest
import torch

from tests.unit.test_draw import columns, logits, whole
from tests.unit.test_filters import filtered, make_rows
from tpserve.parallel.group import Group
from tpserve.sampler.draw import DrawParams, draw_rows
from tpserve.sampler.logits import CardLogits
from tpserve.worker.host_arrays import copy_arrays
from tpserve_kernels.sampler_types import DrawTarget, RawLogits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_gpu_draws_the_same_never_waits_and_replays() -> None:
    x, rest = logits(60, 1000), columns(60)
    temperature_S, seed_S, position_S, choice_S = (column.cuda() for column in (rest.temperature_S, *rest.counters))
    params = DrawParams(temperature_S, seed_S, position_S, choice_S)
    on_card, out_S = CardLogits(RawLogits(x.cuda())), torch.empty(60, dtype=torch.int64, device="cuda")
    slot_S, tokens_XL = torch.arange(60, device="cuda"), torch.zeros(60, 10_001, dtype=torch.int32, device="cuda")

    def run() -> None:
        draw_rows(on_card, (range(1000),), params, Group(), DrawTarget(out_S, slot_S, tokens_XL))

    run()
    torch.cuda.set_sync_debug_mode("error")
    run()
    torch.cuda.set_sync_debug_mode("default")
    expected = whole(x, rest)
    assert torch.equal(out_S.cpu(), expected)
    assert torch.equal(tokens_XL[slot_S, params.position_S].cpu().long(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    params.position_S.add_(1)
    graph.replay()
    assert torch.equal(out_S.cpu(), whole(x, rest._replace(position_S=rest.position_S + 1)))


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
