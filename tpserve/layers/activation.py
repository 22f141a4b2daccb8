"""Activations of the feed-forward block, computed in float32 and rounded once to the dtype of the input.

The gated ones are SwiGLU and GEGLU (Shazeer 2020, arXiv:2002.05202). Inputs are float32, float16 or bfloat16. `num_rows` (CUDA):
int32 [1] on the device, the number of rows that count; the others are undefined in the result.

Invariant on the CPU: the bits of an element do not depend on its position (docs/numerics.md). F.silu and F.gelu break this:
their vector and scalar paths give different bits, and the other rows decide which path an element takes.

Legend: T rows, I channels.
"""

import math
from collections.abc import Callable, Iterator

import torch

from tpserve_kernels.cpu import rows
from tpserve_kernels.cpu.library import is_native
from tpserve_kernels.cpu.rows import ActivationKind

CHUNK_ELEMENTS = 1 << 17
"""Elements per pass on the CPU: intermediate results stay in its caches."""


def silu_mul(gate_up_TI2: torch.Tensor, num_rows: torch.Tensor | None = None) -> torch.Tensor:
    """SwiGLU without its matrices: silu(first half) * second half, [T, 2 I] -> [T, I], contiguous."""
    if gate_up_TI2.is_cuda:
        from tpserve_kernels import activation

        return activation.silu_mul(gate_up_TI2, num_rows)
    if is_native(gate_up_TI2):
        return rows.activation(gate_up_TI2, ActivationKind.SILU_MUL)
    return _gated(gate_up_TI2, torch.neg)


def gelu_tanh_mul(gate_up_TI2: torch.Tensor, num_rows: torch.Tensor | None = None) -> torch.Tensor:
    """GEGLU without its matrices: gelu_tanh(first half) * second half, [T, 2 I] -> [T, I], contiguous."""
    if gate_up_TI2.is_cuda:
        from tpserve_kernels import activation

        return activation.gelu_tanh_mul(gate_up_TI2, num_rows)
    if is_native(gate_up_TI2):
        return rows.activation(gate_up_TI2, ActivationKind.GELU_TANH_MUL)
    return _gated(gate_up_TI2, _gelu_exponent)


def clamped_swiglu(gate_up_TI2: torch.Tensor, alpha: float, limit: float, num_rows: torch.Tensor | None = None) -> torch.Tensor:
    """SwiGLU of gpt-oss (model card 2025, arXiv:2508.10925): gate / (1 + exp(-alpha gate)) * (up + 1), [T, 2 I] -> [T, I].

    The first half of a row is the gate, at most `limit`; the second is up, clamped to [-limit, limit].
    """
    if gate_up_TI2.is_cuda:
        from tpserve_kernels import activation

        return activation.clamped_swiglu(gate_up_TI2, alpha, limit, num_rows)
    if is_native(gate_up_TI2):
        return rows.activation(gate_up_TI2, ActivationKind.CLAMPED_SWIGLU, alpha, limit)
    gate_TI, up_TI = gate_up_TI2.chunk(2, dim=-1)
    out_TI = torch.empty_like(gate_TI, memory_format=torch.contiguous_format)
    for chunk in _row_chunks(out_TI):
        gate, up = gate_TI[chunk].float().clamp(max=limit), up_TI[chunk].float().clamp(-limit, limit)
        out_TI[chunk] = gate.div_((gate * -alpha).exp_().add_(1)).mul_(up.add_(1))
    return out_TI


def _gated(gate_up_TI2: torch.Tensor, exponent: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """gate / (1 + exp(exponent(gate))) * up, [T, 2 I] -> [T, I]."""
    gate_TI, up_TI = gate_up_TI2.chunk(2, dim=-1)
    out_TI = torch.empty_like(gate_TI, memory_format=torch.contiguous_format)
    for chunk in _row_chunks(out_TI):
        gate = gate_TI[chunk].to(torch.float32, copy=True)
        torch.div(gate, exponent(gate).exp_().add_(1), out=gate)
        out_TI[chunk] = gate.mul_(up_TI[chunk])
    return out_TI


def _row_chunks(x_TI: torch.Tensor) -> Iterator[slice]:
    """Slices of rows with about CHUNK_ELEMENTS elements each."""
    step = max(1, CHUNK_ELEMENTS // x_TI.shape[1])
    return (slice(row, row + step) for row in range(0, len(x_TI), step))


def _gelu_exponent(x: torch.Tensor) -> torch.Tensor:
    """-2 u of GELU's tanh form, since (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u))."""
    return (x * x).mul_(0.044715).add_(1).mul_(x).mul_(-2 * math.sqrt(2 / math.pi))


def gelu(x_TI: torch.Tensor) -> torch.Tensor:
    """GELU, x times the normal distribution function of x (Hendrycks and Gimpel 2016, arXiv:1606.08415): [T, I]."""
    if x_TI.is_cuda:
        return _on_card(x_TI, "gelu")
    if is_native(x_TI):
        return rows.activation(x_TI, ActivationKind.GELU)
    x = x_TI.float()
    return (x * 0.5).mul_((x * 0.5**0.5).erf_().add_(1)).to(x_TI.dtype)


def gelu_tanh(x_TI: torch.Tensor) -> torch.Tensor:
    """GELU's tanh approximation (same paper), written with the logistic function: x / (1 + exp(-2 u)), [T, I]."""
    if x_TI.is_cuda:
        return _on_card(x_TI, "gelu_tanh")
    if is_native(x_TI):
        return rows.activation(x_TI, ActivationKind.GELU_TANH)
    x = x_TI.float()
    return (x / _gelu_exponent(x).exp_().add_(1)).to(x_TI.dtype)


def silu(x_TI: torch.Tensor) -> torch.Tensor:
    """SiLU, x times the logistic function of x (Elfwing et al. 2017, arXiv:1702.03118): [T, I]."""
    if x_TI.is_cuda:
        return _on_card(x_TI, "silu")
    if is_native(x_TI):
        return rows.activation(x_TI, ActivationKind.SILU)
    x = x_TI.float()
    return (x / x.neg().exp_().add_(1)).to(x_TI.dtype)


def relu(x_TI: torch.Tensor) -> torch.Tensor:
    """x where it is positive, else 0: [T, I]."""
    return rows.activation(x_TI, ActivationKind.RELU) if is_native(x_TI) else x_TI.relu()


def _on_card(x_TI: torch.Tensor, kind: str) -> torch.Tensor:
    from tpserve_kernels import activation

    return activation.plain(x_TI, kind)


ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu}
"""Activations without a gate, by their names in ModelSpec."""
GATED_ACTIVATIONS = {"silu": silu_mul, "gelu_tanh": gelu_tanh_mul}
"""Activations with a gate, by their names in ModelSpec."""
NATIVE_KINDS = {
    silu_mul: ActivationKind.SILU_MUL,
    gelu_tanh_mul: ActivationKind.GELU_TANH_MUL,
    silu: ActivationKind.SILU,
    gelu: ActivationKind.GELU,
    gelu_tanh: ActivationKind.GELU_TANH,
    relu: ActivationKind.RELU,
}
"""What the library of CPU kernels calls each of them."""
