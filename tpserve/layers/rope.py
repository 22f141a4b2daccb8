"""Rotary position embedding (RoPE; Su et al. 2021, arXiv:2104.09864) in the half-rotation layout: channel c rotates with
channel c + R / 2. Interleaved models rotate neighbours; their queries and keys are permuted to this layout first, which changes
no score.

Scaling: linear (Chen et al. 2023, arXiv:2306.15595), Llama 3 (arXiv:2407.21783), YaRN (Peng et al. 2023, arXiv:2309.00071) and
LongRoPE (Ding et al. 2024, arXiv:2402.13753).

Legend: T rows, N query heads, K key heads, D channels of a head, of which the first R rotate (mostly all), E = R / 2
frequencies, P positions.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from tpserve.types.model_spec import RopeSpec
from tpserve_kernels.cpu import qkv_heads
from tpserve_kernels.cpu.library import is_native


@dataclass(frozen=True)
class RotaryPositions:
    """The rotation for the positions of the rows of one step, for all layers. `positions_T`: int64, in [0, P)."""

    rope: "Rope"
    positions_T: torch.Tensor

    def __call__(self, q_TND: torch.Tensor, k_TKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated queries [T, N, D] and keys [T, K, D], computed in float32, in the dtype of the input. On the CPU."""
        if is_native(q_TND):
            return qkv_heads.rotate(q_TND, k_TKD, self.rotation)
        if self.rope.interleaved:
            q_TND, k_TKD = _halves(q_TND), _halves(k_TKD)
        return _rotate(q_TND, *self._waves), _rotate(k_TKD, *self._waves)

    @property
    def rotation(self) -> qkv_heads.Rotation:
        """The same for kernels."""
        return qkv_heads.Rotation(self.positions_T, self.rope.cos_PE, self.rope.sin_PE, self.rope.interleaved)

    @cached_property
    def _waves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The cosines and sines of the rows, float32 [T, 1, R], the sines of the lower half negated: computed once a step."""
        cos_TE, sin_TE = self.rope.cos_PE[self.positions_T], self.rope.sin_PE[self.positions_T]
        return torch.cat((cos_TE, cos_TE), 1).unsqueeze(1), torch.cat((-sin_TE, sin_TE), 1).unsqueeze(1)


@dataclass(frozen=True)
class Rope:
    """Cosines and sines of every position, float32 [P, E]. `interleaved`: the checkpoint rotates neighbouring channels."""

    cos_PE: torch.Tensor
    sin_PE: torch.Tensor
    interleaved: bool

    def at(self, positions_T: torch.Tensor) -> RotaryPositions:
        """The rotation for these positions, int64 in [0, P)."""
        return RotaryPositions(self, positions_T)


def _halves(x_TND: torch.Tensor) -> torch.Tensor:
    """Channels 0, 2, 4, ..., and then 1, 3, 5, ..."""
    return torch.cat((x_TND[..., ::2], x_TND[..., 1::2]), dim=2)


def _rotate(x_TND: torch.Tensor, cos_T1R: torch.Tensor, sin_T1R: torch.Tensor) -> torch.Tensor:
    turning_TNR, rest = x_TND.tensor_split((cos_T1R.shape[2],), dim=2)
    low_TNE, high_TNE = turning_TNR.chunk(2, dim=-1)
    crossed_TNR = torch.cat((high_TNE, low_TNE), dim=-1)
    turned_TNR = (turning_TNR * cos_T1R).add_(crossed_TNR * sin_T1R).to(x_TND.dtype)
    return torch.cat((turned_TNR, rest), dim=-1) if rest.shape[2] else turned_TNR


def tables(spec: RopeSpec, head_dim: int, num_positions: int, device: torch.device) -> Rope:
    """The tables of positions [0, num_positions), float32 on `device`. `num_positions` is the maximum length that is served."""
    angles_PE = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies(spec, head_dim, num_positions))
    assert not (spec.interleaved and spec.num_channels), "the permutation would move channels that do not rotate"
    cos_PE, sin_PE = ((wave_PE * spec.magnitude).to(device) for wave_PE in (angles_PE.cos(), angles_PE.sin()))
    return Rope(cos_PE, sin_PE, spec.interleaved)


def frequencies(spec: RopeSpec, head_dim: int, num_positions: int) -> torch.Tensor:
    """Radians per position of each frequency, float32 [E]. LongRoPE takes its factors by `num_positions`."""
    num_channels = spec.num_channels or head_dim
    powers_E = spec.theta ** (torch.arange(0, num_channels, 2, dtype=torch.float32) / num_channels)
    if spec.scaling == "longrope":
        is_long = num_positions > spec.original_max_position
        return 1.0 / (torch.tensor(spec.long_factors if is_long else spec.short_factors) * powers_E)
    base_E = 1.0 / powers_E
    if spec.scaling == "linear":
        return base_E / spec.factor
    if spec.scaling == "llama3":
        # Low frequencies are divided by `factor`, high ones stay, those between are interpolated.
        turns_E = spec.original_max_position * base_E / (2 * math.pi)
        share_E = ((turns_E - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)).clamp(0, 1)
        return share_E * base_E + (1 - share_E) * base_E / spec.factor
    if spec.scaling == "yarn":
        return _yarn(spec, base_E)
    return base_E


def _yarn(spec: RopeSpec, base_E: torch.Tensor) -> torch.Tensor:
    """YaRN: interpolate between the channels that rotate `beta_fast` and `beta_slow` times over the original length."""
    num_channels = 2 * len(base_E)

    def channel(turns: float) -> float:
        wave = spec.original_max_position / (turns * 2 * math.pi)
        return num_channels * math.log(wave) / (2 * math.log(spec.theta))

    first, last = channel(spec.beta_fast), channel(spec.beta_slow)
    if spec.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, num_channels - 1)
    width = last - first or 0.001
    stretched_E = ((torch.arange(len(base_E)) - first) / width).clamp(0, 1)
    return (1 - stretched_E) * base_E + stretched_E * base_E / spec.factor
