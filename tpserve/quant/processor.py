"""The facts about this CPU that decide the bits of a rank's results.

The ranks of a stage must compute alike: each rank samples tokens and routes to experts by itself, from equal bits. The library of
CPU kernels computes alike wherever it runs on one instruction set, and a stage agrees on the lowest of its ranks
(`worker/device.py`). What torch computes depends on the processor.
"""

import hashlib
import platform
from collections.abc import Mapping

import torch

from tpserve.quant.matmul import matmul
from tpserve.quant.onednn import PACKABLE, can_pack, has_amx
from tpserve.quant.packed import pack
from tpserve.types.messages import KERNELS
from tpserve_kernels.cpu.library import library, serves

INNER, OUTPUTS, ROWS = 2048, 16, 4


def facts(limits: Mapping[str, str], dtype: torch.dtype, *, experts: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Two dicts of facts by name, for a model of `dtype`: those that the ranks of a stage must have alike, and others.

    "CPU kernels" is the version of the library, "none" where torch serves. "CPU level" are the architecture and the instruction
    sets that torch's libraries use; `limits`: the set environment variables that limit those, by name. "CPU operators" is a hash
    of sample results of torch, which is needed since its libraries also choose a path by vendor and cache sizes: without the
    library of all that decide a row's bits, with it of `softmax` of models with `experts`, by which each rank routes tokens.
    """
    level = [platform.machine(), torch.backends.cpu.get_cpu_capability(), *(["AMX"] if has_amx() else [])]
    level += [f"packs {str(packable).removeprefix('torch.')}" for packable in PACKABLE if can_pack(packable)]
    cpu = {"CPU level": " ".join([*level, *(f"{name}={text}" for name, text in sorted(limits.items()))])}
    found = library() if serves(torch.device("cpu"), dtype) else None
    equal = {KERNELS: "none" if found is None else found.version}
    if found is None or experts:
        equal["CPU operators"] = _results(only_softmax=found is not None)
    if found is None:
        return cpu | equal, {}
    return equal, cpu | {"instruction set": found.isa.name.lower()}


@torch.inference_mode()
def _results(*, only_softmax: bool) -> str:
    """A hash over the bits of what torch computes of operands that are equal everywhere."""
    digest = hashlib.sha256()
    x_TK, weight_NK = _numbers(ROWS, INNER), _numbers(OUTPUTS, INNER)
    digest.update(_bits(torch.softmax(x_TK[:, :251], -1)))
    if not only_softmax:
        for dtype in PACKABLE:
            digest.update(_bits(matmul(x_TK.to(dtype), pack(weight_NK.to(dtype)))))
        digest.update(_bits(torch.bmm(x_TK.unsqueeze(0), weight_NK.T.unsqueeze(0))))
        digest.update(_bits(torch.exp(x_TK[:, :251])))
    return digest.hexdigest()[:12]


def _numbers(rows: int, columns: int) -> torch.Tensor:
    """Numbers between -0.5 and 0.5, float32 [rows, columns], from integers and one exact division."""
    return (torch.arange(rows * columns) * 40503 % 65536).view(rows, columns) / 65536 - 0.5


def _bits(x: torch.Tensor) -> bytes:
    """The bytes of a tensor as float32, without NumPy."""
    return bytes(x.float().contiguous().view(torch.uint8).flatten().tolist())
