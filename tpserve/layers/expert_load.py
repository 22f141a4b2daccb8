"""How many tokens each expert has processed, for the expert metrics. The main thread counts, another thread reads.

The layers own the counters. This module never waits for the device: each step queues a copy of the counts to the host, and a
reader gets those of the last finished step.
"""

from array import array
from collections.abc import Sequence

import torch


class ExpertLoadCounter:
    """The token counts of a stage. `layers`: the numbers of the layers with experts; `counts`: int64 [experts] of each layer."""

    def __init__(self, layers: Sequence[int], counts: Sequence[torch.Tensor]) -> None:
        assert layers and len(layers) == len(counts)
        self.layers = tuple(layers)
        self._counts = list(counts)
        self._host_LE = torch.zeros_like(torch.stack(self._counts), device="cpu")
        if counts[0].is_cuda:
            self._host_LE = self._host_LE.pin_memory()

    def clear(self) -> None:
        """Reset the counts, after the profile run. In place, on the device of the counts."""
        for count in self._counts:
            count.zero_()

    def publish(self) -> None:
        """Queue a copy of the counts to the host. Readers see it when the current step has finished."""
        self._host_LE.copy_(torch.stack(self._counts), non_blocking=True)

    def read(self) -> bytes:
        """The counts as native 64-bit integers, layer by layer. Any thread may call this."""
        return array("q", self._host_LE.flatten().tolist()).tobytes()  # torch itself needs NumPy for the bytes
