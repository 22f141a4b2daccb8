"""Sums over the ranks of one host through shared memory: kernels/cpu/all_reduce.h. The specification, in torch, is
tpserve/parallel/shm.py, whose page this works on and whose waits it leaves to Python when they grow long.
"""

import ctypes

from tpserve_kernels.cpu.rows import Norm


class Page(ctypes.Structure):
    """`Page` of kernels/cpu/api.h: what both sides know of a rank's page. `round` counts the rounds of either."""

    _fields_ = (
        ("counters", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("slot_bytes", "round", "done")),
        *((name, ctypes.c_int32) for name in ("waiting", "ranks", "index", "may_spin")),
    )


class AllReduce(ctypes.Structure):
    """`AllReduce` of kernels/cpu/api.h."""

    _fields_ = (
        ("page", ctypes.POINTER(Page)),
        ("x", ctypes.c_void_p),
        ("norm", ctypes.POINTER(Norm)),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )
