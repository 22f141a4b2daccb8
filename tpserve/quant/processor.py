"""What of this processor decides the bits of a product: what it can do, and what comes of some products.

Ranks that compute the same rows (of one stage) must be alike in it: each draws, and chooses experts, by itself.
"""

import hashlib
import platform
from collections.abc import Mapping

import torch

from tpserve.quant.matmul import matmul
from tpserve.quant.packed import PACKABLE, can_pack, has_amx, pack

INNER, OUTPUTS, ROWS = 2048, 16, 4


def facts(limits: Mapping[str, str]) -> dict[str, str]:
    """Of the CPU. `limits`: variables by which the user keeps libraries from instructions.

    The libraries also choose by vendor and caches, which no flag tells: "CPU products" is a hash of what some products give.
    """
    level = [platform.machine(), torch.backends.cpu.get_cpu_capability(), *(["AMX"] if has_amx() else [])]
    level += [f"packs {str(dtype).removeprefix('torch.')}" for dtype in PACKABLE if can_pack(dtype)]
    return {"CPU": " ".join([*level, *(f"{name}={text}" for name, text in sorted(limits.items()))]), "CPU products": _products()}


@torch.inference_mode()
def _products() -> str:
    """A hash of the bits of each kind of product, of numbers that every processor makes alike."""
    digest = hashlib.sha256()
    x_TK, weight_NK = _numbers(ROWS, INNER), _numbers(OUTPUTS, INNER)
    for dtype in PACKABLE:
        digest.update(_bits(matmul(x_TK.to(dtype), pack(weight_NK.to(dtype)))))
    digest.update(_bits(torch.bmm(x_TK.unsqueeze(0), weight_NK.T.unsqueeze(0))))
    digest.update(_bits(torch.exp(x_TK[:, :256])))
    return digest.hexdigest()[:12]


def _numbers(rows: int, columns: int) -> torch.Tensor:
    """Between -0.5 and 0.5: [rows, columns] float32, by integers and one exact division."""
    return (torch.arange(rows * columns) * 40503 % 65536).view(rows, columns) / 65536 - 0.5


def _bits(x: torch.Tensor) -> bytes:
    return bytes(x.float().contiguous().view(torch.uint8).flatten().tolist())
