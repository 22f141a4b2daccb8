"""The process groups of one epoch. The only caller of `init_process_group`.

Owns creation and destruction of the groups; knows no model and no policy. Invariants: a mesh lives in one epoch, on a new store
that rank 0 hosts on its own port. It never uses torchrun's store, which belongs to the agent, outlives the epoch and still has
the addresses of dead ranks. Every wait is bounded, and a mesh that does not form raises PeerLost.

This module does not detect dead ranks, nor does the backend, whose timeouts are long: the control thread ends a rank that is
blocked in a collective.
"""

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store  # torch.distributed has them without their types

from tpserve.errors import EngineFailure, PeerLost, UserError
from tpserve.parallel.group import Group
from tpserve.parallel.pipeline import Pipeline
from tpserve.parallel.shm import ShmAllReduce, create_shm_group, exchange_locations
from tpserve.parallel.store import gather
from tpserve.types.layout import ParallelLayout

log = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT_S = 600.0
"""Timeout of one collective. The longest legitimate wait is for a rank that compiles kernels or reads weights."""


@dataclass(frozen=True)
class Mesh:
    """One rank's view of the epoch. `world` is for small values; `tp` and `pipeline` carry activations."""

    rank: int
    layout: ParallelLayout
    tp: Group
    world: Group
    pipeline: Pipeline
    device: torch.device


def init_distributed(
    rank: int,
    layout: ParallelLayout,
    epoch: int,
    store: Store,
    device: torch.device,
    timeout_s: float,
    all_reduce: Literal["auto", "nccl", "gloo", "shm"] = "auto",
    cores: int | None = None,
    is_over: Callable[[], bool] = lambda: False,
) -> Mesh:
    """Form the mesh with the other ranks of the epoch. All ranks call this with the same layout and epoch.

    `all_reduce`: the transport of the all-reduces of a stage. "auto" is NCCL on CUDA; on the CPU it is shared memory if the
    ranks of the stage are on one host, else gloo. `cores`: the number of cores that the ranks of this host share (default: the
    cores that this process may use). `is_over`: whether the epoch is over, which ends waits for other ranks.

    Raises PeerLost when not all ranks have come within `timeout_s` seconds, and UserError when "shm" is not possible. Both leave
    no process group behind.
    """
    if layout.world_size == 1:
        return Mesh(0, layout, Group(), Group(), Pipeline(), device)
    backend = "nccl" if all_reduce == "nccl" or (all_reduce == "auto" and device.type == "cuda") else "gloo"
    store = PrefixStore(f"epoch{epoch}", store)
    shm = None
    try:
        # first, for torch's own waits are long and name no rank
        gather(store, "rank", rank, range(layout.world_size), b"", timeout_s, is_over)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=layout.world_size,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
            device_id=device if backend == "nccl" else None,
        )
        if all_reduce in ("auto", "shm") and device.type == "cpu" and layout.tp > 1:
            cores = cores or len(os.sched_getaffinity(0))
            shm = _shm_all_reduce(rank, layout, store, cores, timeout_s, all_reduce == "shm", is_over)
        tp = _tensor_parallel_group(rank, layout, shm)
        mesh = Mesh(
            rank,
            layout,
            tp,
            Group(dist.group.WORLD),
            _pipeline(rank, layout, backend == "gloo" and device.type == "cuda"),
            device,
        )
        mesh.world.all_reduce_min(epoch)  # a barrier: from here on all connections of the world group are up
    except (EngineFailure, RuntimeError, ValueError) as error:  # torch's DistError family and gloo's bare RuntimeErrors
        if shm is not None:
            shm.close()
        _destroy()
        raise PeerLost(f"rank {rank} could not form the mesh of epoch {epoch}: {str(error).partition(chr(10))[0]}") from error
    except UserError:
        _destroy()
        raise
    return mesh


def _shm_all_reduce(
    rank: int,
    layout: ParallelLayout,
    store: Store,
    cores: int,
    timeout_s: float,
    required: bool,
    is_over: Callable[[], bool],
) -> ShmAllReduce | None:
    """Shared memory for this rank's stage; None when it is not possible. UserError then if it is `required`."""
    first = layout.stage_of(rank) * layout.tp
    locations = exchange_locations(store, rank, layout.world_size, timeout_s, is_over)
    shm = create_shm_group(store, locations, range(first, first + layout.tp), rank, cores, timeout_s, is_over)
    if isinstance(shm, ShmAllReduce):
        log.debug("rank %d: all-reduce through shared memory", rank)
        return shm
    if required:
        raise UserError(f"--all-reduce shm is not possible ({shm}): pass --all-reduce auto or gloo", param="all_reduce")
    log.info("rank %d: all-reduce through gloo, not through shared memory: %s", rank, shm)
    return None


def _tensor_parallel_group(rank: int, layout: ParallelLayout, shm: ShmAllReduce | None) -> Group:
    """The group of this rank's stage. torch requires that every rank creates every group, in the same order."""
    if layout.tp == 1:
        return Group()
    if layout.pp == 1:
        return Group(dist.group.WORLD, shm)
    own_group: dist.ProcessGroup | None = None
    for stage in range(layout.pp):
        ranks = [stage * layout.tp + i for i in range(layout.tp)]
        group = dist.new_group(ranks)
        if rank in ranks:
            own_group = group
    assert own_group is not None
    return Group(own_group, shm)


def _pipeline(rank: int, layout: ParallelLayout, via_host: bool) -> Pipeline:
    """The neighbours have the same tensor-parallel rank, one stage before and one after."""
    previous, following = rank - layout.tp, rank + layout.tp
    return Pipeline(
        previous if previous >= 0 else None,
        following if following < layout.world_size else None,
        in_flight=layout.pp + 1,
        via_host=via_host,
    )


def destroy_distributed(mesh: Mesh) -> None:
    """Destroy the process groups without waiting for the peers, which may be dead."""
    mesh.tp.close()
    if mesh.layout.world_size > 1:
        _destroy()


def _destroy() -> None:
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # a broken group may raise again here
            dist.destroy_process_group()
