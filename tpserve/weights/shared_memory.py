"""Packed weights in a memfd, which outlives the process that packed them and is mapped by the next process of the same rank.

    rank            WrittenMemory     packs into it; `finish` makes it read-only, for good
    its successor   MappedMemory      maps it, and has its weights without reading, filling or packing anything

A memfd has no name; the kernel frees it with its last descriptor and mapping. Its pages count as the rank's memory, once.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import mmap
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import msgspec
import torch
from msgspec import Struct

from tpserve.weights.parameter import Parameter

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
ALIGNMENT = 64
SAMPLES, SAMPLE_BYTES = 256, 4096
_SLACK = 64 << 20
_FUTURE_WRITE_SEAL = 0x10  # F_SEAL_FUTURE_WRITE, Linux 5.1; Python does not name it
_NORESERVE = 0x4000  # MAP_NORESERVE, which Python 3.13 names
_LIBC = ctypes.CDLL(None, use_errno=True)


class Index(Struct, frozen=True):
    """What a memfd has. `digest`: of all that decides its bytes; `num_bytes`: in use; `samples`: checksum of some of them."""

    digest: str
    num_bytes: int
    samples: int


class _Memory:
    """Pieces of a mapping, one after the other. A piece that does not fit is private memory."""

    packed = False

    def __init__(self, descriptor: int, num_bytes: int, flags: int) -> None:
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, num_bytes, flags)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._end = 0

    def take(self, *shape: int) -> torch.Tensor:
        """See `WeightMemory`."""
        num_bytes = torch.Size(shape).numel()
        first, self._end = self._end, self._end + -(-num_bytes // ALIGNMENT) * ALIGNMENT
        if num_bytes == 0 or self._end > len(self._map):
            assert num_bytes == 0 or not self.packed, "the digest decides the sizes of all pieces"
            return torch.empty(shape, dtype=torch.uint8)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=num_bytes, offset=first).view(shape)

    def keep(self, plain: torch.Tensor) -> torch.Tensor:
        """See `WeightMemory`."""
        kept = self.take(plain.nbytes).view(plain.dtype).view(plain.shape)
        if not self.packed:
            kept.copy_(plain)
        return kept

    def _make_read_only(self) -> None:
        """So that a stray write ends this process, and not what the next one maps. Raises OSError."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        if _LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(len(self._map)), mmap.PROT_READ):
            raise OSError(ctypes.get_errno(), "mprotect")

    def _sample(self, num_bytes: int) -> int:
        step = max(SAMPLE_BYTES, num_bytes // SAMPLES)
        return _checksum(self._map[first : min(first + SAMPLE_BYTES, num_bytes)] for first in range(0, num_bytes, step))


class WrittenMemory(_Memory):
    """A new memfd, to pack into. Owns its descriptor until `finish` or `close`."""

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        """For these parameters. Raises OSError when the system has no such memory, or only a slower one."""
        if only_private_is_huge():
            raise OSError(f"private memory gets huge pages here, and a memfd would get none ({HUGE_PAGES}/shmem_enabled)")
        most = 4 * sum(parameter.tensor.nbytes for parameter in parameters) + _SLACK  # addresses; what is not used takes nothing
        descriptor = os.memfd_create("tpserve-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, most)
            super().__init__(descriptor, most, mmap.MAP_SHARED | _NORESERVE)
        except (OSError, ValueError) as error:  # ValueError: more bytes than addresses
            os.close(descriptor)
            raise error if isinstance(error, OSError) else OSError(str(error)) from error

    def finish(self, digest: str) -> Index | None:
        """Make it read-only; None when not all pieces fit. Raises OSError."""
        if self._end > len(self._map):
            return None
        self._make_read_only()
        os.ftruncate(self.descriptor, max(1, self._end))
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _FUTURE_WRITE_SEAL
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals)
        return Index(digest, self._end, self._sample(self._end))

    def close(self) -> None:
        """Let go of the descriptor; this process's mapping stays."""
        os.close(self.descriptor)


class MappedMemory(_Memory):
    """The weights of a process that has ended."""

    packed = True

    def __init__(self, descriptor: int, index: Index) -> None:
        """Map them. Raises OSError when they cannot be mapped or have changed. Does not own the descriptor."""
        if os.fstat(descriptor).st_size != max(1, index.num_bytes):
            raise OSError("its size differs")
        super().__init__(descriptor, max(1, index.num_bytes), mmap.MAP_PRIVATE | _NORESERVE)
        self._make_read_only()
        if self._sample(index.num_bytes) != index.samples:
            raise OSError("its checksum differs")


def only_private_is_huge() -> bool:
    """Whether the system gives huge pages to private memory by itself, and none to a memfd: 4% of the speed of products."""
    return _chosen("enabled") == "always" and _chosen("shmem_enabled") in ("", "never", "deny")


def _chosen(name: str) -> str:
    """The word in brackets; "" for a kernel without this file."""
    try:
        return (HUGE_PAGES / name).read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return ""


def digest(*facts: object) -> str:
    """Of values that msgspec can encode."""
    return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()


def _checksum(pieces: Iterable[bytes]) -> int:
    checksum = 0
    for piece in pieces:
        checksum = zlib.crc32(piece, checksum)
    return checksum
