"""Collectives among a fixed set of ranks. Owns a process group and, inside a host, a shared-memory page; knows no model.

Invariants: every rank of a group calls the same methods in the same order. Sums are in rank order whatever the backend's
algorithm, so that the bits of an element do not depend on its position in the tensor (docs/design.md, "Numerics").

Errors: with a dead peer a collective raises PeerLost (shared memory, gloo), or blocks until the backend's timeout (NCCL).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from tpserve.errors import PeerLost
from tpserve.parallel.shm import ShmAllReduce
from tpserve_kernels.cpu.all_reduce import Page


@contextmanager
def lost_peers() -> Iterator[None]:
    """Turn gloo's errors, which are bare RuntimeErrors, into PeerLost."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(f"a collective failed: {str(error).partition(chr(10))[0]}") from error


class Group:
    """A set of ranks that compute together. `rank`: the index of this process in the group, in [0, size)."""

    def __init__(self, handle: dist.ProcessGroup | None = None, shm: ShmAllReduce | None = None) -> None:
        """Wrap a torch process group; None is a group of one rank, without communication.

        `shm`: carries tensors in place of the process group; all tensors are on the CPU then.
        """
        self._handle = handle
        self._shm = shm
        self.rank = 0 if handle is None else handle.rank()
        self.size = 1 if handle is None else handle.size()

    @property
    def uses_shm(self) -> bool:
        """Whether tensors go through shared memory."""
        return self._shm is not None

    @property
    def can_be_captured(self) -> bool:
        """Whether the collectives on a card can be part of a CUDA graph."""
        return self.size == 1 or self.uses_nccl

    @property
    def uses_nccl(self) -> bool:
        """Whether NCCL carries the tensors."""
        return self.size > 1 and dist.get_backend(self._handle) == "nccl"

    @property
    def page(self) -> Page | None:
        """The shared memory as the CPU kernels use it, None without."""
        return None if self._shm is None else self._shm.page

    def watch(self) -> None:
        """What `ShmAllReduce.watch` does for a list of kernels that waits for a peer."""
        assert self._shm is not None, "only a collective in shared memory waits in a list of kernels"
        self._shm.watch()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of `x` over the ranks, in rank order: shape and dtype of `x`. May overwrite `x`; use the result."""
        if self.size == 1:
            return x
        if self._shm is not None:
            return self._shm.all_reduce(x)
        if x.is_cuda or self.size == 2:  # NCCL has one order per tensor size; two terms have only one order
            with lost_peers():
                dist.all_reduce(x, group=self._handle)
            return x
        parts = self.all_gather(x)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Stack the ranks' tensors, of equal shape and dtype, in rank order: [size, *x.shape]."""
        if self.size == 1:
            return x.unsqueeze(0)
        if self._shm is not None:
            return self._shm.all_gather(x)
        out = x.new_empty((self.size, *x.shape))
        with lost_peers():
            dist.all_gather(list(out.unbind(0)), x.contiguous(), group=self._handle)
        return out

    def all_reduce_min(self, value: int) -> int:
        """The minimum of the ranks' 64-bit integers. With a constant it is a barrier."""
        if self.size == 1:
            return value
        x = torch.tensor([value], dtype=torch.int64, device=self._device())
        with lost_peers():
            dist.all_reduce(x, op=dist.ReduceOp.MIN, group=self._handle)
        return int(x.item())

    def all_gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        """The 64-bit integers of every rank, in rank order. All ranks pass the same number of values."""
        if self.size == 1:
            return [list(values)]
        x = torch.tensor(values, dtype=torch.int64, device=self._device())
        gathered = [torch.empty_like(x) for _ in range(self.size)]
        with lost_peers():
            dist.all_gather(gathered, x, group=self._handle)
        return [each.tolist() for each in gathered]

    def replace(self, other: "Group") -> None:
        """Become `other`, the same ranks in a later epoch. Layers hold on to this object as long as their weights live."""
        assert (self.rank, self.size) == (other.rank, other.size), "a rank keeps its place in a group"
        self._handle, self._shm = other._handle, other._shm

    def close(self) -> None:
        """Close the shared-memory page. The mesh owns the process group."""
        if self._shm is not None:
            self._shm.close()

    def _device(self) -> str:
        """The device of the backend's tensors."""
        return "cuda" if dist.get_backend(self._handle) == "nccl" else "cpu"
