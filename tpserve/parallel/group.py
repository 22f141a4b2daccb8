"""Collectives among a fixed set of ranks. Owns nothing but the process group and the page handed to it; knows no model.

Every rank of a group calls the same methods in the same order. Sums are taken in rank order whatever the backend's
algorithm, so that an element's bits do not depend on where it stands in the tensor (docs/design.md, "Numerics").
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from tpserve.parallel.shm import ShmAllReduce


class Group:
    """A set of ranks that compute together. `rank` is this process's place in it, in [0, size)."""

    def __init__(self, handle: dist.ProcessGroup | None = None, shm: ShmAllReduce | None = None) -> None:
        """Wrap a torch process group; None is a group of one, which communicates with nobody.

        `shm`: activations go through it instead of the process group; all tensors are on the CPU then.
        """
        self._handle = handle
        self._shm = shm
        self.rank = 0 if handle is None else handle.rank()
        self.size = 1 if handle is None else handle.size()

    @property
    def uses_shm(self) -> bool:
        """Whether activations go through a page of shared memory."""
        return self._shm is not None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of `x` over the ranks, in rank order. May overwrite `x`; use the result."""
        if self.size == 1:
            return x
        if self._shm is not None:
            return self._shm.all_reduce(x)
        if x.is_cuda or self.size == 2:  # NCCL keeps one order per size; with two terms every order is the same
            dist.all_reduce(x, group=self._handle)
            return x
        parts = self.all_gather(x)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Stack the ranks' tensors of equal shape: [size, *x.shape]."""
        if self.size == 1:
            return x.unsqueeze(0)
        if self._shm is not None:
            return self._shm.all_gather(x)
        out = x.new_empty((self.size, *x.shape))
        dist.all_gather(list(out.unbind(0)), x.contiguous(), group=self._handle)
        return out

    def all_reduce_min(self, value: int) -> int:
        """Smallest of the ranks' integers."""
        if self.size == 1:
            return value
        device = "cuda" if dist.get_backend(self._handle) == "nccl" else "cpu"
        x = torch.tensor([value], dtype=torch.int64, device=device)
        dist.all_reduce(x, op=dist.ReduceOp.MIN, group=self._handle)
        return int(x.item())

    def all_gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        """The integers of every rank, in rank order; each rank gives as many."""
        if self.size == 1:
            return [list(values)]
        device = "cuda" if dist.get_backend(self._handle) == "nccl" else "cpu"
        mine = torch.tensor(values, dtype=torch.int64, device=device)
        theirs = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(theirs, mine, group=self._handle)
        return [x.tolist() for x in theirs]

    def close(self) -> None:
        """Let go of the page; the process group is the mesh's."""
        if self._shm is not None:
            self._shm.close()
