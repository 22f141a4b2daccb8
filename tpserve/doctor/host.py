"""What a node has: /dev/shm, free memory, and how fast it reads the model's files. The first rank of each node looks."""

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
SHM_ENOUGH, SHM_LEAST = 1 << 30, 32 << 20
READ_S = 2.0
CHUNK = 16 << 20
SLOW_LOAD_S = 120.0


class DiskRead(Struct, frozen=True):
    """What was read of the model, and whether the disk was asked: `warm` came from the page cache."""

    num_bytes: int
    """Of all weight files"""
    read: int
    took_s: float
    cache: Literal["cold", "warm", "unknown"]


class NodeReport(Struct, frozen=True):
    """What one node has, in bytes. `shm` and `disk` are None where there is none. `needed`: of a rank, for its weights."""

    host: str
    shm: int | None
    memory: int
    memory_of: str
    needed: int
    disk: DiskRead | None


def free_shm() -> int | None:
    """None where it is not mounted."""
    try:
        stat = os.statvfs(SHM)
    except OSError:
        return None
    return stat.f_bavail * stat.f_frsize


def weight_files(directory: Path) -> list[Path]:
    """Those that ranks would read, the largest first."""
    for form in WEIGHT_FORMATS:
        if paths := [path for path in directory.glob(form.pattern) if path.is_file()]:
            return sorted(paths, key=lambda path: -path.stat().st_size)
    return []


def read_rate(paths: Sequence[Path], limit_s: float = READ_S) -> DiskRead | None:
    """Read the files one after the other for so long, after asking the kernel to forget the part that is read."""
    if not paths:
        return None
    total = sum(path.stat().st_size for path in paths)
    read, cached, known, took_s = 0, 0, True, 0.0
    buffer = bytearray(CHUNK)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            length, offset = path.stat().st_size, 0
            while offset < length and took_s < limit_s:
                os.posix_fadvise(file.fileno(), offset, CHUNK, os.POSIX_FADV_DONTNEED)
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
    """Whether a page is in memory; None where the file system does not tell."""
    try:
        os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def judge(found: NodeReport, device: str) -> list[Verdict]:
    """A line for each thing."""
    return [_shm(found, device), _memory(found), _disk(found)]


def _shm(found: NodeReport, device: str) -> Verdict:
    what, enlarge = f"{SHM} on {found.host}", "docker run --shm-size=16G or --ipc=host; in Kubernetes an emptyDir in memory there"
    if found.shm is None:
        return Verdict("slow" if device == "cpu" else "broken", what, "not there", f"mount a tmpfs there: {enlarge}")
    if device == "cpu":
        return Verdict("good", what, f"{size(found.shm)} free; ranks on the CPU need none of it")
    if found.shm < SHM_LEAST:
        return Verdict("broken", what, f"{size(found.shm)} free, and NCCL puts its buffers there", enlarge)
    if found.shm < SHM_ENOUGH:
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
        return Verdict("good", what, "not tried: no weights are here (they are downloaded, or made up by --load-format dummy)")
    rate = disk.read / disk.took_s
    told = {
        "cold": "from the disk",
        "warm": "some of it from memory: the page cache could not be dropped",
        "unknown": "from disk or memory: this file system does not say",
    }[disk.cache]
    text = f"{rate / 1e9:.2f} GB/s ({size(disk.read)} in {duration(disk.took_s)}, {told}): "
    load_s = disk.num_bytes / rate
    text += f"{size(disk.num_bytes)} of weights load in {duration(load_s)} or more"
    if load_s > SLOW_LOAD_S:
        return Verdict(
            "slow", what, text, "put the model on a local NVMe disk, or read it once before the start to warm the cache"
        )
    return Verdict("good", what, text)
