"""The simulated card itself: what it forbids, what it counts, and that a replay is what a graph's replay is."""

import pytest
import torch

from tests.card.simulated import SimulatedCard
from tests.card.tensors import DeviceTensor, HostRead
from tpserve_kernels import norm


def test_values_of_the_card_are_not_read() -> None:
    with SimulatedCard():
        x = torch.ones(3, device="cuda")
        for read in (
            lambda: x.tolist(), lambda: x[0].item(), lambda: int(x[0]), lambda: bool(x[0] > 0), lambda: x.cpu(),
            lambda: x.nonzero(), lambda: x[x > 0], lambda: torch.empty(3).copy_(x),
        ):  # fmt: skip
            with pytest.raises(HostRead):
                read()


def test_pinned_memory_is_read_after_a_wait() -> None:
    with SimulatedCard() as card:
        x = torch.arange(3, device="cuda") * 2
        there = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
        event = torch.Event("cuda")
        event.record()
        with pytest.raises(HostRead):
            there.tolist()
        assert not event.query()
        event.synchronize()
        assert there.tolist() == [0, 2, 4] and card.record.waits == ["event"]


def test_pinned_memory_does_not_change_while_it_is_read() -> None:
    with SimulatedCard() as card:
        here, there = torch.zeros(4, pin_memory=True), torch.zeros(4, device="cuda")
        there.copy_(here, non_blocking=True)
        here.fill_(1)
        with pytest.raises(AssertionError, match="changed while"):
            card.finish()


def test_launches_are_counted() -> None:
    with SimulatedCard() as card:
        x, weight = torch.ones(3, 16, device="cuda"), torch.ones(16, device="cuda")
        with card.recording() as record:
            y = norm.rms_norm(x[1:], weight, 1e-5).view(-1).float() + 1
        assert record.launches == ["_norm_kernel", "add"] and record.allocations == ["empty", "add"] and y.is_cuda
        with card.recording() as record:
            torch.zeros(2).to("cuda")
        assert record.to_device == ["pageable"]


def test_a_replay_reads_the_same_memory() -> None:
    with SimulatedCard() as card:
        x, weight = torch.zeros(2, 16, device="cuda"), torch.ones(16, device="cuda")
        results: list[torch.Tensor] = []

        def work() -> None:
            y = norm.rms_norm(x, weight, 1e-5) * 3
            y[0] += 1
            results.append(y)

        replay = card.capture(work)
        for seed in (1, 2):
            torch.manual_seed(seed)
            x.copy_(torch.randn(2, 16).pin_memory(), non_blocking=True)
            work()
            replay()
            assert isinstance(results[0], DeviceTensor) and isinstance(results[-1], DeviceTensor)
            assert torch.equal(results[0].host, results[-1].host)


def test_what_a_graph_cannot_replay() -> None:
    with SimulatedCard() as card:
        x = torch.zeros(2, device="cuda")
        for work in (
            lambda: x.copy_(torch.ones(2).pin_memory(), non_blocking=True), lambda: torch.ones(2).to("cuda"), lambda: x.nonzero(),
            lambda: torch.empty(2, pin_memory=True).copy_(x, non_blocking=True),
        ):  # fmt: skip
            with pytest.raises(HostRead):
                card.capture(work)
