"""This rank's device: which card, or which share of the cores, and what to say when it cannot be had or is full."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tpserve.config.machine import available_cores
from tpserve.errors import UserError

GIB = 1 << 30


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


@contextmanager
def room_for(what: str, device: torch.device) -> Iterator[None]:
    """Turn a full card into a UserError that says who fills it. `what` completes "ran out of memory while ..."."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        ours = torch.cuda.memory_reserved(device)
        raise UserError(
            f"GPU {device.index} ran out of memory while {what}: {total / GIB:.1f} GiB in all, {ours / GIB:.1f} taken by this "
            f"rank, {(total - free - ours) / GIB:.1f} by other processes and the driver: use more ranks (--tensor-parallel-size, "
            "--pipeline-parallel-size), a smaller --max-num-batched-tokens, or free the card (nvidia-smi shows who holds it)"
        ) from error
