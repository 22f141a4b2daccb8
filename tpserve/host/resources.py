"""This machine's GPUs, cores and memory, from /proc, /sys and package metadata. Never imports torch, never changes anything."""

import functools
import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tpserve.config import env
from tpserve.config.env import RankEnv
from tpserve.types.machine import Machine

_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60
"""cgroup v1 writes "no limit" as a number near 2**63."""


def of_rank(rank: RankEnv) -> Machine:
    """The `Machine` of a rank that torchrun or `tpserve serve` started."""
    launcher: Literal["torchrun", "serve"] = "torchrun" if rank.runtime_dir is None else "serve"
    return Machine(rank.world_size, rank.local_world_size, rank.nnodes, visible_gpus(), available_cores(), launcher)


def visible_gpus() -> int:
    """Number of NVIDIA GPUs that ranks of this node can use; respects CUDA_VISIBLE_DEVICES. 0 if torch is built without CUDA."""
    if not _torch_has_cuda():
        return 0
    present = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) or len(list(Path("/dev").glob("nvidia[0-9]*")))
    chosen = env.cuda_visible_devices()
    if chosen is None:
        return present
    count = 0
    for name in filter(None, chosen.split(",")):
        # As in CUDA, the first invalid name ends the list.
        if not name.strip().startswith(("GPU-", "MIG-")) and not (name.strip().isdecimal() and int(name) < present):
            break
        count += 1
    return count


@functools.cache
def _torch_has_cuda() -> bool:
    try:
        return "+cpu" not in importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False


def available_cores() -> int:
    """Cores that this process may use: its affinity mask, or fewer under a cgroup CPU quota. At least 1."""
    cores = len(os.sched_getaffinity(0))
    quota = _cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


@dataclass(frozen=True)
class Memory:
    """Bytes that can still be allocated, and the total in bytes. `of` names what sets the limit."""

    free: int
    total: int
    of: str


def available_memory() -> Memory:
    """The system's free memory, or less under a cgroup memory limit."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free, total = (int(meminfo[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    found = [Memory(free, total, "the machine")]
    for directory, limit_name, usage_name in _memory_groups():
        limit, usage = _number(directory / limit_name), _number(directory / usage_name)
        if limit is not None and usage is not None and limit < _UNLIMITED:
            found.append(Memory(max(0, limit - usage + _reclaimable(directory)), limit, f"the control group ({directory})"))
    return min(found, key=lambda memory: memory.free)


def cpu_model() -> str:
    """The processor's vendor, family, model and name from /proc/cpuinfo (on ARM its implementer, part and variant)."""
    fields = [line.partition(":") for line in _text(Path("/proc/cpuinfo")).partition("\n\n")[0].splitlines()]
    kinds = ("vendor_id", "cpu family", "model", "model name", "stepping", "CPU implementer", "CPU part", "CPU variant")
    return " ".join(value.strip() for name, _, value in fields if name.strip() in kinds)


def _cpu_quota() -> float | None:
    """Cores granted by the cgroup CPU quota; None without a limit."""
    for directory in _directories("", ""):
        try:
            quota, period = (directory / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if quota != "max":
            return int(quota) / int(period)
    for directory in _directories("cpu", "cpu"):
        quota_us, period_us = _number(directory / "cpu.cfs_quota_us"), _number(directory / "cpu.cfs_period_us")
        if quota_us is not None and period_us and quota_us > 0:
            return quota_us / period_us
    return None


def _memory_groups() -> list[tuple[Path, str, str]]:
    """(directory, limit file, usage file) of each cgroup that may limit memory."""
    new = [(d, "memory.max", "memory.current") for d in _directories("", "")]
    old = [(d, "memory.limit_in_bytes", "memory.usage_in_bytes") for d in _directories("memory", "memory")]
    return new + old


def _directories(controller: str, mount: str) -> list[Path]:
    """This process's cgroup of a v1 `controller` ("" for v2), and the root cgroup as seen inside a container."""
    found = []
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            found.append(_CGROUP / mount / path.lstrip("/"))
    return [*found, _CGROUP / mount]


def _reclaimable(directory: Path) -> int:
    """Bytes of page cache that the kernel reclaims before it refuses memory."""
    for line in _text(directory / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.lstrip("-").isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
