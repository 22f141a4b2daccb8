"""The inputs of one model run: the tensors that `worker/input_batch.py` builds from a plan.

Legend: T tokens of the step, R chunks (requests) in it, B blocks of the widest block table.
"""

from dataclasses import dataclass

import torch

from tpserve.attention.cpu_plan import TileGroup


@dataclass(frozen=True)
class AttentionMetadata:
    """Where the keys and values of one cache group are. The tensors are on the model's device.

    Chunk r owns rows [query_starts[r], query_starts[r + 1]) of the step; its last row is at position context_lens[r] - 1,
    a row at position p sees positions (p - window, p] from 0 on. Position p of chunk r is in block
    tables[r, p // block_size], entry p % block_size. Attention never reads what no row sees: entries of `tables` past the
    context, and entries before the window, whose blocks may belong to other sequences by now.
    """

    query_starts: torch.Tensor
    """[R + 1] int32"""
    context_lens: torch.Tensor
    """[R] int32"""
    tables: torch.Tensor
    """[R, B] int32"""
    write_slots: torch.Tensor
    """[T] int64: block * block_size + entry where each row's own key and value are written"""
    query_lens_host: tuple[int, ...]
    """R integers on the host: the query length of each chunk"""
    context_lens_host: tuple[int, ...]
    """R integers on the host: the values of `context_lens`"""
    window: int | None = None
    """The number of positions that a row sees, its own included; None: all up to its own"""
    tiles: tuple[TileGroup, ...] = ()
    """The attention plan on the CPU; only `paged.build_metadata` sets it."""


@dataclass(frozen=True)
class ModelInput:
    """The input of one step to a stage. `groups` has one entry per `ModelSpec.cache` group."""

    tokens_T: torch.Tensor
    """[T] int64 (read by the first stage)"""
    positions_T: torch.Tensor
    """[T] int64"""
    groups: tuple[AttentionMetadata, ...]
