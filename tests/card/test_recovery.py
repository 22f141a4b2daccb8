"""Graphs are captured before a rank is ready, at the start and after a fault; a stage of one rank keeps them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.card.engine import CARD, TINY
from tests.card.simulated import SimulatedCard
from tpserve.cli.server_flags import parse
from tpserve.config.env import RankEnv
from tpserve.config.resolve import resolve
from tpserve.observe.start_timer import StartTimer
from tpserve.parallel.group import Group
from tpserve.parallel.mesh import Mesh
from tpserve.parallel.pipeline import Pipeline
from tpserve.types.layout import ParallelLayout
from tpserve.types.machine import Machine
from tpserve.types.messages import MemoryLedger
from tpserve.types.model_files import ModelFiles
from tpserve.types.packed import pack
from tpserve.types.plan import Chunk, NewSequence, StepPlan
from tpserve.types.sampling import EngineSamplingParams
from tpserve.worker import loaded_model
from tpserve.worker.decode_graphs import buckets_up_to
from tpserve.worker.loaded_model import LoadedModel

SEQS = 2
BUCKETS = len(buckets_up_to(SEQS))


class FirstOfTwo(Group):
    """A rank whose peer adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 2

    @property
    def can_be_captured(self) -> bool:
        return True

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack((x, x))


@pytest.mark.parametrize("tp", [1, 2])
def test_graphs_are_captured_before_every_epoch(tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In service none is; an epoch of another group captures all anew (launches alone), one without collectives keeps them."""
    layout = ParallelLayout(tp, 1, (TINY.num_layers,))
    flags = parse(f"m -tp {tp} --load-format dummy --max-model-len 64 --max-num-seqs {SEQS} --device cuda".split())
    config = resolve(flags, ModelFiles("m", "m"), TINY, Machine(tp, tp, 1, tp, 2, "serve"))
    env = RankEnv(0, tp, 0, tp, 0, 1, "", 0, "", False, 1, None, None)
    ledger = MemoryLedger(0, 0, 0, 0, 0, 0, 0, 16, 16, 64)
    with SimulatedCard(computes=tp == 1) as card:
        captured: list[int] = []

        def capture(work: Callable[[], None]) -> Callable[[], None]:
            captured.append(1)
            return card.capture(work)

        monkeypatch.setattr(loaded_model, "CudaCapture", lambda: capture)
        model = LoadedModel(config, TINY, env, {}, {}, None, lambda phase, percent: None)
        drawn: list[Any] = []
        for epoch in range(2):
            group = Group() if tp == 1 else FirstOfTwo()
            mesh = Mesh(0, layout, group, Group(), Pipeline(), CARD)
            runner = model.join(mesh, ledger, 0, StartTimer(1))
            ready = BUCKETS * (1 + (epoch if tp == 2 else 0))
            assert len(captured) == ready, "before the rank is ready"
            new = [NewSequence(0, pack(range(1, 9)), 8, EngineSamplingParams(), 0, 0, (pack([1]), pack([2])))]
            launched = [runner.launch(StepPlan.of(epoch, 0, [Chunk(0, 0, 8, sample=True)], new))]
            launched += [runner.launch(StepPlan.of(epoch, step, [Chunk(0, 7 + step, 1, sample=True)])) for step in (1, 2)]
            drawn.append([step.wait().tokens for step in launched])
            assert len(captured) == ready and card.record.replays == 2 * (epoch + 1), "none in service"
        assert drawn[0] == drawn[1]
