"""The part of the skeleton that needs torch: one epoch of a rank."""

import time

import torch

from tpserve.config.env import RankEnv
from tpserve.parallel.mesh import form, leave
from tpserve.parallel.store import agent_store, host_store, join_store
from tpserve.types.layout import ParallelLayout
from tpserve.types.messages import MemoryLedger
from tpserve.wire.attach import Attachment
from tpserve.wire.control import Control

__all__ = ["agent_store", "take_part"]

LEDGER = MemoryLedger(0, 0, 0, 0, 0, 0, 0, 1, 16, 256)
torch.set_num_threads(1)


def take_part(env: RankEnv, control: Control, found: Attachment, timeout_s: float) -> None:
    """Form the mesh and add numbers every few milliseconds, until told to stop (returns by Stopped or by a broken collective)."""
    hosted, address = host_store(found.address) if env.rank == 0 else (None, "")
    control.hello({"store": address} if hosted else {}, {"skeleton": "1"}, {})
    start = control.wait_start()
    store = hosted if hosted is not None else join_store(start.endpoints["store"])
    layout = ParallelLayout(env.world_size, 1, (1,))
    mesh = form(env.rank, layout, start.epoch, store, torch.device("cpu"), timeout_s)
    try:
        control.up(LEDGER, {})
        control.wait_run()
        expected = sum(range(env.world_size)) + start.epoch * env.world_size
        while True:
            total = mesh.tp.all_reduce(torch.full((64,), float(env.rank + start.epoch)))
            assert total.unique().tolist() == [expected], "two epochs have met in one collective"
            stop = torch.tensor([float(control.stop is not None)])
            if mesh.tp.all_reduce(stop).item():  # all leave after the same step
                control.wait_run()  # raises Stopped once Stop has come here too
                time.sleep(0.01)
            time.sleep(0.003)
    finally:
        leave(mesh)
