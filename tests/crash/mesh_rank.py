"""The part of the skeleton that needs torch: one epoch of a rank."""

import time

import torch

from tpserve.cluster.discovery import FrontendAddress
from tpserve.config.env import RankEnv
from tpserve.parallel.mesh import destroy_distributed, init_distributed
from tpserve.parallel.store import agent_store, host_store, join_store
from tpserve.process.rank_agent import RankAgent
from tpserve.types.layout import ParallelLayout
from tpserve.types.messages import MemoryLedger

__all__ = ["agent_store", "take_part"]

LEDGER = MemoryLedger(0, 0, 0, 0, 0, 0, 0, 1, 16, 256)
torch.set_num_threads(1)


def take_part(env: RankEnv, rank_agent: RankAgent, frontend_address: FrontendAddress, timeout_s: float) -> None:
    """Form the mesh and add numbers every few milliseconds, until told to stop (returns by Stopped or by a broken collective)."""
    hosted, address = host_store(frontend_address.address) if env.rank == 0 else (None, "")
    rank_agent.hello({"store": address} if hosted else {}, {"skeleton": "1"}, {})
    start = rank_agent.wait_start()
    store = hosted if hosted is not None else join_store(start.endpoints["store"])
    layout = ParallelLayout(env.world_size, 1, (1,))
    mesh = init_distributed(env.rank, layout, start.epoch, store, torch.device("cpu"), timeout_s)
    try:
        rank_agent.ready(LEDGER, {})
        rank_agent.wait_run()
        expected = sum(range(env.world_size)) + start.epoch * env.world_size
        while True:
            total = mesh.tp.all_reduce(torch.full((64,), float(env.rank + start.epoch)))
            assert total.unique().tolist() == [expected], "two epochs have met in one collective"
            stop = torch.tensor([float(rank_agent.stop is not None)])
            if mesh.tp.all_reduce(stop).item():  # all leave after the same step
                rank_agent.wait_run()  # raises Stopped once Stop has come here too
                time.sleep(0.01)
            time.sleep(0.003)
    finally:
        destroy_distributed(mesh)
