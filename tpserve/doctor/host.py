"""Checks of a node: /dev/shm, free memory, and the read rate of the model's files. The first rank of each node runs them."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from msgspec import Struct

from tpserve.config.sizes import size
from tpserve.doctor.verdict import Verdict, duration
from tpserve.types.model_files import WEIGHT_FORMATS

SHM = "/dev/shm"
SHM_GOOD_BYTES, SHM_MIN_BYTES = 1 << 30, 32 << 20
READ_S = 2.0
CHUNK_BYTES = 16 << 20
SLOW_LOAD_S = 120.0


class DiskRead(Struct, frozen=True):
    """A timed read of weight files."""

    num_bytes: int
    """The size of all weight files."""
    read: int
    """The bytes that were read."""
    took_s: float
    cache: Literal["cold", "warm", "unknown"]
    """`warm`: some bytes came from the page cache. `unknown`: the file system does not say."""


class NodeReport(Struct, frozen=True):
    """The resources of a node, in bytes. `shm`: free in /dev/shm; None when it is not mounted. `memory`: free for each rank, of
    `memory_of`. `needed`: the weights of a rank. `disk`: None when there are no weight files."""

    host: str
    shm: int | None
    memory: int
    memory_of: str
    needed: int
    disk: DiskRead | None


def free_shm() -> int | None:
    """Free bytes in /dev/shm; None when it is not mounted."""
    try:
        stat = os.statvfs(SHM)
    except OSError:
        return None
    return stat.f_bavail * stat.f_frsize


def weight_files(directory: Path) -> list[Path]:
    """The weight files that ranks would read, the largest first."""
    for form in WEIGHT_FORMATS:
        if paths := [path for path in directory.glob(form.pattern) if path.is_file()]:
            return sorted(paths, key=lambda path: -path.stat().st_size)
    return []


def read_rate(paths: Sequence[Path], limit_s: float = READ_S) -> DiskRead | None:
    """Read the files one after another for `limit_s` seconds, each part after asking the kernel to drop it from the page cache.

    Returns None without files.
    """
    if not paths:
        return None
    total = sum(path.stat().st_size for path in paths)
    read, cached, known, took_s = 0, 0, True, 0.0
    buffer = bytearray(CHUNK_BYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            length, offset = path.stat().st_size, 0
            while offset < length and took_s < limit_s:
                os.posix_fadvise(file.fileno(), offset, CHUNK_BYTES, os.POSIX_FADV_DONTNEED)
                was_cached = _is_cached(file.fileno(), offset)
                known, cached = known and was_cached is not None, cached + bool(was_cached)
                begin_s = time.perf_counter()
                count = os.preadv(file.fileno(), [buffer], offset)
                took_s += time.perf_counter() - begin_s
                if not count:
                    break
                offset, read = offset + count, read + count
        if took_s >= limit_s:
            break
    return DiskRead(total, read, took_s, ("warm" if cached else "cold") if known else "unknown")


def _is_cached(fd: int, offset: int) -> bool | None:
    """Whether the page at `offset` is in the page cache; None when the file system does not say."""
    try:
        os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def judge(found: NodeReport, device: str) -> list[Verdict]:
    """One verdict each for /dev/shm, memory and disk."""
    return [_shm(found, device), _memory(found), _disk(found)]


def _shm(found: NodeReport, device: str) -> Verdict:
    what, enlarge = f"{SHM} on {found.host}", "docker run --shm-size=16G or --ipc=host; in Kubernetes an emptyDir in memory there"
    if found.shm is None:
        return Verdict("slow" if device == "cpu" else "broken", what, "not mounted", f"mount a tmpfs there: {enlarge}")
    if device == "cpu":
        return Verdict("good", what, f"{size(found.shm)} free; ranks on the CPU need none of it")
    if found.shm < SHM_MIN_BYTES:
        return Verdict("broken", what, f"{size(found.shm)} free, and NCCL puts its buffers there", enlarge)
    if found.shm < SHM_GOOD_BYTES:
        return Verdict("slow", what, f"{size(found.shm)} free, which NCCL may fill with several GPUs", enlarge)
    return Verdict("good", what, f"{size(found.shm)} free")


def _memory(found: NodeReport) -> Verdict:
    what = f"memory on {found.host}"
    text = f"{size(found.memory)} free for each rank, of {found.memory_of}; weights take about {size(found.needed)}"
    if found.needed > found.memory:
        remedy = "more ranks, or a smaller model: `tpserve plan` says which layouts fit; see that nothing else runs there"
        return Verdict("broken", what, text, remedy)
    if found.needed > 0.8 * found.memory:
        return Verdict("slow", what, f"{text}: little is left for the KV cache", "`tpserve plan` says how many tokens it holds")
    return Verdict("good", what, text)


def _disk(found: NodeReport) -> Verdict:
    what, disk = f"disk on {found.host}", found.disk
    if disk is None or not disk.took_s:
        return Verdict(
            "good", what, "not tried: no weight files are here (they are downloaded at the start, or --load-format is dummy)"
        )
    rate = disk.read / disk.took_s
    source = {
        "cold": "from the disk",
        "warm": "some of it from memory: the page cache could not be dropped",
        "unknown": "from disk or memory: this file system does not say",
    }[disk.cache]
    text = f"{rate / 1e9:.2f} GB/s ({size(disk.read)} in {duration(disk.took_s)}, {source}): "
    load_s = disk.num_bytes / rate
    text += f"{size(disk.num_bytes)} of weights load in {duration(load_s)} or more"
    if load_s > SLOW_LOAD_S:
        return Verdict(
            "slow", what, text, "put the model on a local NVMe disk, or read it once before the start to warm the cache"
        )
    return Verdict("good", what, text)
