"""How many tokens each expert has had, for whoever watches the imbalance. The main thread counts, another thread reads.

Owns no counter: the layers do. Never waits for the device: the counts are copied to the host behind each step's work, and a
reader gets those of the last step that is through.
"""

from array import array
from collections.abc import Sequence

import torch


class ExpertLoadCounter:
    """`layers`: numbers of a stage's layers that have experts; `counts`: theirs, int64 [experts] each, in the same order."""

    def __init__(self, layers: Sequence[int], counts: Sequence[torch.Tensor]) -> None:
        assert layers and len(layers) == len(counts)
        self.layers = tuple(layers)
        self._counts = list(counts)
        self._host_LE = torch.zeros_like(torch.stack(self._counts), device="cpu")
        if counts[0].is_cuda:
            self._host_LE = self._host_LE.pin_memory()

    def clear(self) -> None:
        """Forget what was counted while the model was tried."""
        for count in self._counts:
            count.zero_()

    def publish(self) -> None:
        """Readers are to see the step just queued, once it is through."""
        self._host_LE.copy_(torch.stack(self._counts), non_blocking=True)

    def read(self) -> bytes:
        """The counts as 64-bit integers, layer by layer. Any thread may ask."""
        return array("q", self._host_LE.flatten().tolist()).tobytes()  # a tensor gives its bytes only by way of NumPy
