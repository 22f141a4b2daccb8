"""Hashes of weight files, which nodes compare: a sample of each file at every start, all bytes on request.

Knows no tensors. A sample reads a few fixed places of a file, whatever its size; another checkpoint of the same shapes
differs nearly everywhere. Only `slices` and `digests` compare the bytes between the samples.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tpserve.errors import UserError

SAMPLES, SAMPLE_BYTES = 32, 1024
SLICE_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20
_THREADS = 8


class Slice(NamedTuple):
    """Bytes [start, end) of the file `name` in the model's directory."""

    name: str
    path: Path
    start: int
    end: int


def samples(directory: Path, names: Sequence[str]) -> dict[str, str]:
    """For each file 12 hexadecimal digits: a hash of its size and 32 KB of its bytes. UserError when a file cannot be read."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(_sample, (directory / name for name in names)), strict=True))


def slices(directory: Path, names: Sequence[str]) -> list[Slice]:
    """All bytes of the files, in slices of 64 MiB. Nodes whose files have equal names and sizes get equal slices."""
    found = []
    for name in names:
        path = directory / name
        size = path.stat().st_size
        found += [Slice(name, path, start, min(size, start + SLICE_BYTES)) for start in range(0, size, SLICE_BYTES)]
    return found


def digests(wanted: Sequence[Slice], threads: int, progress: Callable[[int, int], None]) -> list[str]:
    """SHA-256 of each slice, in order. Reads all bytes; calls `progress(bytes_done, bytes_total)` after each slice."""
    done, total, found = 0, sum(each.end - each.start for each in wanted), []
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for each, digest in zip(wanted, pool.map(_digest, wanted), strict=True):
            found.append(digest)
            done += each.end - each.start
            progress(done, total)
    return found


def _sample(path: Path) -> str:
    """Hash the size, the first bytes (the header), the last bytes, and evenly spaced places between them."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(str(size).encode())
            last = max(0, size - SAMPLE_BYTES)
            for place in sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)}):
                digest.update(os.pread(file.fileno(), SAMPLE_BYTES, place))
    except OSError as error:
        raise _unreadable(path, error) from error
    return digest.hexdigest()[:12]


def _digest(wanted: Slice) -> str:
    digest = hashlib.sha256()
    try:
        with wanted.path.open("rb", buffering=0) as file:
            file.seek(wanted.start)
            left = wanted.end - wanted.start
            while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
                digest.update(chunk)  # releases the interpreter lock
                left -= len(chunk)
    except OSError as error:
        raise _unreadable(wanted.path, error) from error
    return digest.hexdigest()


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read: {error.strerror or error}")
