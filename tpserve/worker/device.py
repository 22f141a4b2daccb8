"""This rank's device: which card, or which share of the cores, and who else is on it when it is full."""

import os
import subprocess
from pathlib import Path

import torch

from tpserve.config.sizes import size
from tpserve.errors import UserError
from tpserve.host.resources import available_cores, available_memory

DRIVER, PCI = Path("/proc/driver/nvidia/gpus"), Path("/sys/bus/pci/devices")
NVIDIA_SMI_S = 10.0
"""It may have to wake the driver first."""


def choose(kind: str, local_rank: int, local_ranks: int) -> torch.device:
    """The card of this rank (ranks share cards when there are fewer), or the CPU with its share of the cores.

    torchrun would leave a rank on the CPU a single thread. UserError when the card is missing or taken.
    """
    if kind == "cpu":
        torch.set_num_threads(max(1, available_cores() // local_ranks))
        return torch.device("cpu")
    try:
        device = torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        torch.empty(1, device=device)  # the first allocation makes the context, which a card in use may refuse
    except RuntimeError as error:
        raise UserError(
            f"GPU {local_rank} cannot be used ({str(error).partition(chr(10))[0]}): nvidia-smi shows whether another process "
            "holds it; choose others with CUDA_VISIBLE_DEVICES, or --device cpu",
            param="device",
        ) from error
    return device


def bind(device: torch.device, driver: Path = DRIVER, buses: Path = PCI) -> str:
    """Keep this thread, and those that it will start, to the cores near the card; says so, empty when nothing is done.

    Of the cores that this process may use; none of the near ones among them, or a card whose place the system does not tell:
    nothing. `driver`, `buses`: what the kernel tells of NVIDIA's cards and of PCI devices.
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
    """The kernel's way of writing sets of cores: "0-3,8"."""
    runs = [run.partition("-") for run in listed.split(",") if run]
    return {core for first, _, last in runs for core in range(int(first), int(last or first) + 1)}


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on the card, or on this machine."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory().free


def places(device: torch.device, local_ranks: int) -> int:
    """How many ranks a node like this one has place for, each with as much memory as a rank has now."""
    return max(local_ranks, torch.cuda.device_count()) if device.type == "cuda" else local_ranks


def sharers(device: torch.device, local_ranks: int) -> int:
    """How many of this node's ranks are on the card."""
    return len(range(device.index, local_ranks, torch.cuda.device_count()))


def occupants(device: torch.device) -> str:
    """Who else holds memory of a card, as far as nvidia-smi knows; of a machine, how much is free and what limits it."""
    if device.type == "cpu":
        memory = available_memory()
        return f"{size(memory.free)} are free of the {size(memory.total)} of {memory.of}"
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return f"GPU {device.index}: {neighbours(uuid)}"


def neighbours(uuid: str) -> str:
    """Other processes on the card `uuid`, and what they hold."""
    query = ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid,used_gpu_memory,process_name", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "who else holds it nvidia-smi would tell, which does not run here: run it on the host"
    rows = [[cell.strip() for cell in line.split(",", 3)] for line in listed.splitlines()]
    others = [row for row in rows if row[0] == uuid and row[1] != str(os.getpid())]
    found = [f"pid {pid} ({name}) {mebibytes} MiB" for _, pid, mebibytes, name in others]
    if not found:
        return "nvidia-smi shows no other process on it (from inside a container it cannot: run it on the host)"
    return "also on it: " + ", ".join(found)
