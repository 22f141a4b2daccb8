"""The gated feed-forward block, its intermediate channels split over ranks. T rows, H channels, I channels of this rank."""

from dataclasses import dataclass

import torch

from tpserve.parallel.group import Group
from tpserve.quant.matmul import matmul


def silu_mul(gate_up_TI2: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half: [T, I]."""
    if gate_up_TI2.is_cuda:
        from tpserve_kernels import activation

        return activation.silu_mul(gate_up_TI2)
    gate_TI, up_TI = gate_up_TI2.float().chunk(2, dim=-1)
    # Not F.silu: its vector and scalar paths differ, and which one an element takes depends on the other rows.
    return (gate_TI / (1 + torch.exp(-gate_TI)) * up_TI).to(gate_up_TI2.dtype)


@dataclass(frozen=True)
class MLP:
    """Gate and up packed in one matrix [2 I, H]; the bias of `down` is added once, after the sum over ranks."""

    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    tp: Group

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        gate_up_TI2 = matmul(x_TH, self.gate_up)
        if self.gate_up_bias is not None:
            gate_up_TI2 += self.gate_up_bias
        out_TH = self.tp.all_reduce(matmul(silu_mul(gate_up_TI2), self.down))
        return out_TH if self.down_bias is None else out_TH + self.down_bias
