"""What a step's model run is told: the tensors that `worker/input_batch.py` builds from a plan.

T tokens of the step, R chunks (requests) in it, B the widest block table.
"""

from dataclasses import dataclass

import torch

from tpserve.attention.cpu_plan import TileGroup


@dataclass(frozen=True)
class AttentionMetadata:
    """Where a cache group's keys and values are. One per cache group; integer tensors live on the model's device.

    Chunk r owns rows [query_starts[r], query_starts[r + 1]) of the step; its last row is at position context_lens[r] - 1,
    a row at position p sees positions (p - window, p] from 0 on. Position p of chunk r lives in block
    tables[r, p // block_size], entry p % block_size. What no row sees is never read: entries of `tables` past the context,
    and those before the window, whose blocks may have passed to other sequences.
    """

    query_starts: torch.Tensor
    """[R + 1] int32"""
    context_lens: torch.Tensor
    """[R] int32"""
    tables: torch.Tensor
    """[R, B] int32"""
    write_slots: torch.Tensor
    """[T] int64: block * block_size + entry where each row's own key and value go"""
    query_lens_host: tuple[int, ...]
    """R integers on the host"""
    context_lens_host: tuple[int, ...]
    """R integers on the host"""
    window: int | None = None
    """Positions that a row sees, the last of them its own; None: all up to its own"""
    tiles: tuple[TileGroup, ...] = ()
    """On the CPU, what `paged.ready` works out; nobody else writes it."""


@dataclass(frozen=True)
class ModelInput:
    """One step's input to a stage. `groups` has one entry per `ModelSpec.cache` group."""

    tokens_T: torch.Tensor
    """[T] int64 (read by the first stage)"""
    positions_T: torch.Tensor
    """[T] int64"""
    groups: tuple[AttentionMetadata, ...]
