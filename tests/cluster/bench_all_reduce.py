"""What an all-reduce between two ranks of this host costs through gloo and through shared memory, in turn in the same run.

    python -m tests.cluster.bench_all_reduce

Prints the median and the 90th percentile of rank 0, of tensors in bfloat16.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tests.cluster.forked import run
from tpserve.host.resources import available_cores
from tpserve.parallel.group import Group
from tpserve.parallel.shm import ShmAllReduce, create_shm_group, exchange_locations

SIZES = {4 << 10: 2000, 1 << 20: 200}
"""Bytes to rounds."""


def rank_main(rank: int, where: Path) -> None:
    store = dist.FileStore(str(where / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    shm = create_shm_group(store, exchange_locations(store, rank, 2, 20.0), range(2), rank, available_cores(), 20.0)
    assert isinstance(shm, ShmAllReduce), shm
    groups = {"gloo": Group(dist.group.WORLD), "shm": Group(dist.group.WORLD, shm)}
    for size, rounds in SIZES.items():
        x = torch.zeros(size // 2, dtype=torch.bfloat16)
        for name, group in [*groups.items()] * 3:
            took_us = [measure(group, x) for _ in range(rounds)]
            if rank == 0:
                p90 = statistics.quantiles(took_us, n=10)[-1]
                print(f"{size:9,} bytes  {name:4}  median {statistics.median(took_us):7.1f} us  p90 {p90:7.1f} us", flush=True)


def measure(group: Group, x: torch.Tensor) -> float:
    began_ns = time.perf_counter_ns()
    group.all_reduce(x)
    return (time.perf_counter_ns() - began_ns) / 1000


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        assert run(2, lambda rank: rank_main(rank, Path(directory)), 100.0) == [0, 0]
