"""The library of CPU kernels (kernels/cpu): loads it, chooses the instruction set, and finds torch's threads.

Owns the choice, made once a process: `TPSERVE_ISA` names the highest instruction set that may be used, or `off`. Without the
library (`library()` is None) callers take the plain torch function that stands beside each function of this package.

Invariant: the bits of a row of any result depend neither on the other rows nor on the number of threads.
"""

import ctypes
import functools
import hashlib
import os
import re
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parents[1]
ISA_VARIABLE, FILE_VARIABLE = "TPSERVE_ISA", "TPSERVE_CPU_LIBRARY"
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
INT8 = 2
SUM_DTYPES = {**DTYPES, torch.int32: 3}
"""Of sums, which in int8 are integers."""


class Isa(IntEnum):
    """Instruction sets in rising order, as in kernels/cpu/api.h."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3
    AMX = 4


class Operation(IntEnum):
    """What a `Call` asks for, as in kernels/cpu/api.h."""

    PRODUCT = 0
    GROUPED_PRODUCT = 1
    HEAD = 2
    HEAD_BLOCK = 3
    NORM = 4
    QKV = 5
    ACTIVATION = 6
    ATTENTION = 7
    ALL_REDUCE = 8
    GUMBEL_MAX = 9
    QUANTIZE = 10
    PRODUCT_INT8 = 11
    RESCALE_INT8 = 12
    GROUPED_PRODUCT_INT8 = 13
    MASK_BITS = 14
    PENALIZE = 15
    TRUNCATE = 16


class Call(ctypes.Structure):
    """`Call` of kernels/cpu/api.h: an operation and the address of its arguments."""

    _fields_ = (("operation", ctypes.c_int32), ("arguments", ctypes.c_void_p))


def calls_of(*steps: tuple[Operation, ctypes.Structure]) -> "ctypes.Array[Call]":
    """Operations with their arguments, which must outlive the result, for `Library.run_calls`."""
    return (Call * len(steps))(*(Call(operation, ctypes.addressof(arguments)) for operation, arguments in steps))


class Library:
    """The loaded library. `isa`: what it runs on; `version`: of its sources; `file`: where it lies."""

    def __init__(self, file: Path, limit: Isa) -> None:
        """OSError when it cannot be loaded, ValueError when it was built from other sources."""
        self.file = file
        # CDLL lets other Python threads run during a call; RTLD_LOCAL keeps its few names to itself.
        self.calls = ctypes.CDLL(str(file), mode=os.RTLD_LOCAL | os.RTLD_NOW)
        self.calls.tpserve_version.restype = ctypes.c_char_p
        self.version: str = self.calls.tpserve_version().decode()
        expected = source_version()
        if expected is not None and self.version != expected:
            raise ValueError(f"{file} was built from other sources ({self.version}, not {expected}): build it again")
        self.isa = Isa(self.calls.tpserve_detect(int(limit)))
        openmp = _openmp()
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        self._openmp = [None] * 3 if openmp is None else [ctypes.cast(getattr(openmp, name), ctypes.c_void_p) for name in names]
        self._may_spin = True
        self._start()
        self._run = self.calls.tpserve_run
        os.register_at_fork(after_in_child=self._forked)

    def limit(self, isa: Isa) -> None:
        """Use no higher instruction set than `isa` from now on: the lowest of the ranks that compute together."""
        self.isa = min(self.isa, isa)
        self._start()

    def allow_spinning(self, allowed: bool) -> None:
        """Whether threads that wait for each other may spin: if each thread of every rank of this host has a core of its own."""
        self._may_spin = allowed
        self._start()

    def run(self, operation: Operation, arguments: ctypes.Structure) -> None:
        """One operation that waits for nobody, on as many threads as torch uses."""
        self._run(ctypes.byref(Call(operation, ctypes.addressof(arguments))), 1, torch.get_num_threads())

    def run_calls(self, calls: ctypes.Array[Call], wait: Callable[[], None] | None = None) -> None:
        """A list of calls in one parallel region; their arguments must stay alive.

        When a collective in it has waited for some milliseconds for its peers, `wait` is called, and then what is left of the
        list. An exception of `wait` ends it. Without collectives there is nothing to wait for.
        """
        ended, count = 0, len(calls)
        while True:
            ended += self._run(ctypes.byref(calls, ended * ctypes.sizeof(Call)), count - ended, torch.get_num_threads())
            if ended == count:
                return
            assert wait is not None, "the list has a collective"
            wait()

    def _start(self) -> None:
        self.calls.tpserve_start(int(self.isa), *self._openmp, int(self._may_spin))

    def _forked(self) -> None:
        """In a forked child, where the threads of libgomp are missing and waiting for them would not end: one thread."""
        self._openmp = [None] * 3
        self._start()

    @property
    def numerics(self) -> str:
        """What decides the bits of its results: equal on two machines if they are."""
        return f"{self.isa.name.lower()} {self.version}"


@functools.cache
def load() -> tuple[Library | None, str]:
    """The library, or None and the reason. ValueError when TPSERVE_ISA is no instruction set.

    A rank calls it before its threads start: AMX needs the system's permission first.
    """
    name = os.environ.get(ISA_VARIABLE, "").lower().replace("-", "_")
    if name == "off":
        return None, f"{ISA_VARIABLE} is off"
    if name and name.upper() not in Isa.__members__:
        raise ValueError(f"{ISA_VARIABLE} is {name!r}; it takes {', '.join(isa.name.lower() for isa in Isa)} and off")
    file = Path(os.environ.get(FILE_VARIABLE) or PACKAGE / "libtpserve_cpu.so")
    if not file.exists():
        return None, f"{file} is not there: no C++ compiler was when tpserve was installed"
    try:
        return Library(file, Isa[name.upper()] if name else max(Isa)), ""
    except (OSError, ValueError) as error:
        return None, str(error)


def library() -> Library | None:
    """The library, or None when callers must do without."""
    return load()[0]


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the library computes with tensors of this device and dtype."""
    return device.type == "cpu" and dtype in DTYPES and library() is not None


def is_native(x: torch.Tensor) -> bool:
    """Whether the library computes with this tensor."""
    return serves(x.device, x.dtype)


@functools.cache
def source_version() -> str | None:
    """The version of the sources beside this package, as `build_cpu.version`; None for an installed one, which has no sources."""
    folder = PACKAGE.parent / "cpu"
    if not (folder / "kernels.cc").is_file():
        return None
    digest = hashlib.sha256()
    for path in (*sorted(folder.iterdir()), PACKAGE.parent / "build_cpu.py"):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _openmp() -> ctypes.CDLL | None:
    """The libgomp that torch has loaded."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if re.search(r"/lib[gi]omp[^/]*\.so", line):
            try:
                openmp = ctypes.CDLL(line.split(maxsplit=5)[5], mode=os.RTLD_NOLOAD | os.RTLD_NOW)
                return openmp if hasattr(openmp, "GOMP_parallel") else None
            except OSError:
                return None
    return None
