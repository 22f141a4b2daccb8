"""This rank's device: which GPU or which share of the cores, how much memory is free, and which processes use it."""

import logging
import os
import subprocess
from pathlib import Path

import torch

from tpserve.config.sizes import size
from tpserve.errors import UserError
from tpserve.host.resources import available_cores, available_memory
from tpserve.parallel.group import Group
from tpserve_kernels.cpu.library import Isa, library, load

log = logging.getLogger(__name__)

DRIVER, PCI = Path("/proc/driver/nvidia/gpus"), Path("/sys/bus/pci/devices")
NVIDIA_SMI_S = 10.0
"""Timeout of nvidia-smi, which may have to load the driver first."""


def choose(kind: str, local_rank: int, local_ranks: int) -> torch.device:
    """This rank's GPU (ranks share GPUs when there are fewer), or the CPU with this rank's share of the cores as threads.

    torchrun's default for the CPU is one thread a rank. Loads the library of CPU kernels first. Raises UserError when the GPU is
    missing or in exclusive use, or the CPU's instruction set is unknown.
    """
    if kind == "cpu":
        _load_kernels(local_rank, local_ranks)
        torch.set_num_threads(max(1, available_cores() // local_ranks))
        return torch.device("cpu")
    try:
        device = torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        torch.empty(1, device=device)  # the first allocation creates the context; a GPU in exclusive use refuses it
    except RuntimeError as error:
        raise UserError(
            f"GPU {local_rank} cannot be used ({str(error).partition(chr(10))[0]}): nvidia-smi shows whether another process "
            "holds it; choose others with CUDA_VISIBLE_DEVICES, or --device cpu",
            param="device",
        ) from error
    return device


def _load_kernels(local_rank: int, local_ranks: int) -> None:
    try:
        found, why_not = load()
    except ValueError as error:
        raise UserError(str(error)) from error
    if found is not None:
        found.allow_spinning(available_cores() >= local_ranks)
    elif local_rank == 0:
        log.warning("torch's operators serve, which are slower than the library of CPU kernels: %s", why_not)


def agree_on_isa(device: torch.device, group: Group) -> str:
    """Limit the library of CPU kernels to the lowest instruction set of the ranks of `group`, which then compute alike.

    They all call this before they compute. Returns a log text, "" when nothing changed.
    """
    if device.type != "cpu":
        return ""
    found = library()
    lowest = group.all_reduce_min(-1 if found is None else found.isa)
    if found is None or lowest in (-1, found.isa):  # -1: their dtype is not the library's
        return ""
    own = found.isa
    found.limit(Isa(lowest))
    return f"computes with {found.isa.name.lower()} instructions, not {own.name.lower()}: another rank of its stage has no others"


def kernels_id(device: torch.device) -> str:
    """What decides the bits of the library of CPU kernels: its instruction set and version; "" where torch's operators serve."""
    found = library() if device.type == "cpu" else None
    return "" if found is None else found.numerics


def bind(device: torch.device, driver: Path = DRIVER, buses: Path = PCI) -> str:
    """Bind this thread, and threads that it starts later, to the cores near the GPU. Returns a log text, "" when nothing changes.

    Uses only cores that this process may use. Changes nothing when none of them is near the GPU or when the kernel does not know
    the GPU's place. `driver`, `buses`: the kernel's directories for NVIDIA's driver and for PCI devices.
    """
    if device.type != "cuda":
        return ""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        place = next(card.parent.name for card in driver.glob("*/information") if uuid in card.read_text())
        listed = (buses / place.lower() / "local_cpulist").read_text().strip()
    except (StopIteration, OSError):
        return ""
    near = cores_of(listed) & os.sched_getaffinity(0)
    if not near:
        return ""
    os.sched_setaffinity(0, near)
    return f"runs on {len(near)} cores near GPU {device.index} ({listed}); --no-binding leaves that to the system"


def cores_of(listed: str) -> set[int]:
    """Parse the kernel's notation for a set of cores, like "0-3,8"."""
    runs = [run.partition("-") for run in listed.split(",") if run]
    return {core for first, _, last in runs for core in range(int(first), int(last or first) + 1)}


def free_memory(device: torch.device) -> int:
    """Free bytes of the GPU, or of this machine or container."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory().free


def ranks_per_node(device: torch.device, local_ranks: int) -> int:
    """How many ranks a node like this one can run, each with as much memory as a rank has now."""
    return max(local_ranks, torch.cuda.device_count()) if device.type == "cuda" else local_ranks


def ranks_on_gpu(device: torch.device, local_ranks: int) -> int:
    """How many of this node's ranks use the GPU `device`."""
    return len(range(device.index, local_ranks, torch.cuda.device_count()))


def describe_memory(device: torch.device) -> str:
    """For a GPU, the other processes that nvidia-smi shows on it; for the CPU, free memory and what limits it."""
    if device.type == "cpu":
        memory = available_memory()
        return f"{size(memory.free)} are free of the {size(memory.total)} of {memory.of}"
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return f"GPU {device.index}: {other_processes(uuid)}"


def other_processes(uuid: str) -> str:
    """The other processes on the GPU `uuid` and the memory of each, in words."""
    query = ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid,used_gpu_memory,process_name", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi, which lists other processes, does not run here: run it on the host"
    rows = [[cell.strip() for cell in line.split(",", 3)] for line in listed.splitlines()]
    others = [row for row in rows if row[0] == uuid and row[1] != str(os.getpid())]
    found = [f"pid {pid} ({name}) {mebibytes} MiB" for _, pid, mebibytes, name in others]
    if not found:
        return "nvidia-smi shows no other process on it (from inside a container it cannot: run it on the host)"
    return "also on it: " + ", ".join(found)
