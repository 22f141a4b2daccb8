"""One rank of a layout of simulated cards: python -m tests.card.rank RANK TP PP STORE

Runs a random history launch by launch and as graphs; the outputs must be equal.
"""

import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from tests.card.engine import CARD, TINY, CardEngine, history
from tests.card.simulated import SimulatedCard
from tpserve.parallel.group import Group
from tpserve.parallel.mesh import Mesh
from tpserve.parallel.pipeline import Pipeline
from tpserve.types.layout import ParallelLayout, even_layers


def run(work: Callable[[], None]) -> Callable[[], None]:
    """A graph that is none."""
    work()
    return work


def main(rank: int, tp: int, pp: int, store: str) -> None:
    torch.set_num_threads(1)
    world_size = tp * pp
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )
    layout, stage = ParallelLayout(tp, pp, even_layers(TINY.num_layers, pp)), rank // tp
    groups = [dist.new_group([at * tp + i for i in range(tp)]) for at in range(pp)]
    group = Group(groups[stage] if tp > 1 else None)

    def mesh() -> Mesh:
        pipeline = Pipeline(rank - tp if stage > 0 else None, rank + tp if stage < pp - 1 else None, in_flight=pp + 1)
        return Mesh(rank, layout, group, Group(), pipeline, CARD)

    with SimulatedCard():
        expected = history(CardEngine(capture=run, mesh=mesh()), 2, 3)
    with SimulatedCard() as card:
        engine = CardEngine(capture=card.capture, mesh=mesh())
        assert history(engine, 2, 3) == expected, "a replay is not what it replays"
        assert card.record.replays > 4
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])
