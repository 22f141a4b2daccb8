"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-rotation layout: channel c turns with c + D / 2.

T rows, N heads, D channels of a head, E = D / 2 frequencies, P positions.
"""

import math
from dataclasses import dataclass

import torch

from tpserve.types.model_spec import RopeSpec


@dataclass(frozen=True)
class Rope:
    """Cosines and sines of every position, float32 [P, E]."""

    cos_PE: torch.Tensor
    sin_PE: torch.Tensor

    def turn(self, q_TND: torch.Tensor, k_TKD: torch.Tensor, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate queries and keys to their positions."""
        if q_TND.is_cuda:
            from tpserve_kernels import rope

            return rope.apply_rope(q_TND, k_TKD, self.cos_PE, self.sin_PE, positions_T)
        cos_T1E, sin_T1E = self.cos_PE[positions_T].unsqueeze(1), self.sin_PE[positions_T].unsqueeze(1)
        return _rotate(q_TND, cos_T1E, sin_T1E), _rotate(k_TKD, cos_T1E, sin_T1E)


def _rotate(x_TND: torch.Tensor, cos_T1E: torch.Tensor, sin_T1E: torch.Tensor) -> torch.Tensor:
    low, high = x_TND.float().chunk(2, dim=-1)
    return torch.cat((low * cos_T1E - high * sin_T1E, high * cos_T1E + low * sin_T1E), dim=-1).to(x_TND.dtype)


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
