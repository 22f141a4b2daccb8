"""The query, key and value heads of a step's rows: kernels/cpu/rows.h (QKV). Norms, rotation, and writes to the KV cache.

Tensors are as in `rows`. Each function has the plain torch form beside it.

Legend: T rows, N query heads, K key/value heads, D channels of a head, of which 2 E rotate, P positions, S slots of a cache.
"""

import ctypes
from typing import NamedTuple

import torch

from tpserve_kernels.cpu.kv_int8 import SCALE_BYTES, quantize_heads_reference
from tpserve_kernels.cpu.library import DTYPES, INT8, Operation, library
from tpserve_kernels.cpu.rows import adjacent, empty, is_adjacent, rms_norm_reference


def _address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class Heads(ctypes.Structure):
    """`Heads` of kernels/cpu/api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("from_", "to", "norm")),
        *((name, ctypes.c_int64) for name in ("count", "dim", "from_stride", "from_head_stride", "to_stride", "to_head_stride")),
    )


class QkvArgs(ctypes.Structure):
    """`Qkv` of kernels/cpu/api.h."""

    _fields_ = (
        *((name, Heads) for name in ("q", "k", "v")),
        *((name, ctypes.c_void_p) for name in ("positions", "cos", "sin", "slots")),
        *((name, ctypes.c_int64) for name in ("rows", "written", "frequencies")),
        ("eps", ctypes.c_float),
        ("offset", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("interleaved", ctypes.c_int32),
        ("cache_dtype", ctypes.c_int32),
    )


class HeadNorms(NamedTuple):
    """RMS norms of query and key heads: weights [D], to which `offset` is added in float32."""

    q_D: torch.Tensor
    k_D: torch.Tensor
    eps: float
    offset: float = 0.0


class Rotation(NamedTuple):
    """Positions of rows, int64 [T] in [0, P), not checked, and the tables of all positions, float32 [P, E], contiguous.

    `interleaved`: channels 2 c and 2 c + 1 rotate, and come out as c and c + E; else c and c + E do.
    """

    positions_T: torch.Tensor
    cos_PE: torch.Tensor
    sin_PE: torch.Tensor
    interleaved: bool = False


NO_HEADS = Heads()


def heads_of(from_THD: torch.Tensor, to_THD: torch.Tensor, norm_D: torch.Tensor | None = None) -> Heads:
    """The argument `Heads` for heads that go from one tensor to another, [T, heads, D] or [S, heads, D], channels adjacent.

    Or to a cache of int8, [S, heads, D + 4] (`kv_int8`).
    """
    _, count, dim = from_THD.shape
    assert to_THD.shape[1:] == (count, dim + SCALE_BYTES if to_THD.dtype == torch.int8 else dim)
    assert to_THD.dtype in (from_THD.dtype, torch.int8) and is_adjacent(from_THD) and is_adjacent(to_THD)
    assert norm_D is None or (norm_D.shape == (dim,) and norm_D.dtype == from_THD.dtype and norm_D.is_contiguous())
    return Heads(
        from_THD.data_ptr(), to_THD.data_ptr(), _address(norm_D), count, dim,
        from_THD.stride(0), from_THD.stride(1), to_THD.stride(0), to_THD.stride(1),
    )  # fmt: skip


def qkv_args(
    q: Heads, k: Heads, v: Heads, rows: int, dtype: torch.dtype, *, norms: HeadNorms | None = None,
    rotation: Rotation | None = None, slots_T: torch.Tensor | None = None, cache_int8: bool = False,
) -> QkvArgs:  # fmt: skip
    """The arguments of Operation.QKV; the tensors must outlive the call. The norms' weights are in `q` and `k` already.

    `cache_int8`: keys and values go to tensors of int8.
    """
    written, frequencies = 0, 0
    tables: list[int | None] = [None, None, None]
    if slots_T is not None:
        assert slots_T.dtype == torch.int64 and slots_T.is_contiguous()
        written = len(slots_T)
    if rotation is not None:
        positions_T, cos_PE, sin_PE, interleaved = rotation
        frequencies = cos_PE.shape[1]
        assert positions_T.shape == (rows,) and positions_T.dtype == torch.int64 and positions_T.is_contiguous()
        for table in (cos_PE, sin_PE):
            assert table.shape == cos_PE.shape and table.dtype == torch.float32 and table.is_contiguous()
        for side in (q, k):
            assert not side.count or side.dim >= 2 * frequencies
            assert not side.count or not interleaved or side.dim == 2 * frequencies
        tables = [positions_T.data_ptr(), cos_PE.data_ptr(), sin_PE.data_ptr()]
    return QkvArgs(
        q, k, v, *tables, _address(slots_T), rows, written, frequencies, 0.0 if norms is None else norms.eps,
        0.0 if norms is None else norms.offset, DTYPES[dtype], rotation is not None and rotation.interleaved,
        INT8 if cache_int8 else DTYPES[dtype],
    )  # fmt: skip


def place_heads(
    q_TND: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKE: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKE: torch.Tensor,
    slots_T: torch.Tensor,
    norms: HeadNorms | None = None,
    rotation: Rotation | None = None,
) -> torch.Tensor:
    """Norm and rotate the heads of queries and keys, and write keys and values to their slots of the caches.

    Queries change in place, [T, N, D] is returned. `slots_T`: int64; rows past its end, and those with a negative slot, are
    written nowhere; the others are not checked. Caches have the dtype of the rows, or are of int8 (`kv_int8`).
    """
    lib = library()
    assert lib is not None
    q = heads_of(q_TND, q_TND, None if norms is None else norms.q_D)
    k = heads_of(k_TKD, k_cache_SKD, None if norms is None else norms.k_D)
    v = heads_of(v_TKE, v_cache_SKE)
    int8 = k_cache_SKD.dtype == torch.int8
    arguments = qkv_args(q, k, v, len(q_TND), q_TND.dtype, norms=norms, rotation=rotation, slots_T=slots_T, cache_int8=int8)
    lib.run(Operation.QKV, arguments)
    return q_TND


def place_heads_reference(
    q_TND: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKE: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKE: torch.Tensor,
    slots_T: torch.Tensor,
    norms: HeadNorms | None = None,
    rotation: Rotation | None = None,
) -> torch.Tensor:
    """`place_heads` in plain torch; queries do not change in place."""
    if norms is not None:
        q_TND, k_TKD = (
            rms_norm_reference(x.reshape(-1, x.shape[2]), weight_D, norms.eps, norms.offset).view(x.shape)
            for x, weight_D in ((q_TND, norms.q_D), (k_TKD, norms.k_D))
        )
    if rotation is not None:
        q_TND, k_TKD = rotate_reference(q_TND, k_TKD, rotation)
    write_kv_reference(k_TKD, v_TKE, k_cache_SKD, v_cache_SKE, slots_T)
    return q_TND


def rotate(q_TND: torch.Tensor, k_TKD: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated queries and keys, new tensors; products and sums in float32, rounded once."""
    lib, (q_TND, k_TKD) = library(), (adjacent(q_TND), adjacent(k_TKD))
    assert lib is not None
    out = empty(q_TND), empty(k_TKD)
    sides = heads_of(q_TND, out[0]), heads_of(k_TKD, out[1]), NO_HEADS
    lib.run(Operation.QKV, qkv_args(*sides, len(q_TND), q_TND.dtype, rotation=rotation))
    return out


def rotate_reference(q_TND: torch.Tensor, k_TKD: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
    """`rotate` in plain torch, with equal bits."""
    cos_T1E, sin_T1E = (table_PE[rotation.positions_T].unsqueeze(1) for table_PE in (rotation.cos_PE, rotation.sin_PE))

    def turned(x: torch.Tensor) -> torch.Tensor:
        if rotation.interleaved:
            x = torch.cat((x[..., ::2], x[..., 1::2]), dim=2)
        low, high, rest = x.float().tensor_split((cos_T1E.shape[2], 2 * cos_T1E.shape[2]), dim=2)
        return torch.cat((low * cos_T1E + high * -sin_T1E, high * cos_T1E + low * sin_T1E, rest), dim=2).to(x.dtype)

    return turned(q_TND), turned(k_TKD)


def write_kv(
    k_TKD: torch.Tensor,
    v_TKE: torch.Tensor | None,
    k_cache_SKD: torch.Tensor,
    v_cache_SKE: torch.Tensor | None,
    slots_T: torch.Tensor,
) -> None:
    """Write keys and values (None: keys only) to their slots, as `place_heads` does."""
    lib, k_TKD = library(), adjacent(k_TKD)
    assert lib is not None
    v = NO_HEADS if v_TKE is None or v_cache_SKE is None else heads_of(adjacent(v_TKE), v_cache_SKE)
    k, int8 = heads_of(k_TKD, k_cache_SKD), k_cache_SKD.dtype == torch.int8
    arguments = qkv_args(NO_HEADS, k, v, len(k_TKD), k_TKD.dtype, slots_T=slots_T, cache_int8=int8)
    lib.run(Operation.QKV, arguments)


def write_kv_reference(
    k_TKD: torch.Tensor,
    v_TKE: torch.Tensor | None,
    k_cache_SKD: torch.Tensor,
    v_cache_SKE: torch.Tensor | None,
    slots_T: torch.Tensor,
) -> None:
    """`write_kv` in plain torch."""
    rows = (slots_T >= 0).nonzero().squeeze(1)
    for heads, cache in ((k_TKD, k_cache_SKD), (v_TKE, v_cache_SKE)):
        if heads is not None and cache is not None:
            cache[slots_T[rows]] = quantize_heads_reference(heads[rows]) if cache.dtype == torch.int8 else heads[rows]
