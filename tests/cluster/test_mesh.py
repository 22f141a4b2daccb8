"""The mesh over real processes, gloo and shared memory: groups, neighbours, a new epoch in a process, failing in time."""

import os
import signal
import socket
import time
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist

from tests.cluster.forked import run
from tpserve.errors import PeerLost, UserError
from tpserve.parallel import mesh as meshes
from tpserve.parallel import shm
from tpserve.parallel.store import agent_store, host_store, join_store
from tpserve.types.layout import ParallelLayout

AllReduce = Literal["auto", "gloo", "shm"]
CPU = torch.device("cpu")


def meet(where: Path, rank: int, epoch: int, patience_s: float = 20.0) -> dist.TCPStore:
    """The epoch's store: rank 0 hosts it and leaves its address in a file. The test must not, or its thread is forked."""
    told = where / f"epoch{epoch}"
    if rank == 0:
        store, address = host_store()
        draft = told.with_suffix(".draft")
        draft.write_text(address)
        draft.rename(told)
        return store
    deadline_s = time.monotonic() + patience_s
    while not told.exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return join_store(told.read_text())


def check(mesh: meshes.Mesh, epoch: int) -> None:
    """Every collective gives what the layout says it must."""
    rank, layout = mesh.rank, mesh.layout
    stage, tp_rank = layout.stage_of(rank), layout.tp_rank_of(rank)
    assert (mesh.tp.rank, mesh.tp.size) == (tp_rank, layout.tp)
    assert (mesh.world.rank, mesh.world.size) == (rank, layout.world_size)
    peers = range(stage * layout.tp, (stage + 1) * layout.tp)
    assert mesh.tp.all_gather(torch.tensor([rank])).flatten().tolist() == list(peers)
    assert mesh.tp.all_reduce(torch.tensor([float(rank)])).item() == sum(peers)
    assert mesh.world.all_reduce_min(10 + rank) == 10
    pipeline = mesh.pipeline
    assert (pipeline.first, pipeline.last) == (stage == 0, stage == layout.pp - 1)
    hidden = torch.full((2, 3), float(tp_rank + 10 * epoch))
    if not pipeline.first:
        hidden = pipeline.receive(2, 3, torch.float32, CPU) + 100
    if not pipeline.last:
        pipeline.send(hidden)
    assert hidden.unique().tolist() == [tp_rank + 10 * epoch + 100 * stage]
    mesh.world.all_reduce_min(0)  # what was sent has arrived everywhere before anybody leaves


@pytest.mark.parametrize("all_reduce", ["auto", "gloo", "shm"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (3, 1), (1, 2), (2, 2)])
def test_two_epochs_in_the_same_processes(tp: int, pp: int, all_reduce: AllReduce, tmp_path: Path) -> None:
    layout = ParallelLayout(tp, pp, (1,) * pp)

    def rank_main(rank: int) -> None:
        stores = []  # a store outlives its epoch here, so that nobody who leaves late finds it gone
        for epoch in (1, 2):
            stores.append(meet(tmp_path, rank, epoch))
            mesh = meshes.init_distributed(rank, layout, epoch, stores[-1], CPU, 20.0, all_reduce)
            check(mesh, epoch)
            maps_a_page = "memfd:tpserve" in Path("/proc/self/maps").read_text()
            assert maps_a_page == (tp > 1 and all_reduce != "gloo")
            mesh.world.all_reduce_min(0)  # nobody leaves before all have looked
            meshes.destroy_distributed(mesh)
            del mesh
            assert "memfd:tpserve" not in Path("/proc/self/maps").read_text()

    assert run(layout.world_size, rank_main) == [0] * layout.world_size


def test_shared_memory_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """auto goes on with gloo; who asked for shm is told, on every rank."""
    layout = ParallelLayout(2, 1, (1,))

    def rank_main(rank: int) -> None:
        monkeypatch.setattr(shm, "_host", lambda: f"host{rank}")
        stores = [meet(tmp_path, rank, 1)]
        check(meshes.init_distributed(rank, layout, 1, stores[0], CPU, 20.0), 1)
        dist.destroy_process_group()
        stores.append(meet(tmp_path, rank, 2))
        with pytest.raises(UserError, match="--all-reduce shm is not possible .the ranks do not share a host.: pass"):
            meshes.init_distributed(rank, layout, 2, stores[1], CPU, 20.0, "shm")
        assert not dist.is_initialized()
        stores[1].set(f"left{rank}", "")
        if rank == 0:
            stores[1].wait(["left1"])  # the store goes with this process

    assert run(2, rank_main) == [0, 0]


def test_a_rank_that_does_not_come_is_a_failure_in_time(tmp_path: Path) -> None:
    def rank_main(rank: int) -> None:
        if rank == 0:
            store = meet(tmp_path, 0, 1)
            started_s = time.monotonic()
            with pytest.raises(PeerLost, match="rank 0 could not form the mesh of epoch 1: rank 1 did not come within 1 s"):
                meshes.init_distributed(0, ParallelLayout(2, 1, (1,)), 1, store, CPU, 1.0)
            assert time.monotonic() - started_s < 5
            one = meshes.init_distributed(0, ParallelLayout(1, 1, (1,)), 2, store, CPU, 1.0)  # nothing was left behind
            assert one.world.size == 1

    assert run(2, rank_main) == [0, 0]


@pytest.mark.parametrize("all_reduce", ["gloo", "shm"])
def test_a_death_raises_in_who_waits_for_it_and_the_survivor_can_form_again(all_reduce: AllReduce, tmp_path: Path) -> None:
    layout = ParallelLayout(2, 1, (1,))

    def rank_main(process: int) -> None:
        if process == 2:  # the next incarnation of rank 1
            check(meshes.init_distributed(1, layout, 2, meet(tmp_path, 1, 2), CPU, 20.0), 2)
            return
        store = meet(tmp_path, process, 1)
        mesh = meshes.init_distributed(process, layout, 1, store, CPU, 20.0, all_reduce)
        if process == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(PeerLost):
            while True:
                mesh.tp.all_reduce(torch.ones(1))
        meshes.destroy_distributed(mesh)
        check(meshes.init_distributed(0, layout, 2, meet(tmp_path, 0, 2), CPU, 20.0), 2)

    assert run(3, rank_main) == [0, -signal.SIGKILL, 0]


def test_the_store_listens_on_its_own_address_only() -> None:
    store, address = host_store("127.0.0.1")
    host, _, port = address.rpartition(":")
    assert host == "127.0.0.1"
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", int(port)), 1.0):
        pass
    join_store(address).set("key", "value")
    assert store.get("key") == b"value"


def test_a_store_on_an_ipv6_address() -> None:
    store, address = host_store("::1")
    join_store(address).set("key", "value")
    assert store.get("key") == b"value"


def test_a_dead_store_is_known_at_once() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started_s = time.monotonic()
    with pytest.raises(PeerLost, match=f"the store at 127.0.0.1:{port} does not answer"):
        join_store(f"127.0.0.1:{port}")
    assert time.monotonic() - started_s < 1


def test_the_agents_store_may_come_late() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def rank_main(rank: int) -> None:
        if rank == 0:
            time.sleep(0.5)
        store = agent_store("127.0.0.1", port, rank, hosted_by_agent=False, timeout_s=10.0)
        if rank == 0:
            store.set("key", "value")
            assert store.get("seen") == b"yes"
        else:
            assert store.get("key") == b"value"
            store.set("seen", "yes")

    assert run(2, rank_main) == [0, 0]
