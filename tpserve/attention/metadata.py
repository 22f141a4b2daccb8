"""The inputs of one model run: the tensors that `worker/input_batch.py` builds from a plan.

Legend: T tokens of the step, R chunks (requests) in it, B blocks of a block table's row, X rows of the tables.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tpserve.attention.cpu_plan import TileGroup

if TYPE_CHECKING:  # it imports triton
    from tpserve_kernels.attention_plan import AttentionPlan


@dataclass(frozen=True)
class AttentionMetadata:
    """Where the keys and values of one cache group are. The tensors are on the model's device.

    Chunk r owns rows [query_starts[r], query_starts[r + 1]) of the step; its last row is at position context_lens[r] - 1,
    a row at position p sees positions (p - window, p] from 0 on. Position p of chunk r is in block
    tables[table_rows[r], p // block_size], entry p % block_size. A chunk whose context_lens is 0 pads a CUDA graph: its rows read
    nothing, and their negative write_slots write nothing. Attention never reads what no row sees: entries of `tables` past the
    context, and entries before the window, whose blocks may belong to other sequences by now.
    """

    query_starts: torch.Tensor
    """[R + 1] int32"""
    context_lens: torch.Tensor
    """[R] int32"""
    tables: torch.Tensor
    """[X, B] int32; on the CPU [R, B]"""
    write_slots: torch.Tensor
    """[T] int64: block * block_size + entry where each row's own key and value are written; on CUDA negative for none"""
    query_lens_host: tuple[int, ...]
    """R integers on the host: the query length of each chunk"""
    context_lens_host: tuple[int, ...]
    """R integers on the host: the values of `context_lens`"""
    window: int | None = None
    """The number of positions that a row sees, its own included; None: all up to its own"""
    table_rows: torch.Tensor | None = None
    """[R] int32: the row of `tables` that each chunk has; always set on CUDA, None on the CPU, where chunk r has row r"""
    tiles: tuple[TileGroup, ...] = ()
    """The attention plan on the CPU; only `paged.build_metadata` sets it."""
    plan: "AttentionPlan | None" = None
    """The attention plan on CUDA; only `paged.build_metadata` sets it."""


@dataclass(frozen=True)
class ModelInput:
    """The input of one step to a stage. `groups` has one entry per `ModelSpec.cache` group."""

    tokens_T: torch.Tensor
    """[T] int64 (read by the first stage)"""
    positions_T: torch.Tensor
    """[T] int64"""
    groups: tuple[AttentionMetadata, ...]
