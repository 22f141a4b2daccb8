"""What this machine reaches on the threads of the engine: bytes read from memory, and operations of a product, a second.

Legend: T rows, K inner channels, N outputs.
"""

import time
from collections.abc import Callable

import torch

from tpserve.bench.roofline_work import MachineRates
from tpserve.quant.matmul import matmul
from tpserve.quant.packed import pack

READ_BYTES = 256 << 20
"""More than the cache of a few cores holds."""
READ_WIDTH = 8192
SHAPES = ((256, 256, 512), (512, 512, 512), (1024, 1024, 512))
"""(T, N, K) of products whose operands stay in a core's cache, for units from scalar to tiles."""
REPEATS, PRODUCT_S = 5, 0.3


@torch.inference_mode()
def read_rate() -> float:
    """Bytes a second: the best of several readers, the engine's own product of one row among them."""
    weight_NK = torch.ones(READ_BYTES // 4 // READ_WIDTH, READ_WIDTH)
    x_K = torch.ones(READ_WIDTH)
    readers: list[Callable[[], object]] = [weight_NK.sum, lambda: weight_NK @ x_K]
    rate = READ_BYTES / min(best_s(reader, REPEATS) for reader in readers)
    packed = pack(weight_NK)
    if isinstance(packed, torch.Tensor):
        return rate
    x_TK = x_K.unsqueeze(0)
    return max(rate, READ_BYTES / best_s(lambda: matmul(x_TK, packed), REPEATS))


@torch.inference_mode()
def product_rate(dtype: torch.dtype, *, int8: bool) -> float:
    """Operations a second of the engine's own product with weights of `dtype`, in int8 if asked."""
    rate = 0.0
    for rows, outputs, inner in SHAPES:
        x_TK, weight = torch.randn(rows, inner).to(dtype), pack(torch.randn(outputs, inner).to(dtype), int8=int8)
        matmul(x_TK, weight)
        once_s = best_s(lambda x_TK=x_TK, weight=weight: matmul(x_TK, weight), 1)  # type: ignore[misc]
        repeats = max(REPEATS, int(PRODUCT_S / max(once_s, 1e-6)))
        taken_s = best_s(lambda x_TK=x_TK, weight=weight: matmul(x_TK, weight), repeats)  # type: ignore[misc]
        rate = max(rate, 2 * rows * outputs * inner / taken_s)
    return rate


def best_of(first: MachineRates, second: MachineRates) -> MachineRates:
    """The higher of both rates each: what other processes took from one measurement, the other may have had."""
    return MachineRates(max(first.bytes_per_s, second.bytes_per_s), max(first.flops_per_s, second.flops_per_s))


def best_s(call: Callable[[], object], repeats: int) -> float:
    """The least seconds of a call."""
    least = float("inf")
    for _ in range(repeats):
        begin_s = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - begin_s)
    return least
