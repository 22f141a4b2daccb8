"""Mixtures on the simulated card: the launches of a layer, and graphs of it, whose padding goes to no expert."""

from collections.abc import Iterator

import pytest
import torch
from msgspec.structs import replace

from tests.card.engine import CARD, TINY, CardEngine
from tests.card.simulated import SimulatedCard
from tests.card.tensors import DeviceTensor
from tpserve.layers.moe import MoE
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.types.layout import ParallelLayout
from tpserve.types.model_spec import CacheGroup, ExpertsSpec, RoutingSpec
from tpserve.types.packed import pack
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams
from tpserve.weights.dummy import dummy

QWEN = ExpertsSpec(5, 16, RoutingSpec(2, renormalise=True), layers=(0,))
DEEPSEEK = ExpertsSpec(
    6, 16, RoutingSpec(3, "sigmoid", "choice", num_groups=3, num_top_groups=2, group_best=2, scale=2.5), (0,), shared_size=16
)
LAUNCHES = ["_router_kernel", "_route_kernel", "_permute_kernel", "_grouped_kernel", "_gated_kernel", "_grouped_kernel"]


@pytest.fixture
def card() -> Iterator[SimulatedCard]:
    with SimulatedCard() as card:
        yield card


def mixture(experts: ExpertsSpec) -> MoE:
    spec = replace(TINY, num_layers=1, experts=experts, cache=(CacheGroup((0,)),))
    decoder = Decoder(spec, ParallelLayout(1, 1, (1,)), 0, Group(), torch.float32, CARD, 64)
    dummy(decoder.parameters())
    (block,) = decoder._blocks
    assert isinstance(block.mlp, MoE)
    return block.mlp


def host(x: torch.Tensor) -> torch.Tensor:
    assert isinstance(x, DeviceTensor)
    return x.host.clone()


def test_launches_of_a_layer_in_a_decode_step(card: SimulatedCard) -> None:
    """The seven of the mixture, six of attention and the norms, and one where attention is split."""
    engine = CardEngine(replace(TINY, num_layers=1, experts=QWEN, cache=(CacheGroup((0,)),)))
    engine.scheduler.add(Request(0, pack(range(1, 4)), EngineSamplingParams(max_tokens=8), seed=1), 0.0)
    engine.step()
    with card.recording() as record:
        assert len(engine.fill()) == 1
    launches = record.launches
    layer = launches[launches.index("_norm_kernel") : launches.index("_combine_kernel") + 1]
    assert layer[-7:] == [*LAUNCHES, "_combine_kernel"] and len(layer) <= 13


def test_launches_with_a_shared_expert(card: SimulatedCard) -> None:
    layer = mixture(DEEPSEEK)
    x_TH, slots_T = torch.ones(2, 32, device=CARD), torch.arange(2, device=CARD)
    with card.recording() as record:
        layer(x_TH, slots_T)
    assert record.launches == [*LAUNCHES, "mm", "_gated_kernel", "mm", "_combine_kernel"]
    assert not record.waits and not record.to_device and not record.to_host


def test_the_counts_of_all_layers_are_one_copy(card: SimulatedCard) -> None:
    spec = replace(TINY, experts=replace(QWEN, layers=(0, 1)))
    counts = Decoder(spec, ParallelLayout(1, 1, (2,)), 0, Group(), torch.float32, CARD, 64).expert_load
    assert counts is not None
    counts.of(1)[3] += 7
    with card.recording() as record:
        counts.publish()
    assert record.to_host == ["pinned"] and not record.launches and not record.allocations
    card.finish()
    assert counts.read() == bytes(8 * 8) + (7).to_bytes(8, "little") + bytes(8)


def test_a_replay_routes_what_is_there_now(card: SimulatedCard) -> None:
    """A replay equals an eager step of the real rows alone, in its rows and in what it counts; padding counts nothing."""
    layer, bucket, results = mixture(replace(DEEPSEEK, shared_size=0)), 3, []
    x_TH, slots_T = torch.zeros(bucket, 32, device=CARD), torch.full((bucket,), -1, device=CARD)
    replay = card.capture(lambda: results.append(layer(x_TH, slots_T)))
    assert not host(layer.expert_load).any(), "a capture has padding alone"
    for seed, rows in enumerate((2, 0, 3)):
        x = torch.randn(bucket, 32, generator=torch.Generator().manual_seed(seed))
        x[rows:] = torch.nan
        x_TH.copy_(x.pin_memory(), non_blocking=True)
        slots_T.copy_(torch.tensor([16 * row if row < rows else -1 for row in range(bucket)]).pin_memory(), non_blocking=True)
        before = host(layer.expert_load)
        replay()
        counted = host(layer.expert_load) - before
        assert counted.sum() == rows * DEEPSEEK.routing.num_active and not host(results[0])[rows:].any()
        if rows:
            alone = layer(x_TH[:rows], slots_T[:rows])
            assert torch.equal(host(alone), host(results[0])[:rows])
            assert torch.equal(host(layer.expert_load) - before, 2 * counted)
