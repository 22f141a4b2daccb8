"""This rank's device: which card, or which share of the cores, and who else is on it when it is full."""

import os
import subprocess

import torch

from tpserve.config.machine import available_cores, available_memory
from tpserve.errors import UserError

GIB = 1 << 30
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
        return f"{memory.free / GIB:.1f} GiB are free of the {memory.total / GIB:.1f} GiB of {memory.of}"
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
