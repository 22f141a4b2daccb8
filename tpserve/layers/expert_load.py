"""How many tokens each expert has processed, for the expert metrics. The main thread counts, another thread reads.

This module never waits for the device: each step queues one copy of the counts to the host, and a reader gets those of the last
finished step.

Legend: L layers with experts, E experts.
"""

from array import array
from collections.abc import Sequence

import torch


class ExpertLoadCounter:
    """The token counts of a stage. `layers`: the numbers of its layers with experts."""

    def __init__(self, layers: Sequence[int], num_experts: int, device: torch.device) -> None:
        self.layers = tuple(layers)
        self._counts_LE = torch.zeros(len(layers), num_experts, dtype=torch.int64, device=device)
        self._host_LE = torch.zeros(self._counts_LE.shape, dtype=torch.int64, pin_memory=self._counts_LE.is_cuda)

    def of(self, layer: int) -> torch.Tensor:
        """The counts of layer number `layer`, int64 [E]. The layer adds to them in place."""
        return self._counts_LE[self.layers.index(layer)]

    def clear(self) -> None:
        """Reset the counts, after the profile run. In place, on the device of the counts."""
        self._counts_LE.zero_()

    def publish(self) -> None:
        """Queue a copy of the counts to the host. Readers see it when the current step has finished."""
        self._host_LE.copy_(self._counts_LE, non_blocking=True)

    def read(self) -> bytes:
        """The counts as native 64-bit integers, layer by layer. Any thread may call this."""
        return array("q", self._host_LE.flatten().tolist()).tobytes()  # torch itself needs NumPy for the bytes
