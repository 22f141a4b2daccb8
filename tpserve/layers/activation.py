"""Activations of the feed-forward block, computed in float32 and rounded once. T rows, I channels.

On the CPU an element's bits are the same wherever it stands (docs/numerics.md), which F.silu's and F.gelu's are not: their
vector and scalar paths differ, and which one an element takes depends on the other rows.
"""

import math
from collections.abc import Callable, Iterator

import torch

PIECE = 1 << 17
"""Elements computed at once on the CPU: what is between two operations stays in its caches."""


def silu_mul(gate_up_TI2: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half: [T, I]."""
    if gate_up_TI2.is_cuda:
        from tpserve_kernels import activation

        return activation.silu_mul(gate_up_TI2)
    return _gated(gate_up_TI2, torch.neg)


def gelu_tanh_mul(gate_up_TI2: torch.Tensor) -> torch.Tensor:
    """gelu_tanh(first half) * second half: [T, I]."""
    if gate_up_TI2.is_cuda:
        from tpserve_kernels import activation

        return activation.gelu_tanh_mul(gate_up_TI2)
    return _gated(gate_up_TI2, _gelu_exponent)


def clamped_swiglu(gate_up_TI2: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """gate / (1 + exp(-alpha gate)) * (up + 1), gate at most `limit` and up within it: [T, I]."""
    if gate_up_TI2.is_cuda:
        from tpserve_kernels import activation

        return activation.clamped_swiglu(gate_up_TI2, alpha, limit)
    gate_TI, up_TI = gate_up_TI2.chunk(2, dim=-1)
    out_TI = torch.empty_like(gate_TI, memory_format=torch.contiguous_format)
    for rows in _pieces(out_TI):
        gate, up = gate_TI[rows].float().clamp(max=limit), up_TI[rows].float().clamp(-limit, limit)
        out_TI[rows] = gate.div_((gate * -alpha).exp_().add_(1)).mul_(up.add_(1))
    return out_TI


def _gated(gate_up_TI2: torch.Tensor, exponent: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """gate / (1 + exp(exponent(gate))) * up."""
    gate_TI, up_TI = gate_up_TI2.chunk(2, dim=-1)
    out_TI = torch.empty_like(gate_TI, memory_format=torch.contiguous_format)
    for rows in _pieces(out_TI):
        gate = gate_TI[rows].to(torch.float32, copy=True)
        torch.div(gate, exponent(gate).exp_().add_(1), out=gate)
        out_TI[rows] = gate.mul_(up_TI[rows])
    return out_TI


def _pieces(x_TI: torch.Tensor) -> Iterator[slice]:
    step = max(1, PIECE // x_TI.shape[1])
    return (slice(row, row + step) for row in range(0, len(x_TI), step))


def _gelu_exponent(x: torch.Tensor) -> torch.Tensor:
    return (x * x).mul_(0.044715).add_(1).mul_(x).mul_(-2 * math.sqrt(2 / math.pi))


def gelu(x_TI: torch.Tensor) -> torch.Tensor:
    """x times the normal distribution function of x (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    x = x_TI.float()
    return (x * 0.5).mul_((x * 0.5**0.5).erf_().add_(1)).to(x_TI.dtype)


def gelu_tanh(x_TI: torch.Tensor) -> torch.Tensor:
    """GELU's approximation by a hyperbolic tangent: with the logistic function, x / (1 + exp(-2 u))."""
    x = x_TI.float()
    return (x / _gelu_exponent(x).exp_().add_(1)).to(x_TI.dtype)


def silu(x_TI: torch.Tensor) -> torch.Tensor:
    """x times the logistic function of x."""
    x = x_TI.float()
    return (x / x.neg().exp_().add_(1)).to(x_TI.dtype)


PLAIN = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu": torch.relu}
"""Those of a block without a gate, by their names in ModelSpec."""
GATED = {"silu": silu_mul, "gelu_tanh": gelu_tanh_mul}
