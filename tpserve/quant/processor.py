"""The facts about this CPU that decide the bits of a matrix product: its instruction sets, and the results of sample products.

The ranks of a stage must agree on them: each rank samples tokens and routes to experts by itself, from equal bits.
"""

import hashlib
import platform
from collections.abc import Mapping

import torch

from tpserve.quant.matmul import matmul
from tpserve.quant.onednn import PACKABLE, can_pack, has_amx
from tpserve.quant.packed import pack

INNER, OUTPUTS, ROWS = 2048, 16, 4


def facts(limits: Mapping[str, str]) -> dict[str, str]:
    """Two facts by name: "CPU", architecture and instruction sets, and "CPU products", a hash of sample products.

    The hash is needed since libraries also choose a path by vendor and cache sizes, which no CPU flag shows.
    `limits`: the set environment variables that limit the instruction sets of libraries, by name.
    """
    level = [platform.machine(), torch.backends.cpu.get_cpu_capability(), *(["AMX"] if has_amx() else [])]
    level += [f"packs {str(dtype).removeprefix('torch.')}" for dtype in PACKABLE if can_pack(dtype)]
    return {"CPU": " ".join([*level, *(f"{name}={text}" for name, text in sorted(limits.items()))]), "CPU products": _products()}


@torch.inference_mode()
def _products() -> str:
    """A hash over the bits of each kind of product, of operands that are equal on every processor."""
    digest = hashlib.sha256()
    x_TK, weight_NK = _numbers(ROWS, INNER), _numbers(OUTPUTS, INNER)
    for dtype in PACKABLE:
        digest.update(_bits(matmul(x_TK.to(dtype), pack(weight_NK.to(dtype)))))
    digest.update(_bits(torch.bmm(x_TK.unsqueeze(0), weight_NK.T.unsqueeze(0))))
    digest.update(_bits(torch.exp(x_TK[:, :256])))
    return digest.hexdigest()[:12]


def _numbers(rows: int, columns: int) -> torch.Tensor:
    """Numbers between -0.5 and 0.5, float32 [rows, columns], from integers and one exact division."""
    return (torch.arange(rows * columns) * 40503 % 65536).view(rows, columns) / 65536 - 0.5


def _bits(x: torch.Tensor) -> bytes:
    """The bytes of a tensor as float32, without NumPy."""
    return bytes(x.float().contiguous().view(torch.uint8).flatten().tolist())
