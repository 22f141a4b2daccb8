"""The gated feed-forward block, its intermediate channels split over ranks. T rows, H channels, I channels of this rank."""

from dataclasses import dataclass, replace

import torch

from tpserve.parallel.group import Group
from tpserve.quant.matmul import matmul
from tpserve.quant.packed import Weight, pack

PIECE = 1 << 17
"""Elements of the activation computed at once on the CPU: what is between two operations stays in its caches."""


def silu_mul(gate_up_TI2: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half: [T, I]."""
    if gate_up_TI2.is_cuda:
        from tpserve_kernels import activation

        return activation.silu_mul(gate_up_TI2)
    gate_TI, up_TI = gate_up_TI2.chunk(2, dim=-1)
    out_TI = torch.empty_like(gate_TI, memory_format=torch.contiguous_format)
    step = max(1, PIECE // gate_TI.shape[1])
    for row in range(0, len(out_TI), step):
        rows = slice(row, row + step)
        gate = gate_TI[rows].to(torch.float32, copy=True)
        # Not F.silu: its vector and scalar paths differ, and which one an element takes depends on the other rows.
        torch.div(gate, gate.neg().exp_().add_(1), out=gate)
        out_TI[rows] = gate.mul_(up_TI[rows])
    return out_TI


@dataclass(frozen=True)
class MLP:
    """Gate and up packed in one matrix [2 I, H]; the bias of `down` is added once, after the sum over ranks."""

    gate_up: Weight
    gate_up_bias: torch.Tensor | None
    down: Weight
    down_bias: torch.Tensor | None
    tp: Group

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        gate_up_TI2 = matmul(x_TH, self.gate_up)
        if self.gate_up_bias is not None:
            gate_up_TI2 += self.gate_up_bias
        out_TH = self.tp.all_reduce(matmul(silu_mul(gate_up_TI2), self.down))
        return out_TH if self.down_bias is None else out_TH + self.down_bias

    def packed(self) -> "MLP":
        """The same with packed weights."""
        return replace(self, gate_up=pack(self.gate_up), down=pack(self.down))
