"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-rotation layout: channel c turns with c + D / 2.

T rows, N heads, D channels of a head, E = D / 2 frequencies, P positions.
"""

import math
from dataclasses import dataclass

import torch

from tpserve.types.model_spec import RopeSpec


@dataclass(frozen=True)
class Turn:
    """The rotation to the positions of a step's rows, made once for all layers."""

    rope: "Rope"
    positions_T: torch.Tensor
    rows: tuple[torch.Tensor, torch.Tensor] | None
    """On the CPU the positions' cosines and sines, [T, 1, D] each, the sines of the lower half negated."""

    def __call__(self, q_TND: torch.Tensor, k_TKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate queries and keys."""
        if self.rows is not None:
            return _rotate(q_TND, *self.rows), _rotate(k_TKD, *self.rows)
        from tpserve_kernels import rope

        return rope.apply_rope(q_TND, k_TKD, self.rope.cos_PE, self.rope.sin_PE, self.positions_T)


@dataclass(frozen=True)
class Rope:
    """Cosines and sines of every position, float32 [P, E]."""

    cos_PE: torch.Tensor
    sin_PE: torch.Tensor

    def to(self, positions_T: torch.Tensor) -> Turn:
        """The rotation to these positions."""
        if positions_T.is_cuda:
            return Turn(self, positions_T, None)
        cos_TE, sin_TE = self.cos_PE[positions_T], self.sin_PE[positions_T]
        return Turn(
            self, positions_T, (torch.cat((cos_TE, cos_TE), 1).unsqueeze(1), torch.cat((-sin_TE, sin_TE), 1).unsqueeze(1))
        )


def _rotate(x_TND: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
    low_TNE, high_TNE = x_TND.chunk(2, dim=-1)
    crossed_TND = torch.cat((high_TNE, low_TNE), dim=-1)
    return (x_TND * cos_T1D).add_(crossed_TND * sin_T1D).to(x_TND.dtype)


def tables(spec: RopeSpec, head_dim: int, num_positions: int, device: torch.device) -> Rope:
    """The tables of positions [0, num_positions)."""
    angles_PE = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies(spec, head_dim))
    return Rope(angles_PE.cos().to(device), angles_PE.sin().to(device))


def frequencies(spec: RopeSpec, head_dim: int) -> torch.Tensor:
    """Radians per position, float32 [E]."""
    base_E = 1.0 / spec.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if spec.scaling == "default":
        return base_E
    if spec.scaling == "linear":
        return base_E / spec.factor
    # Llama 3.1: slow waves are stretched by `factor`, fast ones kept, those between interpolated.
    turns_E = spec.original_max_position * base_E / (2 * math.pi)
    blend_E = ((turns_E - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)).clamp(0, 1)
    return blend_E * base_E + (1 - blend_E) * base_E / spec.factor
