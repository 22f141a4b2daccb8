"""Tests batch invariance on this processor: whether a row's result has the same bits alone and in a batch.

A rank tests its own matrix products at start, within a time budget. Owns a file of results in the user's cache directory, so a
restart repeats nothing and continues with the untested products. An unreadable file or directory only loses the saved results.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import torch

from tpserve.quant.product import Product
from tpserve.types.messages import Numerics
from tpserve.version import __version__

BUDGET_S = 0.3
ROWS, MORE_ROWS = (33, 65), (600,)
"""Batch sizes to test with each product, and further ones while time is left."""
PADDED_ROWS = 4
"""A single row is padded to so many."""
Known = dict[str, dict[str, bool]]
"""For each product, by number of rows: whether a row had the same bits as alone."""


def self_test(products: Iterable[Product], machine: Sequence[str], directory: Path | None, kernels: str = "") -> Numerics:
    """Test what the file does not know yet. `machine`: the facts that results depend on; `directory`: of the file, or None.

    `kernels`: the library of CPU kernels, as in `Numerics`.
    """
    kinds = sorted({product.name: product for product in products}.values(), key=lambda product: (-product.width, product.size))
    file = None
    if directory is not None:
        facts = [__version__, torch.__config__.show(), str(torch.get_num_threads()), *machine, kernels]
        key = hashlib.sha256("\n".join(facts).encode())
        file = directory / f"numerics-{key.hexdigest()[:16]}.json"
    known = _read(file)
    if examine(kinds, known, BUDGET_S):
        _write(file, known)
    broken = tuple(kind.name for kind in kinds if not all(known.get(kind.name, {}).values()))
    reached = [kind.name for kind in kinds if all(str(rows) in known.get(kind.name, {}) for rows in ROWS)]
    return Numerics(broken, tuple(kind.name for kind in kinds if kind.name not in (*broken, *reached)), kernels)


@torch.inference_mode()
def examine(kinds: Sequence[Product], known: Known, budget_s: float, clock: Callable[[], float] = time.perf_counter) -> bool:
    """Test products in the order of `kinds` and add the results to `known`. Returns whether there was anything to test.

    Skips a test whose estimated time, from the times of earlier tests, exceeds what is left of `budget_s`.
    """
    turns = [(kind, rows) for some in (ROWS, MORE_ROWS) for kind in kinds for rows in some]
    todo = [(kind, rows) for kind, rows in turns if str(rows) not in known.get(kind.name, {})]
    if not todo:
        return False
    end = clock() + budget_s
    noise = torch.randn(max(ROWS), max(kind.width for kind, _ in todo), generator=torch.Generator().manual_seed(0))
    alone: dict[str, tuple[torch.Tensor, float]] = {}
    largest, per_size = 0, 0.0  # of the largest product tested: its size, and seconds for a row alone divided by the size
    # time relative to a row alone: measured with the largest product, else proportional to the rows
    longer = {rows: rows / PADDED_ROWS for rows in (*ROWS, *MORE_ROWS)}

    def timed(kind: Product, x_TK: torch.Tensor) -> tuple[torch.Tensor, float]:
        began = clock()
        return kind.run(x_TK), max(clock() - began, 1e-9)

    for kind, rows in todo:
        if clock() + per_size * kind.size * longer[rows] > end:
            continue
        x_TK = noise[:, : kind.width].to(kind.dtype).repeat(-(-rows // len(noise)), 1)[:rows]
        x_TK[-1] = x_TK[1]
        if kind.name not in alone:
            alone[kind.name] = timed(kind, x_TK[1:2])
            if alone[kind.name][1] < budget_s / 20:  # the first call may include a kernel's compilation
                alone[kind.name] = timed(kind, x_TK[1:2])
        row, alone_s = alone[kind.name]
        if clock() + alone_s * longer[rows] > end:
            continue
        got, took_s = timed(kind, x_TK)
        if kind.size >= largest:
            largest, per_size, longer[rows] = kind.size, alone_s / kind.size, took_s / alone_s
        known.setdefault(kind.name, {})[str(rows)] = torch.equal(got[1:2], row) and torch.equal(got[-1:], row)
    return True


def _read(file: Path | None) -> Known:
    if file is not None:
        with suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode(file.read_bytes(), type=Known)
    return {}


def _write(file: Path | None, known: Known) -> None:
    """Merge with what another rank wrote meanwhile. The file is replaced as a whole."""
    if file is not None:
        part = file.with_suffix(f".{os.getpid()}")
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            both = _read(file)
            for name, found in known.items():
                both[name] = both.get(name, {}) | found
            part.write_bytes(msgspec.json.encode(both))
            part.replace(file)
        with suppress(OSError):
            part.unlink(missing_ok=True)
